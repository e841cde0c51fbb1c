//! The process whose memory a userfaultfd fills: this one, or another one.
//!
//! No call tells. So this module makes a request that the kernel refuses, with an errno that
//! differs for memory of the caller:
//!
//! | request | this process | another process | lock of the other process |
//! |---|---|---|---|
//! | `UFFDIO_MOVE` to and from an address without a mapping (since Linux 6.9) | `ENOENT` | `EINVAL` | none |
//! | `UFFDIO_REGISTER` of a page that cannot become writable | `EPERM` | `EINVAL`: nothing is mapped there | its memory map, for a moment |
//!
//! The first request comes first, because another process cannot make it wait. A userfaultfd of
//! this process shows once how this kernel answers.

use super::abi::{self, UffdioCopy, Waiters};
use super::open::{handshake, open_fd};
use super::register::{RegisterMode, register, unregister, wake};
use crate::errno::Errno;
use crate::features::Features;
use crate::fork::ForkGeneration;
use crate::mapping::OwnedMapping;
use crate::page::{AddressRange, PageSize};
use nix::fcntl::{OFlag, open};
use nix::libc::MAP_GROWSDOWN;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// True if a userfaultfd fills memory of this process. `EINVAL` before its handshake
/// (`UFFDIO_API`), when no answer is possible yet.
pub(super) fn is_of_this_process(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    static PROBE: OnceLock<Result<Probe, Errno>> = OnceLock::new();
    match PROBE.get_or_init(Probe::new) {
        Ok(probe) if probe.generation.is_current() => probe.ask(fd),
        Err(errno) => Err(*errno),
        // A forked child has inherited the parent's answers, but not its mappings.
        Ok(_) => Probe::new()?.ask(fd),
    }
}

#[derive(Debug)]
struct Probe {
    /// No page is mapped below it, now or later, because the kernel keeps these addresses free for
    /// it to grow into.
    below: OwnedMapping,
    /// A page that cannot become writable. Children of fork do not inherit it, because their memory
    /// is not this process's.
    read_only: OwnedMapping,
    generation: ForkGeneration,
    /// True if the answer to a move differs on this kernel.
    moves: bool,
}

impl Probe {
    fn new() -> Result<Self, Errno> {
        let (below, mut read_only) = (growing()?, read_only()?);
        read_only.do_not_fork()?;
        let mut probe = Self { below, read_only, generation: ForkGeneration::current(), moves: false };
        // Without a userfaultfd, the second request is left.
        if let Some(own) = open_fd().ok().filter(|own| handshake(&own.fd, Features::NONE).is_ok()) {
            probe.moves = probe.try_move(own.fd.as_fd()) == Err(Errno::ENOENT);
        }
        Ok(probe)
    }

    fn ask(&self, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        self.try_wake(fd)?;
        if self.moves {
            match self.try_move(fd) {
                Err(Errno::ENOENT) => return Ok(true),
                Err(Errno::EINVAL) => return Ok(false),
                // EAGAIN: the memory map of the other process is changing.
                _ => {}
            }
        }
        Ok(self.try_register(fd) == Err(Errno::EPERM))
    }

    /// Changes nothing. `EINVAL` before the handshake.
    fn try_wake(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        wake(fd, self.hole())
    }

    fn try_move(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let hole = self.hole();
        let mut request = UffdioCopy::new(hole, hole.start(), Waiters::Woken);
        // SAFETY: the kernel refuses the move, because nothing is mapped at either address. It
        // writes the `copied` field of `request`.
        #[expect(unsafe_code, reason = "an ioctl")]
        unsafe { abi::r#move(fd.as_raw_fd(), &raw mut request) }.map(drop).map_err(Errno::of)
    }

    /// If another process has a mapping at this very address, it is not registered any more when
    /// this returns.
    fn try_register(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let page = PageSize::system();
        let start = self.read_only.start().addr().get();
        let range = AddressRange::new(start, page.bytes(), page).expect("a page");
        // SAFETY: for memory of this process the kernel refuses, because the page cannot become
        // writable; so no page of this process becomes missing.
        #[expect(unsafe_code, reason = "registers memory of another process at most")]
        unsafe { register(fd, range, RegisterMode::MISSING) }?;
        unregister(fd, range)
    }

    fn hole(&self) -> AddressRange {
        let page = PageSize::system();
        let start = self.below.start().addr().get() - 2 * page.bytes();
        AddressRange::new(start, page.bytes(), page).expect("a page")
    }
}

fn growing() -> Result<OwnedMapping, Errno> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::from_bits_retain(MAP_GROWSDOWN);
    OwnedMapping::anonymous(page(), ProtFlags::PROT_NONE, flags)
}

fn read_only() -> Result<OwnedMapping, Errno> {
    let memfd = memfd_create(c"pagestitch-probe", MFdFlags::MFD_CLOEXEC).map_err(Errno::of)?;
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let read_only =
        open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(Errno::of)?;
    OwnedMapping::of_file_at(read_only.as_fd(), 0, page(), ProtFlags::PROT_READ, MapFlags::MAP_SHARED)
}

const fn page() -> NonZeroUsize {
    // The kernel rounds it up if pages are larger.
    NonZeroUsize::new(4096).expect("not zero")
}
