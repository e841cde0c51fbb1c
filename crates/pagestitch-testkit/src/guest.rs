//! The owner of memory that another process fills: a VMM that restores a guest from a snapshot, as
//! Firecracker does.
//!
//! It maps its memory, registers it with a userfaultfd of its own, sends that through a UNIX
//! socket, and touches the memory from threads, as virtual CPUs do. A touch waits until the memory
//! is served.

use crate::memory::Split;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::mman::{
    MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, mremap, munlock,
    munmap,
};
use pagestitch::{AdoptedMemory, OwnMemory};
use pagestitch_kernel::Features;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::{RegisterMode, kernel_features};
use pagestitch_kernel::{AddressRange, Outcome, PageSize, Uffd, fd_passing};
use std::error::Error;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;

/// The memory of a guest, in one or more ranges. All pages are missing until a server fills them.
#[derive(Debug)]
pub struct Guest {
    uffd: Uffd,
    page: PageSize,
    ranges: Vec<Range>,
}

/// A range of a guest's memory.
#[derive(Debug)]
pub struct Range {
    start: NonNull<c_void>,
    bytes: usize,
    /// Its offset in the guest's memory.
    offset: usize,
}

impl Range {
    /// Reads the first byte of the range.
    #[must_use]
    pub fn read(&self) -> u8 {
        // SAFETY: reads a byte of a mapping of this guest that stays mapped; a byte has no invalid
        // values.
        #[expect(unsafe_code, reason = "a virtual CPU reads memory that a server fills")]
        unsafe {
            self.start.cast::<u8>().read_volatile()
        }
    }
}

// The pointers are addresses of mappings that live as long as the guest.
#[expect(unsafe_code, reason = "a guest's memory is shared by its virtual CPUs")]
// SAFETY: no reference to the memory of the guest exists: threads read and write single bytes.
unsafe impl Sync for Guest {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl Send for Guest {}

impl Guest {
    /// Makes a guest with ranges of these lengths in bytes. `huge`: of hugetlbfs pages of 2 MiB.
    ///
    /// # Errors
    ///
    /// The kernel's error: no userfaultfd, no memory, or no reserved huge pages
    /// (`vm.nr_hugepages`).
    pub fn new(ranges: &[usize], huge: bool) -> io::Result<Self> {
        let wanted = Features::EVENT_REMOVE | Features::MISSING_HUGETLBFS;
        Self::with(ranges, huge, RegisterMode::MISSING, wanted)
    }

    /// Makes a guest that can write-protect its memory with [`protect`](Self::protect), as for a
    /// snapshot. Linux 5.7.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn protectable(ranges: &[usize]) -> io::Result<Self> {
        let kernel = kernel_features().map_err(io::Error::other)?;
        let unpopulated = match kernel.contains(Features::WRITE_PROTECT_UNPOPULATED) {
            true => Features::WRITE_PROTECT_UNPOPULATED,
            false => Features::WRITE_PROTECT,
        };
        let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
        Self::with(ranges, false, modes, Features::EVENT_REMOVE | Features::WRITE_PROTECT | unpopulated)
    }

    /// Makes a guest whose userfaultfd reports moves of its memory (`UFFD_FEATURE_EVENT_REMAP`).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn movable(ranges: &[usize]) -> io::Result<Self> {
        Self::with(ranges, false, RegisterMode::MISSING, Features::EVENT_REMOVE | Features::EVENT_REMAP)
    }

    /// Makes a guest with one range of memory, a shared mapping of a file on a tmpfs.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn in_file(file: impl AsFd, bytes: usize) -> io::Result<Self> {
        let uffd = Uffd::open(Features::MISSING_SHMEM).map_err(io::Error::other)?;
        let (page, size) = (PageSize::system(), NonZeroUsize::new(bytes).expect("some bytes"));
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: makes a new mapping at a free address, and touches no other memory.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        let addresses = AddressRange::new(start.as_ptr().addr(), bytes, page).expect("whole pages");
        // SAFETY: registers the new mapping above, from which no byte has been read.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        unsafe { uffd.register_range(addresses, RegisterMode::MISSING) }?;
        Ok(Self { uffd, page, ranges: vec![Range { start, bytes, offset: 0 }] })
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
            // SAFETY: registers a new mapping of this guest, from which no byte has been read.
            #[expect(unsafe_code, reason = "the guest vouches for its memory")]
            unsafe { guest.uffd.register_range(addresses, modes) }?;
            // Accesses follow the registration, because a process that locks its memory populates
            // accessible memory with zeros.
            // SAFETY: gives more accesses to the same mapping of this guest, and takes none away.
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

    /// Clears `O_NONBLOCK` of its userfaultfd, so that reads of every holder block.
    ///
    /// # Errors
    ///
    /// The errno of `fcntl(2)`.
    pub fn make_blocking(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.uffd, FcntlArg::F_GETFL)?) - OFlag::O_NONBLOCK;
        Ok(fcntl(&self.uffd, FcntlArg::F_SETFL(flags)).map(drop)?)
    }

    /// Its memory, for a server in this process.
    ///
    /// # Errors
    ///
    /// Those of [`AdoptedMemory::of_this_process`].
    pub fn memory(&self) -> Result<AdoptedMemory, Box<dyn Error>> {
        let memory = self.memory_without_ranges()?;
        Ok(self.ranges().into_iter().fold(memory, |memory, (start, bytes)| memory.range(start, bytes)))
    }

    /// Its memory without ranges, which the caller adds.
    ///
    /// # Errors
    ///
    /// Those of [`AdoptedMemory::of_this_process`].
    pub fn memory_without_ranges(&self) -> Result<AdoptedMemory, Box<dyn Error>> {
        // SAFETY: all registered memory is mappings of this guest, of which no reference exists.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        let promise = unsafe { OwnMemory::promise() };
        Ok(AdoptedMemory::of_this_process(self.uffd().try_clone_to_owned()?, promise)?)
    }

    /// The address and the length of each range.
    #[must_use]
    pub fn ranges(&self) -> Vec<(usize, usize)> {
        self.ranges.iter().map(|range| (range.start.as_ptr().addr(), range.bytes)).collect()
    }

    /// The message of Firecracker 1.12: a JSON array with an object for each range.
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

    /// Connects and hands the memory over as Firecracker does: one message, one descriptor, no
    /// answer. The stream must stay open, because its end may overtake the message.
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
        // SAFETY: reads a byte of a mapping that lives as long as `self`; a byte has no invalid
        // values.
        #[expect(unsafe_code, reason = "a virtual CPU reads memory that a server fills")]
        unsafe {
            self.at(offset).cast::<u8>().read_volatile()
        }
    }

    /// Copies bytes of its memory, of one range, to `to`: faster than [`read`](Self::read) for each byte.
    ///
    /// # Panics
    ///
    /// If the guest has no such range.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        let (from, bytes) = (self.at(offset).cast::<u8>(), to.len());
        if let Some(last) = bytes.checked_sub(1) {
            let contiguous = self.at(offset + last).addr().get() == from.addr().get() + last;
            assert!(contiguous, "bytes of two ranges");
        }
        // SAFETY: reads bytes of one mapping that lives as long as `self`, of which no reference exists,
        // so they do not overlap with `to`. Bytes have no invalid values.
        #[expect(unsafe_code, reason = "a virtual CPU reads memory that a server fills")]
        unsafe {
            from.copy_to_nonoverlapping(NonNull::from(to).cast(), bytes);
        }
    }

    /// Writes a byte of its memory.
    ///
    /// # Panics
    ///
    /// If the guest has no such byte.
    pub fn write(&self, offset: usize, byte: u8) {
        // SAFETY: writes a byte of a mapping that lives as long as `self`, of which no reference
        // exists.
        #[expect(unsafe_code, reason = "a virtual CPU writes its memory")]
        unsafe {
            self.at(offset).cast::<u8>().write_volatile(byte);
        }
    }

    /// Write-protects all pages: before Linux 6.4, those that are present. A write waits until the server lifts
    /// the protection.
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

    /// Gives memory back to the host, as a balloon does (`MADV_DONTNEED`). Waits until the server
    /// has read the event.
    ///
    /// # Errors
    ///
    /// The errno of `madvise(2)`.
    pub fn balloon(&self, offset: usize, bytes: usize) -> io::Result<()> {
        // SAFETY: discards pages of a mapping of this guest, of which no reference exists.
        #[expect(unsafe_code, reason = "madvise")]
        Ok(unsafe { madvise(self.at(offset), bytes, MmapAdvise::MADV_DONTNEED) }?)
    }

    /// Registers another range with the userfaultfd, which [`ranges`](Self::ranges) and the
    /// handshake omit.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn register_more(&self, bytes: usize) -> io::Result<Range> {
        let start = map(bytes, false)?;
        let addresses = AddressRange::new(start.as_ptr().addr(), bytes, self.page).expect("whole pages");
        // SAFETY: registers a new mapping of this guest, from which no byte has been read.
        #[expect(unsafe_code, reason = "the guest vouches for its memory")]
        unsafe { self.uffd.register_range(addresses, RegisterMode::MISSING) }?;
        Ok(Range { start, bytes, offset: 0 })
    }

    /// Moves a range of [`register_more`](Self::register_more) to other addresses. Waits until the
    /// server has read the event.
    ///
    /// # Errors
    ///
    /// The errno of `mremap(2)`.
    pub fn move_more(&self, range: Range) -> io::Result<Range> {
        let (to, flags) = (map(range.bytes, false)?, MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED);
        // SAFETY: a mapping of this guest replaces another one of it, and no reference to either
        // exists.
        #[expect(unsafe_code, reason = "mremap")]
        let start = unsafe { mremap(range.start, range.bytes, range.bytes, flags, Some(to)) }?;
        Ok(Range { start, ..range })
    }

    /// Fills the first page of such a range. Returns false if the page was present.
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

    /// Fills the first page of its memory with zeros.
    ///
    /// # Panics
    ///
    /// If the page was present, or if the guest has no memory.
    pub fn fill_first(&self) {
        assert!(self.fill_more(&self.ranges[0]), "a missing page");
    }

    /// True if a thread waits for a page, or to write to a protected one.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        self.uffd.has_waiters()
    }

    /// Moves one of the announced ranges to other addresses, and returns its new place. The guest
    /// loses the range.
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

    /// Splits the mapping around some pages. No byte changes.
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

impl Drop for Guest {
    fn drop(&mut self) {
        for range in &self.ranges {
            // SAFETY: unmaps a mapping of this guest, to which no pointer exists any more.
            #[expect(unsafe_code, reason = "munmap")]
            let _ = unsafe { munmap(range.start, range.bytes) };
        }
    }
}

fn map(bytes: usize, huge: bool) -> io::Result<NonNull<c_void>> {
    let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::other("an empty range"))?;
    let mut flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    flags.set(MapFlags::MAP_HUGETLB, huge);
    // SAFETY: makes a new mapping at a free address, and touches no other memory.
    #[expect(unsafe_code, reason = "mmap")]
    let start = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags) }?;
    // SAFETY: permits swapping of the new mapping above, which changes no byte.
    #[expect(unsafe_code, reason = "munlock")]
    unsafe { munlock(start, bytes.get()) }?;
    Ok(start)
}
