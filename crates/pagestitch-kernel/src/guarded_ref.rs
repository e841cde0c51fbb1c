//! A reference to a value that ends while its guard is dropped.
//!
//! The type system takes a `&T` in an argument as valid until the function returns. A guard passed to
//! `drop` gives its value up earlier: the thread that waited for it frees or changes the value
//! meanwhile. So guards hold a pointer, as those of the standard library do.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// A reference that its guard keeps valid.
pub(crate) struct GuardedRef<'v, T: ?Sized> {
    value: NonNull<T>,
    borrow: PhantomData<&'v T>,
}

// SAFETY: it shares a `&T`, which may be sent if threads may share T.
#[expect(unsafe_code, reason = "a pointer in the place of a reference")]
unsafe impl<T: ?Sized + Sync> Send for GuardedRef<'_, T> {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a pointer in the place of a reference")]
unsafe impl<T: ?Sized + Sync> Sync for GuardedRef<'_, T> {}

impl<'v, T: ?Sized> GuardedRef<'v, T> {
    pub(crate) fn new(value: &'v T) -> Self {
        Self { value: NonNull::from(value), borrow: PhantomData }
    }

    /// The value.
    ///
    /// # Safety
    ///
    /// - The guard that holds this reference is not being dropped.
    #[expect(unsafe_code, reason = "a pointer in the place of a reference")]
    pub(crate) const unsafe fn get(&self) -> &T {
        // SAFETY: the pointer came from a reference, and its guard keeps the value as it was.
        unsafe { self.value.as_ref() }
    }
}

impl<T: ?Sized> fmt::Debug for GuardedRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedRef").finish_non_exhaustive()
    }
}
