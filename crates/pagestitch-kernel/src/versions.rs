//! A value whose later versions replace it while other threads read the earlier ones.
//!
//! A version lives as long as the cell, so that a reader needs no guard: a read is one load. The
//! cell suits values that are replaced seldom.

use crate::sync::atomic::{AtomicPtr, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// A value with all of its earlier versions. It dereferences to the latest one.
pub struct Versions<T> {
    /// Invariant: the value of the last entry of `kept`.
    latest: AtomicPtr<T>,
    /// Invariant: entries are removed only while the cell is borrowed mutably, and by its drop.
    kept: Mutex<Vec<Arc<T>>>,
}

impl<T> Versions<T> {
    /// A cell with its first version, which other cells may share.
    #[must_use]
    pub fn new(first: Arc<T>) -> Self {
        Self { latest: AtomicPtr::new(Arc::as_ptr(&first).cast_mut()), kept: Mutex::new(vec![first]) }
    }

    /// A share of the latest version.
    #[must_use]
    pub fn share(&self) -> Arc<T> {
        Arc::clone(self.kept().last().expect("a cell has a version"))
    }

    /// Makes a value the latest version. Readers of the earlier ones keep them.
    pub fn replace(&self, next: T) {
        let (next, mut kept) = (Arc::new(next), self.kept());
        let latest = Arc::as_ptr(&next).cast_mut();
        kept.push(next);
        self.latest.store(latest, Ordering::Release);
    }

    /// Changes the one version of a cell. Does nothing if there are earlier versions, or if another
    /// cell shares it.
    pub fn edit(&mut self, edit: impl FnOnce(&mut T)) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let [only] = kept.as_mut_slice() {
            if let Some(value) = Arc::get_mut(only) {
                edit(value);
            }
            self.latest.store(Arc::as_ptr(only).cast_mut(), Ordering::Release);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Arc<T>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Versions<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        let latest = self.latest.load(Ordering::Acquire);
        // SAFETY: by the invariants the pointer is to the value of an `Arc` that the cell keeps, as
        // long as it is borrowed.
        #[expect(unsafe_code, reason = "a value behind a pointer")]
        unsafe {
            &*latest
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Versions<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Versions").field(&**self).finish()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn an_earlier_version_stays_while_later_ones_replace_it() {
        let mut cell = Versions::new(Arc::new(vec![0; 10]));
        cell.edit(|value| value.push(0));
        let (first, done) = (&*cell, AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let seen: &Vec<i32> = &cell;
                    assert!(seen.iter().all(|value| value == &seen[0]));
                }
            });
            (1..100).for_each(|version| cell.replace(vec![version; 11]));
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!((first, &*cell), (&vec![0; 11], &vec![99; 11]));
        cell.edit(|_| panic!("there are earlier versions"));
    }
}
