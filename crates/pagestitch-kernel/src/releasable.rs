//! A value that threads read until it is released, without a lock.
//!
//! To read and to leave take one atomic operation each. A release never waits: it fails while a
//! reader is inside, and the reader's thread may release the value afterwards.
//!
//! ```
//! use pagestitch_kernel::releasable::{Releasable, Release};
//!
//! let value = Releasable::new(vec![7u8; 100]);
//! let reader = value.read().unwrap();
//! assert!(matches!(value.release(), Release::Busy));
//! assert_eq!(reader[0], 7);
//! drop(reader);
//! assert!(matches!(value.release(), Release::Done));
//! assert_eq!(value.take_released().unwrap().len(), 100);
//! assert!(value.read().is_none());
//! ```

use crate::guarded_ref::GuardedRef;
use crate::sync::atomic::{AtomicUsize, Ordering};
use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Deref;

/// A value until it is [released](Self::release).
pub struct Releasable<T> {
    /// The number of readers, plus [`RELEASED`] once the value is released, plus [`TAKEN`] once it is
    /// taken.
    readers: AtomicUsize,
    /// Invariant: no thread changes it while [`RELEASED`] is not set or a reader holds a guard that
    /// it got before. Afterwards only the thread that has set [`TAKEN`] accesses it.
    value: UnsafeCell<Option<T>>,
}

// SAFETY: several threads share `&T`, and one of them may take the value, which moves it there.
#[expect(unsafe_code, reason = "the cell is guarded by the count of readers")]
unsafe impl<T: Send + Sync> Sync for Releasable<T> {}

/// The answer to [`Releasable::release`].
#[derive(Debug)]
pub enum Release {
    /// No reader has the value, and none can get it.
    Done,
    /// A reader has the value. Nothing is changed.
    Busy,
    /// The value was released before.
    Before,
}

impl<T> Releasable<T> {
    /// A value that is not released.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self { readers: AtomicUsize::new(0), value: UnsafeCell::new(Some(value)) }
    }

    /// The value; `None` if it is released. It is not released before the guard is dropped.
    #[must_use]
    pub fn read(&self) -> Option<ReleasableGuard<'_, T>> {
        let before = self.readers.fetch_add(1, Ordering::SeqCst);
        // If the value is released, the drop of this guard takes the count back.
        let guard = ReadCount(&self.readers);
        if before & RELEASED != 0 {
            return None;
        }
        // SAFETY: a shared reference to the cell's value. The count of readers is above 0 and
        // RELEASED was not set before, so no thread writes to the value while the guard lives.
        #[expect(unsafe_code, reason = "shares the value of a cell")]
        let value = unsafe { &*self.value.get() };
        value.as_ref().map(|value| ReleasableGuard { value: GuardedRef::new(value), _guard: guard })
    }

    /// Lets no thread read the value any more, unless a thread reads it now. The value stays in place until
    /// [`take_released`](Self::take_released), or the drop.
    pub fn release(&self) -> Release {
        match self.readers.compare_exchange(0, RELEASED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Release::Done,
            Err(readers) if readers & RELEASED == 0 => Release::Busy,
            Err(_) => Release::Before,
        }
    }

    /// The value, once after [`release`](Self::release).
    pub fn take_released(&self) -> Option<T> {
        if self.readers.load(Ordering::SeqCst) & RELEASED == 0 {
            return None;
        }
        if self.readers.fetch_or(TAKEN, Ordering::SeqCst) & TAKEN != 0 {
            return None;
        }
        // SAFETY: the cell's value is written to. No reader was inside when RELEASED was set, later
        // readers see it and leave the cell alone, and only this thread has set TAKEN.
        #[expect(unsafe_code, reason = "takes the value of a cell")]
        unsafe {
            (*self.value.get()).take()
        }
    }

    /// True if the value is released.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.readers.load(Ordering::SeqCst) & RELEASED != 0
    }
}

impl<T> fmt::Debug for Releasable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Releasable").field("released", &self.is_released()).finish_non_exhaustive()
    }
}

/// A read of a value: derefs to it and keeps it from being released.
#[derive(Debug)]
pub struct ReleasableGuard<'r, T> {
    value: GuardedRef<'r, T>,
    _guard: ReadCount<'r>,
}

impl<T> Deref for ReleasableGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard counts as a reader until its drop.
        #[expect(unsafe_code, reason = "reads through the pointer of a guard")]
        unsafe {
            self.value.get()
        }
    }
}

#[derive(Debug)]
struct ReadCount<'r>(&'r AtomicUsize);

impl Drop for ReadCount<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

const RELEASED: usize = 1 << (usize::BITS - 1);
/// Set by the thread that takes a released value.
const TAKEN: usize = 1 << (usize::BITS - 2);

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn a_released_value_cannot_be_read_or_released_again() {
        let value = Releasable::new(String::from("bytes"));
        assert_eq!(value.read().as_deref().map(String::as_str), Some("bytes"));
        assert!(matches!(value.release(), Release::Done));
        assert!(value.take_released().is_some_and(|taken| taken == "bytes"));
        assert!(value.is_released() && value.read().is_none());
        assert!(matches!(value.release(), Release::Before));
    }

    #[test]
    fn a_value_is_freed_while_no_thread_reads_it() {
        // Miri takes long for each byte.
        let bytes = if cfg!(miri) { 2 } else { 64 };
        for _ in 0..if cfg!(miri) { 3 } else { 500 } {
            let (value, done) = (Releasable::new(vec![7u8; bytes]), AtomicBool::new(false));
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        while let Some(bytes) = value.read() {
                            assert!(!done.load(Ordering::SeqCst) && bytes.iter().all(|&byte| byte == 7));
                            drop(bytes);
                            thread::yield_now();
                        }
                    });
                }
                loop {
                    match value.release() {
                        Release::Done => {
                            done.store(true, Ordering::SeqCst);
                            break drop(value.take_released());
                        }
                        Release::Busy => thread::yield_now(),
                        Release::Before => panic!("only this thread releases"),
                    }
                }
            });
        }
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use crate::sync::model::{explore, explore_all};
    use shuttle::thread;
    use std::sync::Arc;

    /// Readers come and go while threads release the value: one of them takes it, and not before
    /// the readers have left.
    fn released_among(readers: usize, releases: usize) {
        let shared = Arc::new((Releasable::new(()), AtomicBool::new(false)));
        let taken = |value: &Releasable<()>| matches!(value.release(), Release::Done);
        let read = |shared: Arc<(Releasable<()>, AtomicBool)>| {
            move || {
                let seen = shared.0.read();
                assert!(seen.is_none() || !shared.1.load(Ordering::SeqCst), "released under a reader");
                false
            }
        };
        let release = |shared: Arc<(Releasable<()>, AtomicBool)>| {
            move || {
                let taken = taken(&shared.0);
                shared.1.fetch_or(taken, Ordering::SeqCst);
                taken
            }
        };
        let readers = (0..readers).map(|_| thread::spawn(read(Arc::clone(&shared))));
        let releases = (0..releases).map(|_| thread::spawn(release(Arc::clone(&shared))));
        let threads: Vec<_> = readers.chain(releases).collect();
        let takers = threads.into_iter().filter_map(|thread| thread.join().unwrap().then_some(())).count();
        assert_eq!(takers + usize::from(taken(&shared.0)), 1, "taken once");
        assert!(shared.0.read().is_none());
    }

    #[test]
    fn a_value_is_released_while_a_thread_reads_it() {
        explore_all("a releasable value with one reader", || released_among(1, 1));
    }

    #[test]
    fn two_threads_release_a_value_that_two_read() {
        explore("a releasable value with two readers", || released_among(2, 2));
    }
}
