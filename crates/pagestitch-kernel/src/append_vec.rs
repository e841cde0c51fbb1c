//! A vector to which values are appended while other threads read the ones before.
//!
//! An appended value never moves and never changes, so a slice of the values stays valid. The
//! capacity is fixed as long as the vector is shared: a full vector takes no more values, and its
//! owner makes a larger copy.

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, PoisonError};
use std::mem::{self, ManuallyDrop};
use std::ops::Deref;
use std::ptr::NonNull;
use std::{fmt, slice};

/// A vector that grows at its end, also while it is shared.
pub struct AppendVec<T> {
    /// Invariant: `len` initialised values begin here, in an allocation of a `Vec` with `capacity`.
    start: NonNull<T>,
    capacity: usize,
    len: AtomicUsize,
    /// Held while a value is appended to the shared vector.
    appending: Mutex<()>,
}

// SAFETY: the vector owns its values, as a `Vec` does.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl<T: Send> Send for AppendVec<T> {}
// SAFETY: a shared vector gives out shared references to its values, and takes values of other threads.
#[expect(unsafe_code, reason = "owns memory through a raw pointer")]
unsafe impl<T: Send + Sync> Sync for AppendVec<T> {}

impl<T> AppendVec<T> {
    /// A vector without values.
    #[must_use]
    pub fn new() -> Self {
        Self::from(Vec::new())
    }

    /// Appends a value to the shared vector. A full vector gives the value back.
    ///
    /// # Errors
    ///
    /// The value, if the vector is full.
    pub fn append(&self, value: T) -> Result<(), T> {
        let _alone = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let len = self.len.load(Ordering::Relaxed);
        if len == self.capacity {
            return Err(value);
        }
        // SAFETY: `len` is below the capacity, so the place is inside the allocation.
        #[expect(unsafe_code, reason = "a place behind the last value")]
        let place = unsafe { self.start.add(len) };
        // SAFETY: the place is behind the published values, so no reference to it exists. The lock keeps
        // other appending threads out.
        #[expect(unsafe_code, reason = "writes behind the last value")]
        unsafe {
            place.write(value);
        }
        self.len.store(len + 1, Ordering::Release);
        Ok(())
    }

    /// The number of values that can be appended while the vector is shared.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.capacity - self.len.load(Ordering::Relaxed)
    }

    /// Changes the values as those of a `Vec`.
    pub fn edit<R>(&mut self, edit: impl FnOnce(&mut Vec<T>) -> R) -> R {
        let mut vec = Vec::from(mem::take(self));
        let result = edit(&mut vec);
        *self = Self::from(vec);
        result
    }
}

impl<T: Clone> AppendVec<T> {
    /// A copy with room for at least `more` more values.
    #[must_use]
    pub fn copy_with_room(&self, more: usize) -> Self {
        let mut copy = Vec::with_capacity(self.len().saturating_add(more));
        copy.extend_from_slice(self);
        Self::from(copy)
    }
}

impl<T> Default for AppendVec<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> From<Vec<T>> for AppendVec<T> {
    fn from(vec: Vec<T>) -> Self {
        let mut vec = ManuallyDrop::new(vec);
        let start = NonNull::new(vec.as_mut_ptr()).expect("a vector's pointer is not null");
        let (capacity, len) = (vec.capacity(), AtomicUsize::new(vec.len()));
        Self { start, capacity, len, appending: Mutex::new(()) }
    }
}

impl<T> From<AppendVec<T>> for Vec<T> {
    fn from(vec: AppendVec<T>) -> Self {
        let mut vec = ManuallyDrop::new(vec);
        let len = vec.len.load(Ordering::Acquire);
        // SAFETY: by the invariant, the allocation and its values are those of a `Vec`. The drop that
        // would free them does not run.
        #[expect(unsafe_code, reason = "gives an allocation back to a vector")]
        let values = unsafe { Self::from_raw_parts(vec.start.as_ptr(), len, vec.capacity) };
        // SAFETY: the mutex is dropped once, because the drop of its owner does not run.
        #[expect(unsafe_code, reason = "drops a field")]
        unsafe {
            std::ptr::drop_in_place(&raw mut vec.appending);
        }
        values
    }
}

impl<T> Deref for AppendVec<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        let len = self.len.load(Ordering::Acquire);
        // SAFETY: by the invariant these are `len` initialised values, which live as long as `self`
        // and are not written any more.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        unsafe {
            slice::from_raw_parts(self.start.as_ptr(), len)
        }
    }
}

impl<T> Drop for AppendVec<T> {
    fn drop(&mut self) {
        let len = self.len.load(Ordering::Acquire);
        // SAFETY: by the invariant, the allocation and its values are those of a `Vec`, and this is
        // their one drop.
        #[expect(unsafe_code, reason = "gives an allocation back to a vector")]
        drop(unsafe { Vec::from_raw_parts(self.start.as_ptr(), len, self.capacity) });
    }
}

impl<T: fmt::Debug> fmt::Debug for AppendVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn a_full_vector_gives_the_value_back_and_a_copy_takes_it() {
        let mut vec = AppendVec::new();
        vec.edit(|values| values.extend((0..5).map(Arc::new)));
        vec.edit(Vec::shrink_to_fit);
        assert_eq!(vec.spare(), 0);
        let value = vec.append(Arc::new(5)).unwrap_err();
        let copy = vec.copy_with_room(1);
        assert!(copy.append(Arc::clone(&value)).is_ok());
        assert_eq!(copy.iter().map(|value| **value).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        drop((vec, copy));
        assert_eq!(Arc::strong_count(&value), 1, "each value is dropped once");
    }

    #[test]
    fn readers_see_whole_values_in_order() {
        let values = if cfg!(miri) { 50 } else { 5_000 };
        let vec = AppendVec::<Box<usize>>::new().copy_with_room(values);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while vec.len() < values {
                        let seen: &[Box<usize>] = &vec;
                        assert!(seen.iter().enumerate().rev().take(10).all(|(at, value)| at == **value));
                    }
                });
            }
            (0..values).for_each(|value| vec.append(Box::new(value)).unwrap());
        });
        assert!(vec.append(Box::new(0)).is_err() || vec.len() > values);
    }
}
