//! Plays the owner of memory that somebody else fills: a VMM restoring a guest from a snapshot, as Firecracker does.
//!
//! It maps its memory, registers it with a userfaultfd of its own, sends that through a UNIX socket, and touches its memory
//! from threads, as virtual CPUs do. What is touched before anybody serves waits.

use crate::memory::Split;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::mman::{
    MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, mremap, munlock,
    munmap,
};
use pagestitch::{AdoptedMemory, OwnMemory};
use pagestitch_kernel::Features;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{AddressRange, Outcome, PageSize, Uffd, fd_passing};
use std::error::Error;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;

/// Memory of a guest, in one or more ranges, missing until somebody fills it.
#[derive(Debug)]
pub struct Guest {
    uffd: Uffd,
    page: PageSize,
    ranges: Vec<Range>,
}

/// A part of a guest's memory.
#[derive(Debug)]
pub struct Range {
    start: NonNull<c_void>,
    bytes: usize,
    /// Where it begins in the guest's memory, counted through.
    offset: usize,
}

impl Range {
    /// Reads its first byte.
    #[must_use]
    pub fn read(&self) -> u8 {
        // SAFETY: a mapping of ours that nothing unmaps; bytes have no invalid values.
        #[expect(unsafe_code, reason = "a virtual CPU reads memory that others fill")]
        unsafe {
            self.start.cast::<u8>().read_volatile()
        }
    }
}

// The pointers are addresses of mappings that live as long as the guest.
#[expect(unsafe_code, reason = "a guest's memory is shared by its virtual CPUs")]
// SAFETY: nothing is ever borrowed from the memory: it is read and written a byte at a time.
unsafe impl Sync for Guest {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl Send for Guest {}

impl Guest {
    /// A guest with these ranges of memory, in bytes; `huge`: of hugetlbfs pages of 2 MiB.
    ///
    /// # Errors
    ///
    /// What the kernel answers: no userfaultfd, no memory, no huge pages reserved (`vm.nr_hugepages`).
    pub fn new(ranges: &[usize], huge: bool) -> io::Result<Self> {
        Self::registered(ranges, huge, RegisterMode::MISSING)
    }

    /// A guest that can [protect](Self::protect) its memory from itself, as to take a snapshot of it. Linux 5.7.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn protectable(ranges: &[usize]) -> io::Result<Self> {
        Self::registered(ranges, false, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT)
    }

    /// A guest that has moves of its memory told (`UFFD_FEATURE_EVENT_REMAP`).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn movable(ranges: &[usize]) -> io::Result<Self> {
        Self::with(ranges, false, RegisterMode::MISSING, Features::EVENT_REMOVE | Features::EVENT_REMAP)
    }

    /// A guest with one range of memory, which is a file's on a tmpfs.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn in_file(file: impl AsFd, bytes: usize) -> io::Result<Self> {
        let uffd = Uffd::open(Features::MISSING_SHMEM).map_err(io::Error::other)?;
        let (page, size) = (PageSize::system(), NonZeroUsize::new(bytes).expect("some bytes"));
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        let addresses = AddressRange::new(start.as_ptr().addr(), bytes, page).expect("whole pages");
        // SAFETY: a fresh mapping of our own, of which nothing was ever read.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        unsafe { uffd.register_range(addresses, RegisterMode::MISSING) }?;
        Ok(Self { uffd, page, ranges: vec![Range { start, bytes, offset: 0 }] })
    }

    fn registered(ranges: &[usize], huge: bool, modes: RegisterMode) -> io::Result<Self> {
        let wanted = Features::EVENT_REMOVE | Features::MISSING_HUGETLBFS | Features::WRITE_PROTECT;
        Self::with(ranges, huge, modes, wanted)
    }

    fn with(ranges: &[usize], huge: bool, modes: RegisterMode, wanted: Features) -> io::Result<Self> {
        let uffd = Uffd::open(wanted).map_err(io::Error::other)?;
        let page = if huge { PageSize::new(HUGE).expect("a power of two") } else { PageSize::system() };
        let mut guest = Self { uffd, page, ranges: Vec::new() };
        let mut offset = 0;
        for &bytes in ranges {
            guest.ranges.push(Range { start: map(bytes, huge)?, bytes, offset });
            offset += bytes;
        }
        for range in &guest.ranges {
            let addresses = AddressRange::new(range.start.as_ptr().addr(), range.bytes, page);
            let addresses = addresses.ok_or_else(|| io::Error::other("not whole pages"))?;
            // SAFETY: a fresh mapping of our own, of which nothing was ever read.
            #[expect(unsafe_code, reason = "the guest vouches for its memory")]
            unsafe { guest.uffd.register_range(addresses, modes) }?;
            // Not before: in a process that locks its memory, what can be accessed is populated, with zeros.
            // SAFETY: as above; it only gains accesses.
            #[expect(unsafe_code, reason = "mprotect")]
            unsafe { mprotect(range.start, range.bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) }?;
        }
        Ok(guest)
    }

    /// Its userfaultfd.
    #[must_use]
    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Makes reads of its userfaultfd wait, for all who hold it.
    ///
    /// # Errors
    ///
    /// The errno of `fcntl(2)`.
    pub fn make_blocking(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.uffd, FcntlArg::F_GETFL)?) - OFlag::O_NONBLOCK;
        Ok(fcntl(&self.uffd, FcntlArg::F_SETFL(flags)).map(drop)?)
    }

    /// Its memory, to be served by the process that it is in.
    ///
    /// # Errors
    ///
    /// Those of [`AdoptedMemory::of_this_process`].
    pub fn memory(&self) -> Result<AdoptedMemory, Box<dyn Error>> {
        let memory = self.memory_without_ranges()?;
        Ok(self.ranges().into_iter().fold(memory, |memory, (start, bytes)| memory.range(start, bytes)))
    }

    /// The same, whose ranges are still to be told.
    ///
    /// # Errors
    ///
    /// Those of [`AdoptedMemory::of_this_process`].
    pub fn memory_without_ranges(&self) -> Result<AdoptedMemory, Box<dyn Error>> {
        // SAFETY: all that is registered are mappings of the guest's own, from which nothing is ever borrowed.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        let promise = unsafe { OwnMemory::promise() };
        Ok(AdoptedMemory::of_this_process(self.uffd().try_clone_to_owned()?, promise)?)
    }

    /// Where its ranges are: address and bytes of each.
    #[must_use]
    pub fn ranges(&self) -> Vec<(usize, usize)> {
        self.ranges.iter().map(|range| (range.start.as_ptr().addr(), range.bytes)).collect()
    }

    /// What Firecracker (1.12) sends: a JSON array with an object for each range.
    #[must_use]
    pub fn handshake(&self) -> String {
        let page = self.page.bytes();
        let object = |range: &Range| {
            let (address, bytes, offset) = (range.start.as_ptr().addr(), range.bytes, range.offset);
            format!(
                r#"{{"base_host_virt_addr":{address},"size":{bytes},"offset":{offset},"page_size":{page},"page_size_kib":{page}}}"#
            )
        };
        format!("[{}]", self.ranges.iter().map(object).collect::<Vec<_>>().join(","))
    }

    /// Connects, and hands its memory over as Firecracker does: one message, one descriptor, no answer. The stream has to stay
    /// open: its end may overtake the message.
    ///
    /// # Errors
    ///
    /// Those of `connect(2)` and `sendmsg(2)`.
    pub fn hand_over(&self, socket: &std::path::Path) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(socket)?;
        fd_passing::send(&stream, self.handshake().as_bytes(), &[self.uffd()])?;
        Ok(stream)
    }

    /// Reads a byte of its memory, as a virtual CPU does.
    ///
    /// # Panics
    ///
    /// If the guest has no such byte.
    #[must_use]
    pub fn read(&self, offset: usize) -> u8 {
        // SAFETY: inside a mapping of ours that lives as long as `self`; bytes have no invalid values.
        #[expect(unsafe_code, reason = "a virtual CPU reads memory that others fill")]
        unsafe {
            self.at(offset).cast::<u8>().read_volatile()
        }
    }

    /// Writes a byte of its memory.
    ///
    /// # Panics
    ///
    /// If the guest has no such byte.
    pub fn write(&self, offset: usize, byte: u8) {
        // SAFETY: as in `read`; no reference to the memory exists.
        #[expect(unsafe_code, reason = "a virtual CPU writes its memory")]
        unsafe {
            self.at(offset).cast::<u8>().write_volatile(byte);
        }
    }

    /// Protects all of its memory that is there: who writes waits until that is taken away.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn protect(&self) -> io::Result<()> {
        for range in &self.ranges {
            let addresses = AddressRange::new(range.start.as_ptr().addr(), range.bytes, self.page);
            match self.uffd.write_protect(addresses.expect("whole pages")) {
                Outcome::Done => {}
                refused => return Err(io::Error::other(format!("{refused:?}"))),
            }
        }
        Ok(())
    }

    /// Gives memory back to the host, as a balloon does (`MADV_DONTNEED`). Waits until whoever serves knows.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`.
    pub fn balloon(&self, offset: usize, bytes: usize) -> io::Result<()> {
        // SAFETY: pages of our own mapping, of which nothing is borrowed.
        #[expect(unsafe_code, reason = "madvise")]
        Ok(unsafe { madvise(self.at(offset), bytes, MmapAdvise::MADV_DONTNEED) }?)
    }

    /// Registers memory with its userfaultfd that [`ranges`](Self::ranges) does not tell of.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn register_more(&self, bytes: usize) -> io::Result<Range> {
        let start = map(bytes, false)?;
        let addresses = AddressRange::new(start.as_ptr().addr(), bytes, self.page).expect("whole pages");
        // SAFETY: a fresh mapping of our own, of which nothing was ever read.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        unsafe { self.uffd.register_range(addresses, RegisterMode::MISSING) }?;
        Ok(Range { start, bytes, offset: 0 })
    }

    /// Moves memory of [`register_more`](Self::register_more) to other addresses. Waits until whoever serves knows.
    ///
    /// # Errors
    ///
    /// The errno of `mremap(2)`.
    pub fn move_more(&self, range: Range) -> io::Result<Range> {
        let (to, flags) = (map(range.bytes, false)?, MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED);
        // SAFETY: one mapping of our own takes the place of another, and nothing is borrowed of either.
        #[expect(unsafe_code, reason = "mremap")]
        let start = unsafe { mremap(range.start, range.bytes, range.bytes, flags, Some(to)) }?;
        Ok(Range { start, ..range })
    }

    /// Fills the first page of such memory itself. False if it was not missing any more.
    ///
    /// # Panics
    ///
    /// If the kernel gives another answer.
    #[must_use]
    pub fn fill_more(&self, range: &Range) -> bool {
        let page = self.page.bytes();
        let first = AddressRange::new(range.start.as_ptr().addr(), page, self.page).expect("a page");
        match self.uffd.zero(first) {
            Outcome::Done => true,
            Outcome::AlreadyThere => false,
            other => panic!("{other:?}"),
        }
    }

    /// Moves one of its ranges to other addresses, likewise, and says where that is. Its memory is not there any more.
    ///
    /// # Errors
    ///
    /// The errno of `mremap(2)`.
    ///
    /// # Panics
    ///
    /// If it has no such range.
    pub fn move_range(&mut self, index: usize) -> io::Result<Range> {
        let range = self.ranges.remove(index);
        self.move_more(range)
    }

    /// Splits its mapping around some pages, which changes no byte of them.
    pub fn split(&self, offset: usize, bytes: usize, how: Split) {
        how.at(self.at(offset), bytes);
    }

    fn at(&self, offset: usize) -> NonNull<c_void> {
        let range =
            self.ranges.iter().find(|range| (range.offset..range.offset + range.bytes).contains(&offset));
        let range = range.expect("an offset in the guest's memory");
        range.start.map_addr(|start| start.checked_add(offset - range.offset).expect("inside the mapping"))
    }
}

/// Lets pages of a region go, as `madvise(MADV_DONTNEED)` by an application does: they are asked for again when they are touched.
///
/// # Panics
///
/// If the bytes are not inside the region.
pub fn discard(region: &pagestitch::Region, bytes: std::ops::Range<usize>) {
    assert!(bytes.end <= region.len(), "inside");
    let page = PageSize::system().bytes();
    let (start, end) = (bytes.start.next_multiple_of(page), bytes.end / page * page);
    if start >= end {
        return;
    }
    let address = region.as_ptr().map_addr(|base| base.checked_add(start).expect("inside"));
    // SAFETY: whole pages of a region, which holds the same bytes again once they are touched; until then who reads waits.
    #[expect(unsafe_code, reason = "madvise")]
    let _ = unsafe { madvise(address.cast(), end - start, MmapAdvise::MADV_DONTNEED) };
}

impl Drop for Guest {
    fn drop(&mut self) {
        for range in &self.ranges {
            // SAFETY: the mapping is ours, and nobody has a pointer to it any more.
            #[expect(unsafe_code, reason = "munmap")]
            let _ = unsafe { munmap(range.start, range.bytes) };
        }
    }
}

fn map(bytes: usize, huge: bool) -> io::Result<NonNull<c_void>> {
    let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::other("an empty range"))?;
    let mut flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    flags.set(MapFlags::MAP_HUGETLB, huge);
    // SAFETY: a new mapping, wherever the kernel likes.
    #[expect(unsafe_code, reason = "mmap")]
    let start = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) }?;
    // SAFETY: whether pages may be swapped out changes none of their bytes.
    #[expect(unsafe_code, reason = "munlock")]
    unsafe { munlock(start, bytes.get()) }?;
    Ok(start)
}
