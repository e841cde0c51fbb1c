//! The process whose memory a userfaultfd fills: this one, or another one.
//!
//! No call tells. So this module makes a request that the kernel refuses, with an errno that
//! differs for memory of the caller:
//!
//! | request | this process | another process | lock of the other process |
//! |---|---|---|---|
//! | `UFFDIO_MOVE` to and from an address without a mapping (since Linux 6.9) | `ENOENT` | `EINVAL` | none |
//! | `UFFDIO_REGISTER` of all memory, from a page on that cannot become writable | `EPERM` | `EINVAL`: its stack has no minor faults | its memory map, for a moment |
//!
//! The first request comes first, because another process cannot make it wait. The kernel answers
//! it with `EAGAIN` as long as an event is unread, such as that of a balloon. A userfaultfd of this
//! process shows once how this kernel answers.
//!
//! The second request has to fail in the other process, whatever is mapped there: its memory would
//! be registered anew. The kernel checks all mappings of the range before it changes one. So the
//! range holds the stack, which is anonymous memory, and the mode is that of minor faults, which
//! anonymous memory does not have. Before Linux 5.14, which lacks the mode, the range holds the vDSO,
//! which cannot be registered at all.

use super::abi::{self, UffdioCopy, Waiters};
use super::open::{handshake, kernel_features, open_fd};
use super::register::{RegisterMode, register, wake};
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
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// True if a userfaultfd fills memory of this process. `EINVAL` before its handshake
/// (`UFFDIO_API`), when no answer is possible yet.
pub(super) fn is_of_this_process(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    probe()?.ask(fd)
}

/// Makes all that [`is_of_this_process`] needs, so that later calls take no descriptor.
pub(super) fn prepare() -> Result<(), Errno> {
    kept(&probe()?.registration, Registration::new).map(drop)
}

/// The probe of this process. A forked child makes its own, because it has inherited the parent's answers,
/// but not all of its mappings.
fn probe() -> Result<&'static Probe, Errno> {
    let mut place = &PROBE;
    while let Some(probe) = place.get() {
        if probe.generation.is_current() {
            return Ok(probe);
        }
        place = &probe.of_child;
    }
    kept(place, || Probe::new().map(Box::new)).map(|probe| &**probe)
}

/// The probe of the first process that has made one, and in it that of each child in turn.
static PROBE: OnceLock<Box<Probe>> = OnceLock::new();

/// The value that a call has made before, or now. A failure is not kept, because descriptors and memory that are missing
/// now may be there at the next call.
pub(super) fn kept<T>(place: &OnceLock<T>, make: fn() -> Result<T, Errno>) -> Result<&T, Errno> {
    match place.get() {
        Some(value) => Ok(value),
        None => make().map(|value| place.get_or_init(|| value)),
    }
}

#[derive(Debug)]
struct Probe {
    /// No page is mapped below it, now or later, because the kernel keeps these addresses free for
    /// it to grow into.
    below: OwnedMapping,
    generation: ForkGeneration,
    /// True if the answer to a move differs on this kernel.
    moves: bool,
    /// Made when it is first asked for, because it takes a dozen system calls, and the other request
    /// mostly answers.
    registration: OnceLock<Registration>,
    /// The probe of a forked child.
    of_child: OnceLock<Box<Self>>,
}

/// A registration that the kernel refuses.
#[derive(Debug)]
struct Registration {
    /// A page that cannot become writable. Children of fork do not inherit it, because their memory
    /// is not this process's.
    _read_only: OwnedMapping,
    /// The addresses from `_read_only` on, to the end of those that a process has.
    all: AddressRange,
    mode: RegisterMode,
}

impl Registration {
    fn new() -> Result<Self, Errno> {
        let mut read_only = read_only()?;
        read_only.do_not_fork()?;
        let all = from(read_only.start().addr().get())?;
        let minor = match kernel_features() {
            Ok(features) => features.contains(Features::MINOR_SHMEM),
            Err(refused) => refused.transient().map_or(Ok(false), Err)?,
        };
        let mode = if minor { RegisterMode::MINOR } else { RegisterMode::MISSING };
        Ok(Self { _read_only: read_only, all, mode })
    }

    /// Changes nothing: the request fails for every process that has a stack.
    fn attempt(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: for memory of this process the kernel refuses, because the first page of the range
        // cannot become writable; so no page of this process becomes missing.
        #[expect(unsafe_code, reason = "registers memory of another process at most")]
        unsafe {
            register(fd, self.all, self.mode)
        }
    }
}

impl Probe {
    fn new() -> Result<Self, Errno> {
        let mut probe = Self {
            below: growing()?,
            generation: ForkGeneration::current(),
            moves: false,
            registration: OnceLock::new(),
            of_child: OnceLock::new(),
        };
        probe.moves = match probe.move_of_this_process() {
            Err(errno) if errno.is_transient() => return Err(errno),
            // Without a userfaultfd, the second request is left.
            answer => answer == Err(Errno::ENOENT),
        };
        Ok(probe)
    }

    /// The answer to the first request, for a new userfaultfd of this process.
    fn move_of_this_process(&self) -> Result<(), Errno> {
        let own = open_fd().map_err(|refused| refused.errno())?;
        handshake(&own.fd, Features::NONE)?;
        self.try_move(own.fd.as_fd())
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
        let registration = kept(&self.registration, Registration::new)?;
        Ok(registration.attempt(fd) == Err(Errno::EPERM))
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

    fn hole(&self) -> AddressRange {
        let page = PageSize::system();
        let start = self.below.start().addr().get() - 2 * page.bytes();
        AddressRange::new(start, page.bytes(), page).expect("a page")
    }
}

/// A page that grows downwards. Two pages below it are mapped first, because the kernel may have no more than
/// one page of free addresses at the place that it chooses; it keeps free addresses below such a page free.
fn growing() -> Result<OwnedMapping, Errno> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::from_bits_retain(MAP_GROWSDOWN);
    let bytes = NonZeroUsize::new(3 * PageSize::system().bytes()).expect("pages have bytes");
    OwnedMapping::anonymous(bytes, ProtFlags::PROT_NONE, flags)?.into_last(NonZeroUsize::MIN)
}

fn read_only() -> Result<OwnedMapping, Errno> {
    let memfd = memfd_create(c"pagestitch-probe", MFdFlags::MFD_CLOEXEC).map_err(Errno::of)?;
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let read_only =
        open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(Errno::of)?;
    let flags = MapFlags::MAP_SHARED;
    OwnedMapping::of_file_near(Some(low()), read_only.as_fd(), 0, page(), ProtFlags::PROT_READ, flags)
}

/// An address below the mappings of most programs. It is random, because another process with this
/// library has such a page, too.
fn low() -> NonZeroUsize {
    const PAGES: u64 = 1 << 18;
    let random = RandomState::new().build_hasher().finish() % (PAGES - 16);
    NonZeroUsize::new((16 + random as usize) * page().get()).expect("not the first page")
}

/// The addresses from `start` on, to the end of those that a process has. The stack is mapped at
/// this end.
fn from(start: usize) -> Result<AddressRange, Errno> {
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(Errno::of)?;
    let ends = maps.lines().filter(|line| !line.ends_with("[vsyscall]")).filter_map(|line| {
        let (_, rest) = line.split_once('-')?;
        usize::from_str_radix(rest.split_once(' ')?.0, 16).ok()
    });
    let end = ends.max().ok_or(Errno::EINVAL)?.next_power_of_two() - PageSize::system().bytes();
    AddressRange::new(start, end - start, PageSize::system()).ok_or(Errno::EINVAL)
}

const fn page() -> NonZeroUsize {
    // The kernel rounds it up if pages are larger.
    NonZeroUsize::new(4096).expect("not zero")
}

#[cfg(test)]
mod tests {
    use super::super::open::handshake;
    use super::*;
    use crate::fd_passing;
    use nix::sys::mman::{mmap_anonymous, munmap};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork, read, write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_question_leaves_memory_at_the_same_addresses_in_another_process_registered() {
        if open_fd().is_err() {
            println!("SKIPPED the_question_leaves_memory_at_the_same_addresses_registered: no userfaultfd");
            return;
        }
        let registration = Registration::new().unwrap();
        let at = registration.all.start();
        let (ours, theirs) = UnixStream::pair().unwrap();
        // SAFETY: the child has its own copy of this process's memory, and calls the kernel only.
        #[expect(unsafe_code, reason = "another process with memory at a given address")]
        let forked = unsafe { fork() }.unwrap();
        match forked {
            ForkResult::Child => {
                let code = i32::from(!stays_registered(at, &theirs).is_ok_and(|stays| stays));
                // SAFETY: ends the child.
                #[expect(unsafe_code, reason = "no destructor of the parent's runs in the child")]
                unsafe {
                    nix::libc::_exit(code)
                }
            }
            ForkResult::Parent { child } => {
                let (_, fds) = fd_passing::receive(&ours, &mut [0]).unwrap();
                assert_eq!(registration.attempt(fds[0].as_fd()), Err(Errno::EINVAL));
                write(&ours, &[0]).unwrap();
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }

    #[test]
    fn nothing_is_mapped_at_the_address_that_a_probe_takes_for_free_beside_a_gap_of_one_page() {
        // SAFETY: the child has its own copy of this process's memory, and ends below.
        #[expect(unsafe_code, reason = "a process in which no other thread maps memory")]
        let forked = unsafe { fork() }.unwrap();
        match forked {
            ForkResult::Child => {
                let code = i32::from(!leaves_a_hole_beside_a_gap().is_ok_and(|leaves| leaves));
                // SAFETY: ends the child.
                #[expect(unsafe_code, reason = "no destructor of the parent's runs in the child")]
                unsafe {
                    nix::libc::_exit(code)
                }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }

    /// The child: maps pages until they lie one below the other, because the kernel takes the highest gap
    /// that is large enough, and then makes a gap of one page among them.
    fn leaves_a_hole_beside_a_gap() -> Result<bool, Errno> {
        let mut pages = Vec::with_capacity(10_000);
        let start = |page: &OwnedMapping| page.start().addr().get();
        let size = PageSize::system().bytes();
        let is_stacked = |pages: &[OwnedMapping]| {
            let last = pages.last_chunk::<4>();
            last.is_some_and(|last| last.windows(2).all(|two| start(&two[0]) == start(&two[1]) + size))
        };
        while !(pages.len() > 100 && is_stacked(&pages)) && pages.len() < pages.capacity() {
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS;
            pages.push(OwnedMapping::anonymous(page(), ProtFlags::PROT_READ, flags)?);
        }
        drop(pages.remove(pages.len() - 3));
        let hole = Probe::new()?.hole().start();
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(Errno::of)?;
        let address = |hex: &str| usize::from_str_radix(hex, 16).expect("an address");
        let mut ranges = maps.lines().filter_map(|line| line.split_once(' ')?.0.split_once('-'));
        Ok(!ranges.any(|(start, end)| (address(start)..address(end)).contains(&hole)))
    }

    /// The child: registers a page at this address, and asks after the question of the parent
    /// whether the kernel still fills it.
    fn stays_registered(at: usize, parent: &UnixStream) -> Result<bool, Errno> {
        let range = AddressRange::new(at, PageSize::system().bytes(), PageSize::system()).expect("a page");
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_FIXED;
        // SAFETY: the parent has hidden the page from its child, so the child has nothing there.
        #[expect(unsafe_code, reason = "mmap at a given address")]
        let page = unsafe { mmap_anonymous(NonZeroUsize::new(at), page(), ProtFlags::all(), flags) }
            .map_err(Errno::of)?;
        let own = open_fd().map_err(|_| Errno::EPERM)?;
        handshake(&own.fd, Features::NONE).map_err(|_| Errno::EPERM)?;
        // SAFETY: no value is in the page, which was mapped above.
        #[expect(unsafe_code, reason = "registers the page of the test")]
        unsafe { register(own.fd.as_fd(), range, RegisterMode::MISSING) }?;
        fd_passing::send(parent, &[0], &[own.fd.as_fd()]).map_err(Errno::of)?;
        read(parent, &mut [0]).map_err(Errno::of)?;
        let bytes = vec![7; range.bytes()];
        let mut request = UffdioCopy::new(range, bytes.as_ptr().addr(), Waiters::Woken);
        // SAFETY: the kernel reads `bytes`, which live on, and fills the page of the test.
        #[expect(unsafe_code, reason = "an ioctl")]
        let answer = unsafe { abi::copy(own.fd.as_raw_fd(), &raw mut request) };
        // SAFETY: the page was mapped above, and no reference to it exists.
        #[expect(unsafe_code, reason = "munmap")]
        unsafe { munmap(page, range.bytes()) }.map_err(Errno::of)?;
        // ENOENT: it is not registered any more.
        Ok(answer.is_ok())
    }
}
