//! A value that writers replace while readers look at it. A reader never waits, so a signal handler
//! may read.
//!
//! A reader counts itself under the parity of the current epoch before it loads the value. A writer
//! swaps the value, ends the epoch, and waits until the readers of that epoch have left. Only they
//! may look at the old value, which the writer then frees.

use crate::guarded_ref::GuardedRef;
use crate::striped::{STRIPES, Stripe, own_stripe};
use crate::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, yield_now};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::PoisonError;

/// A cell with a value that is replaced as a whole, or without one.
pub struct Rcu<T> {
    value: AtomicPtr<T>,
    epoch: AtomicUsize,
    /// The active readers, by the parity of the epoch in which they began.
    readers: [Readers; 2],
    writer: Mutex<()>,
    owns: PhantomData<T>,
}

/// The active readers in each stripe, so that readers write to no line of each other.
type Readers = [Stripe<AtomicUsize>; STRIPES];

const fn no_readers() -> Readers {
    [const { Stripe(AtomicUsize::new(0)) }; STRIPES]
}

/// The value at the moment of the read. It lives as long as this guard.
pub struct ReadGuard<'p, T> {
    value: Option<GuardedRef<'p, T>>,
    readers: &'p AtomicUsize,
}

/// The right to replace the value. One thread has it at a time.
pub struct Writer<'p, T> {
    rcu: &'p Rcu<T>,
    _alone: MutexGuard<'p, ()>,
}

impl<T: Send + Sync> Rcu<T> {
    /// A cell without a value.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            value: AtomicPtr::new(ptr::null_mut()),
            epoch: AtomicUsize::new(0),
            readers: [const { no_readers() }; 2],
            writer: Mutex::new(()),
            owns: PhantomData,
        }
    }

    /// The current value. Takes no lock and allocates nothing.
    pub fn read(&self) -> ReadGuard<'_, T> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let readers = &*self.readers[epoch % 2][own_stripe(STRIPES)];
            readers.fetch_add(1, Ordering::SeqCst);
            let mut seen = ReadGuard { value: None, readers };
            // The epoch has not ended since this reader counted itself, so the writer that ends it
            // waits for this reader.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                let value = self.value.load(Ordering::SeqCst);
                // SAFETY: the pointer is null, or `publish` has stored it. The writer that replaces
                // it frees it only after the readers of this epoch have left, and this reader is
                // one of them.
                #[expect(unsafe_code, reason = "a value behind a pointer")]
                let value = unsafe { value.as_ref() };
                seen.value = value.map(GuardedRef::new);
                return seen;
            }
        }
    }

    /// Waits for the right to replace the value.
    pub fn write(&self) -> Writer<'_, T> {
        Writer { rcu: self, _alone: self.writer.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl<T: Send + Sync> Writer<'_, T> {
    /// The current value.
    #[must_use]
    pub fn current(&self) -> Option<&T> {
        let value = self.rcu.value.load(Ordering::SeqCst);
        // SAFETY: the pointer is null, or `publish` has stored it. Only a writer frees it, and this
        // is the only writer.
        #[expect(unsafe_code, reason = "a value behind a pointer")]
        unsafe {
            value.as_ref()
        }
    }

    /// Replaces the value, and waits until no reader looks at the old one.
    pub fn publish(&mut self, value: T) {
        let Rcu { value: place, epoch, readers, .. } = self.rcu;
        let old = place.swap(Box::into_raw(Box::new(value)), Ordering::SeqCst);
        let ended = epoch.fetch_add(1, Ordering::SeqCst);
        while readers[ended % 2].iter().any(|readers| readers.load(Ordering::SeqCst) > 0) {
            // A reader in a signal handler takes microseconds, or the time of a write to a file.
            yield_now();
        }
        if !old.is_null() {
            // SAFETY: the pointer came from Box::into_raw. The readers that had it have left, and
            // later ones have the new value.
            #[expect(unsafe_code, reason = "frees a value behind a pointer")]
            drop(unsafe { Box::from_raw(old) });
        }
    }

    /// Resets the cell after a fork, in the child. The value may describe mappings that the child
    /// lacks, and the counts of readers whose threads the child lacks would block writers. Leaks
    /// the old value.
    ///
    /// # Safety
    ///
    /// - No thread of this process holds a [`ReadGuard`] of this cell.
    #[expect(unsafe_code, reason = "the counts of readers are lost")]
    pub unsafe fn reset_in_child(&mut self) {
        self.rcu.value.store(ptr::null_mut(), Ordering::SeqCst);
        self.rcu.readers.iter().flatten().for_each(|readers| readers.store(0, Ordering::SeqCst));
    }
}

impl<T> ReadGuard<'_, T> {
    /// The value, if the cell had one.
    #[must_use]
    pub fn value(&self) -> Option<&T> {
        let value = self.value.as_ref()?;
        // SAFETY: this guard counts as a reader until its drop.
        #[expect(unsafe_code, reason = "reads through the pointer of a guard")]
        Some(unsafe { value.get() })
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        self.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<T> Drop for Rcu<T> {
    fn drop(&mut self) {
        let value = self.value.load(Ordering::SeqCst);
        if !value.is_null() {
            // SAFETY: the pointer came from Box::into_raw. A reader would borrow this cell, so
            // there is none.
            #[expect(unsafe_code, reason = "frees a value behind a pointer")]
            drop(unsafe { Box::from_raw(value) });
        }
    }
}

impl<T> fmt::Debug for Rcu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rcu").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for ReadGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadGuard").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Writer<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn readers_see_whole_values_and_each_is_freed_once() {
        let (rcu, done) = (Rcu::empty(), AtomicBool::new(false));
        assert!(rcu.read().value().is_none());
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while !done.load(Ordering::SeqCst) {
                        let seen = rcu.read();
                        let [first, second] = seen.value().copied().unwrap_or_default();
                        assert!(first == second && first >= last, "{first} {second} after {last}");
                        last = first;
                    }
                });
            }
            for value in 1..=if cfg!(miri) { 20 } else { 2_000 } {
                let mut writer = rcu.write();
                assert_eq!(writer.current().map_or(0, |now| now[0]), value - 1);
                writer.publish([value, value]);
            }
            done.store(true, Ordering::SeqCst);
        });
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::sync::model::explore;
    use shuttle::thread;
    use std::sync::Arc;

    /// Counts its drop.
    struct Live(Arc<AtomicUsize>);

    impl Drop for Live {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_value_with_a_reader_is_not_freed() {
        explore("an RCU cell", || {
            let rcu = Arc::new(Rcu::empty());
            let first = Arc::new(AtomicUsize::new(0));
            rcu.write().publish(Live(Arc::clone(&first)));
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let rcu = Arc::clone(&rcu);
                    thread::spawn(move || {
                        for _ in 0..2 {
                            let seen = rcu.read();
                            let freed = Arc::clone(&seen.value().expect("it was published before").0);
                            for _ in 0..3 {
                                assert_eq!(freed.load(Ordering::SeqCst), 0, "freed while a reader had it");
                            }
                            drop(seen);
                        }
                    })
                })
                .collect();
            for _ in 0..3 {
                rcu.write().publish(Live(Arc::default()));
            }
            assert_eq!(first.load(Ordering::SeqCst), 1, "freed once");
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
    }
}
