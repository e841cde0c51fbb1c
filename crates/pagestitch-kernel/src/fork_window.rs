//! The moment after a `fork(2)` in which only the server has the child's userfaultfd.
//!
//! ```text
//!   server   enter ── read the event ── keep the userfaultfd open in the child ── leave
//!                         │
//!   child                 └▶ runs: fork(2) returns here, unless it waits until the server has left
//! ```
//!
//! The kernel lets a child run once its event is read. If the server ends before it has put the
//! child's userfaultfd into an [`FdQueue`](crate::fd_queue::FdQueue), the kernel closes the
//! userfaultfd, and pages that the child lacks read as zeros. So the child waits in the functions
//! that the C library calls around `fork(2)` ([`ranges`](crate::ranges)), and closes its range if
//! the server has ended.
//!
//! The state is in memory that children share: a few words, each for one thread of the server, odd
//! while the thread is inside. A child waits until each word that it has found odd has changed, so a
//! thread that enters again and again makes no child wait forever.

use crate::errno::Errno;
use crate::fork::ForkGeneration;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::stat::fstat;
use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// The threads of a server that have read the event of a child and not kept its userfaultfd yet.
pub struct ForkWindow {
    /// Invariant: a shared mapping of its own for these words, unmapped by the drop alone.
    words: NonNull<[AtomicU32; THREADS]>,
    /// A pidfd of the server. Without it, a child cannot tell that the server has ended.
    server: Option<Server>,
}

struct Server {
    pidfd: OwnedFd,
    /// Its file. A child that closes unknown descriptors has none, or another one, at this number.
    file: (u64, u64),
}

// SAFETY: the words are atomics, in a mapping that lives as long as the window.
#[expect(unsafe_code, reason = "shared words behind a pointer")]
unsafe impl Send for ForkWindow {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "shared words behind a pointer")]
unsafe impl Sync for ForkWindow {}

impl ForkWindow {
    /// A window that no thread is in, of the process of this pidfd. Without one, no child waits.
    ///
    /// # Errors
    ///
    /// The errno of `mmap(2)`.
    pub fn new(server: Option<OwnedFd>) -> Result<Self, Errno> {
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: the kernel chooses the address of a new mapping, which replaces no other.
        #[expect(unsafe_code, reason = "mmap")]
        let words = unsafe { mmap_anonymous(None, BYTES, protection, flags) };
        let words = words.map_err(Errno::of)?.cast();
        let server = server.and_then(|pidfd| file_of(&pidfd).map(|file| Server { pidfd, file }));
        Ok(Self { words, server })
    }

    /// Enters the window until the answer is dropped. Takes no lock and allocates nothing, because a
    /// forking thread may hold the allocator.
    pub fn enter(&self) -> InWindow<'_> {
        let take = |word: &&AtomicU32| {
            let state = word.load(Ordering::SeqCst);
            let free = !is_inside(state);
            free && word.compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        InWindow { word: self.words().iter().find(take), entered_in: ForkGeneration::current() }
    }

    /// True if the server has ended. False in a child that has closed the inherited pidfd.
    #[must_use]
    pub fn server_has_ended(&self) -> bool {
        self.observe(PollTimeout::ZERO) == Some(true)
    }

    /// Waits, in a child, until the threads that are inside now have left. False if the server has
    /// ended before.
    pub(crate) fn wait(&self) -> bool {
        self.words().iter().all(|word| self.wait_for(word, word.load(Ordering::SeqCst)))
    }

    /// Waits until a word changes, if a thread is inside. False if the server has ended before.
    fn wait_for(&self, word: &AtomicU32, state: u32) -> bool {
        let is_over = || !is_inside(state) || word.load(Ordering::SeqCst) != state;
        for look in 0.. {
            if is_over() {
                break;
            }
            match self.observe(if look < LOOKS { PollTimeout::ZERO } else { PollTimeout::from(1u8) }) {
                Some(false) => thread::yield_now(),
                // It may have left before its end.
                Some(true) => return is_over(),
                // A wait might last forever.
                None => break,
            }
        }
        true
    }

    /// True if the server ends within some time; `None` if this process cannot tell.
    fn observe(&self, timeout: PollTimeout) -> Option<bool> {
        let Server { pidfd, file } = self.server.as_ref()?;
        if file_of(pidfd) != Some(*file) {
            return None;
        }
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let answered = poll(&mut polled, timeout).is_ok_and(|answered| answered > 0);
        Some(answered && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)))
    }

    fn words(&self) -> &[AtomicU32; THREADS] {
        // SAFETY: the mapping has these words, which are atomics, and lives as long as `self`.
        #[expect(unsafe_code, reason = "words of an owned mapping")]
        unsafe {
            self.words.as_ref()
        }
    }
}

impl Drop for ForkWindow {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned, and the borrow checker has ended all references to it.
        #[expect(unsafe_code, reason = "munmap")]
        let _ = unsafe { munmap(self.words.cast(), BYTES.get()) };
    }
}

impl fmt::Debug for ForkWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForkWindow").field("words", self.words()).finish_non_exhaustive()
    }
}

/// A thread inside the window, until the drop.
#[derive(Debug)]
pub struct InWindow<'w> {
    /// `None` if the window has more threads than words: a child waits for the others only.
    word: Option<&'w AtomicU32>,
    /// A child that is forked by this thread, in a signal handler, inherits the value.
    entered_in: ForkGeneration,
}

impl Drop for InWindow<'_> {
    fn drop(&mut self) {
        if let Some(word) = self.word.filter(|_| self.entered_in.is_current()) {
            word.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Device and inode of a descriptor's file. Before Linux 6.9 all pidfds have the same, as files of a few
/// other kinds. `None` if the descriptor is closed.
fn file_of(fd: &OwnedFd) -> Option<(u64, u64)> {
    fstat(fd).ok().map(|file| (file.st_dev, file.st_ino))
}

const fn is_inside(state: u32) -> bool {
    state % 2 == 1
}

/// The most threads that read events of one region and its children at once: the fork reader, the
/// watchdog, and those that end a region or a child.
const THREADS: usize = 8;
const BYTES: NonZeroUsize = NonZeroUsize::new(size_of::<[AtomicU32; THREADS]>()).expect("words have bytes");
/// How often a child looks before it sleeps for a millisecond between two looks.
const LOOKS: usize = 100;

#[cfg(all(test, not(any(miri, shuttle))))]
mod tests {
    use super::*;
    use crate::process::Process;
    use std::process::{Child, Command};
    use std::sync::atomic::AtomicBool;

    /// A window of a process that lives until it is killed.
    fn window() -> (ForkWindow, Child) {
        let server = Command::new("sleep").arg("600").spawn().unwrap();
        let fd = Process::open(server.id()).unwrap().into_fd();
        (ForkWindow::new(Some(fd)).unwrap(), server)
    }

    fn end(mut server: Child) {
        server.kill().unwrap();
        server.wait().unwrap();
    }

    #[test]
    fn a_child_waits_for_each_thread_that_is_inside_and_for_no_later_one() {
        let (window, server) = window();
        assert!(window.wait() && !window.server_has_ended());
        let (inside, waits) = ([window.enter(), window.enter()], AtomicBool::new(true));
        thread::scope(|scope| {
            let child = scope.spawn(|| {
                let left = window.words()[..2].iter().all(|word| window.wait_for(word, 1));
                waits.store(false, Ordering::SeqCst);
                left
            });
            let [first, second] = inside;
            drop(first);
            let later = window.enter();
            assert!(waits.load(Ordering::SeqCst), "one of the first two is inside");
            drop(second);
            assert!(child.join().unwrap());
            drop(later);
        });
        end(server);
        assert!(window.server_has_ended() && window.wait(), "it left before its end");
    }

    #[test]
    fn a_child_waits_until_a_server_that_is_inside_ends() {
        let (window, server) = window();
        let inside = window.enter();
        thread::scope(|scope| {
            let child = scope.spawn(|| window.wait());
            end(server);
            assert!(!child.join().unwrap());
        });
        drop(inside);
    }

    #[test]
    fn no_child_waits_for_a_server_whose_end_it_cannot_see_or_for_one_thread_too_many() {
        let window = ForkWindow::new(None).unwrap();
        let inside = window.enter();
        assert!(window.wait() && !window.server_has_ended());
        let many: Vec<_> = (0..2 * THREADS).map(|_| window.enter()).collect();
        assert_eq!(many.iter().filter(|inside| inside.word.is_some()).count(), THREADS - 1);
        drop((inside, many));
        assert!(window.words().iter().all(|word| word.load(Ordering::SeqCst) == 2));
    }
}
