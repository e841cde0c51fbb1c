//! Whose memory a userfaultfd fills: this process's, or another's.
//!
//! No call tells it, so the kernel is asked for something that it refuses with another errno for memory of the caller's:
//!
//! | request | of this process | of another | holds |
//! |---|---|---|---|
//! | `UFFDIO_MOVE` to and from a place where nothing is mapped (since Linux 6.9) | `ENOENT` | `EINVAL` | no lock of the other's memory |
//! | `UFFDIO_REGISTER` of a page that cannot be made writable | `EPERM` | `EINVAL`: nothing is mapped there | its memory map, for a moment |
//!
//! The first is tried first, as another process cannot make it wait. What either answers on this kernel for memory of this process is
//! tried once, on a userfaultfd of our own.

use super::abi::{self, Copy, Range, Register};
use super::open::{handshake, open_fd};
use super::outcome::Waiters;
use crate::features::Features;
use crate::fork::ForkGeneration;
use crate::mapping::OwnedMapping;
use crate::page::{AddressRange, PageSize};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::MAP_GROWSDOWN;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// Whether a userfaultfd fills memory of this process. `EINVAL`: its `UFFDIO_API` is still to come, so that nobody can tell.
pub(super) fn is_of_this_process(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    static PROBE: OnceLock<Result<Probe, Errno>> = OnceLock::new();
    match PROBE.get_or_init(Probe::new) {
        Ok(probe) if probe.generation.is_current() => probe.ask(fd),
        Err(errno) => Err(*errno),
        // A forked child has the parent's answers, and not its mappings.
        Ok(_) => Probe::new()?.ask(fd),
    }
}

#[derive(Debug)]
struct Probe {
    /// Nothing is mapped in the pages below it, and nothing will be: the kernel keeps them free for it to grow into.
    below: OwnedMapping,
    /// A page that cannot be made writable. Children of fork do not have it: their memory is not this process's.
    read_only: OwnedMapping,
    generation: ForkGeneration,
    /// Whether a move tells.
    moves: bool,
}

impl Probe {
    fn new() -> Result<Self, Errno> {
        let (below, mut read_only) = (growing()?, read_only()?);
        read_only.do_not_fork()?;
        let mut probe = Self { below, read_only, generation: ForkGeneration::current(), moves: false };
        // Where none can be had, the other way is left.
        if let Ok(own) = open_fd()
            && handshake(&own.fd, Features::NONE).is_ok()
        {
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
                // EAGAIN: its memory map is changing.
                _ => {}
            }
        }
        Ok(self.try_register(fd) == Err(Errno::EPERM))
    }

    /// Changes nothing; `EINVAL` before the handshake.
    fn try_wake(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut range = Range::from(self.hole());
        // SAFETY: `range` is a uffdio_range that lives through the call.
        #[expect(unsafe_code, reason = "an ioctl")]
        unsafe { abi::wake(fd.as_raw_fd(), &raw mut range) }.map(drop)
    }

    fn try_move(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let hole = self.hole();
        let mut request = Copy::new(hole, hole.start(), Waiters::Woken);
        // SAFETY: `request` is a uffdio_move that lives through the call; it is refused, as nothing is mapped there.
        #[expect(unsafe_code, reason = "an ioctl")]
        unsafe { abi::r#move(fd.as_raw_fd(), &raw mut request) }.map(drop)
    }

    /// Should another process have something at this very address, it is not registered when this returns.
    fn try_register(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let page = PageSize::system();
        let start = self.read_only.start().addr().get();
        let range = AddressRange::new(start, page.bytes(), page).expect("a page");
        let mut request = Register { range: range.into(), mode: abi::REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: `request` is a uffdio_register that lives through the call. Of this process it is refused, as for a page that
        // cannot be written to.
        #[expect(unsafe_code, reason = "an ioctl")]
        unsafe { abi::register(fd.as_raw_fd(), &raw mut request) }?;
        let mut range = Range::from(range);
        // SAFETY: `range` is a uffdio_range that lives through the call.
        #[expect(unsafe_code, reason = "an ioctl")]
        unsafe { abi::unregister(fd.as_raw_fd(), &raw mut range) }.map(drop)
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
    let memfd = memfd_create(c"pagestitch-probe", MFdFlags::MFD_CLOEXEC)?;
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let read_only = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    OwnedMapping::of_file_at(read_only.as_fd(), 0, page(), ProtFlags::PROT_READ, MapFlags::MAP_SHARED)
}

const fn page() -> NonZeroUsize {
    // Rounded up by the kernel where pages are larger.
    NonZeroUsize::new(4096).expect("not zero")
}
