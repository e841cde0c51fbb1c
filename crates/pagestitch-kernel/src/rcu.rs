//! A value that writers replace, and that readers never wait for: a signal handler may read it.
//!
//! A reader counts itself in, under the epoch's parity, before it looks. A writer swaps the value, ends the epoch, and waits until
//! those have left who came in it: only they may look at the old value, which is freed then.

use crate::striped::Striped;
use crate::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, yield_now};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::PoisonError;

/// A value that is replaced as a whole, or nothing.
pub struct Rcu<T> {
    value: AtomicPtr<T>,
    epoch: AtomicUsize,
    /// Readers at work, by the parity of the epoch in which they began.
    readers: [Striped<AtomicUsize>; 2],
    writer: Mutex<()>,
    owns: PhantomData<T>,
}

/// What there was when a reader looked. It lives as long as this.
pub struct ReadGuard<'p, T> {
    value: Option<&'p T>,
    readers: &'p AtomicUsize,
}

/// The right to replace it, one thread's at a time.
pub struct Writer<'p, T> {
    rcu: &'p Rcu<T>,
    _alone: MutexGuard<'p, ()>,
}

impl<T: Send + Sync> Rcu<T> {
    /// Nothing, to begin with.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            value: AtomicPtr::new(ptr::null_mut()),
            epoch: AtomicUsize::new(0),
            readers: [Striped::zero(), Striped::zero()],
            writer: Mutex::new(()),
            owns: PhantomData,
        }
    }

    /// What there is. Takes no lock, and allocates nothing.
    pub fn read(&self) -> ReadGuard<'_, T> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let readers = self.readers[epoch % 2].local();
            readers.fetch_add(1, Ordering::SeqCst);
            let mut seen = ReadGuard { value: None, readers };
            // Seen before the epoch ends: whoever ends it waits for us.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                let value = self.value.load(Ordering::SeqCst);
                // SAFETY: null, or what `publish` has put there; it is freed only after this epoch's readers have left.
                #[expect(unsafe_code, reason = "a value behind a pointer")]
                let value = unsafe { value.as_ref() };
                seen.value = value;
                return seen;
            }
        }
    }

    /// Waits for its turn to replace it.
    pub fn write(&self) -> Writer<'_, T> {
        Writer { rcu: self, _alone: self.writer.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl<T: Send + Sync> Writer<'_, T> {
    /// What there is.
    #[must_use]
    pub fn current(&self) -> Option<&T> {
        let value = self.rcu.value.load(Ordering::SeqCst);
        // SAFETY: null, or what `publish` has put there; only a writer frees it, and there is no other.
        #[expect(unsafe_code, reason = "a value behind a pointer")]
        unsafe {
            value.as_ref()
        }
    }

    /// Replaces it, and waits until nobody looks at the old one.
    pub fn publish(&mut self, value: T) {
        let Rcu { value: place, epoch, readers, .. } = self.rcu;
        let old = place.swap(Box::into_raw(Box::new(value)), Ordering::SeqCst);
        let ended = epoch.fetch_add(1, Ordering::SeqCst);
        while readers[ended % 2].iter().any(|readers| readers.load(Ordering::SeqCst) > 0) {
            // A handler does not block: it is a matter of microseconds.
            yield_now();
        }
        if !old.is_null() {
            // SAFETY: it came from Box::into_raw, and whoever came after the swap has the new one.
            #[expect(unsafe_code, reason = "frees a value behind a pointer")]
            drop(unsafe { Box::from_raw(old) });
        }
    }

    /// In a forked child: what there was is not known to be true here, and whoever looked at it in the parent at that moment is not here,
    /// and would be waited for for ever. What there was is not freed.
    ///
    /// # Safety
    ///
    /// Nobody in this process is looking: there is no [`ReadGuard`] but those of threads that are not here.
    #[expect(unsafe_code, reason = "who is looking is not counted any more")]
    pub unsafe fn reset_in_child(&mut self) {
        self.rcu.value.store(ptr::null_mut(), Ordering::SeqCst);
        self.rcu
            .readers
            .iter()
            .flat_map(Striped::iter)
            .for_each(|readers| readers.store(0, Ordering::SeqCst));
    }
}

impl<T> ReadGuard<'_, T> {
    /// The value, or nothing.
    #[must_use]
    pub const fn value(&self) -> Option<&T> {
        self.value
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
            // SAFETY: it came from Box::into_raw, and nobody looks at it: that would borrow this.
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

    /// Says that it is gone when it is dropped.
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
                                assert_eq!(freed.load(Ordering::SeqCst), 0, "freed while it was looked at");
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
