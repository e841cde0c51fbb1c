//! Borrowed bytes for threads that may outlive the borrow: revoked, not merely forgotten, when it ends.
//!
//! A handler thread cannot hold a `&'env [u8]`: it is `'static`, and a value that holds the borrow can be leaked
//! past its end. So the thread holds a [`RevocableSlice`], which is a pointer behind a [`Gate`]; the lender's last act
//! is to close the gate, and that waits for whoever is reading. After it, [`RevocableSlice::read`] answers `None`.
//!
//! ```
//! use pagestitch_kernel::revocable;
//!
//! let data = vec![7u8; 100];
//! let kept = revocable::scope(|scope| {
//!     let lent = scope.lend(&data);
//!     assert_eq!(lent.read().unwrap()[0], 7);
//!     lent                                  // escapes, as a leak would let it
//! });
//! assert!(kept.read().is_none());           // and is of no use
//! ```

use crate::gate::{Gate, GateGuard};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

/// Runs `body` with a scope that lends borrowed bytes, and revokes all of them before it returns or unwinds.
///
/// Returning waits for readers that are inside [`RevocableSlice::read`] at that moment.
pub fn scope<'env, R>(body: impl for<'scope> FnOnce(&'scope RevocableScope<'scope, 'env>) -> R) -> R {
    let scope = RevocableScope { gate: Arc::new(Gate::new()), scope: PhantomData, env: PhantomData };
    let _closes = CloseOnDrop(&scope.gate);
    body(&scope)
}

/// Lends bytes that live at least as long as `'scope`. Made by [`scope`].
pub struct RevocableScope<'scope, 'env: 'scope> {
    gate: Arc<Gate>,
    // Invariant in both, as in std::thread::scope: 'scope may be neither shortened nor stretched.
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

impl<'scope> RevocableScope<'scope, '_> {
    /// Lends `bytes` until the scope ends.
    #[must_use]
    pub fn lend(&'scope self, bytes: &'scope [u8]) -> RevocableSlice {
        RevocableSlice { bytes, gate: Arc::clone(&self.gate) }
    }
}

impl fmt::Debug for RevocableScope<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocableScope").field("ended", &self.gate.is_closed()).finish()
    }
}

/// Bytes that were lent: they can be read until the scope that lent them ends.
#[derive(Clone)]
pub struct RevocableSlice {
    /// Invariant: valid for reads, and not written, as long as `gate` is open or has a visitor.
    bytes: *const [u8],
    gate: Arc<Gate>,
}

// SAFETY: the pointer is only read through, and only as a `&[u8]`, which is Send.
#[expect(unsafe_code, reason = "a raw pointer is what outlives the borrow")]
unsafe impl Send for RevocableSlice {}
// SAFETY: as above; shared reads of bytes that nobody writes.
#[expect(unsafe_code, reason = "a raw pointer is what outlives the borrow")]
unsafe impl Sync for RevocableSlice {}

impl RevocableSlice {
    /// The bytes, if their scope has not ended. It will not end before the guard is dropped.
    #[must_use]
    pub fn read(&self) -> Option<RevocableGuard<'_>> {
        let guard = self.gate.enter()?;
        // SAFETY: the guard keeps `scope()` from returning, so 'scope, for which the lender borrowed the bytes, goes on.
        #[expect(unsafe_code, reason = "the borrow's lifetime is replaced by the gate")]
        let bytes = unsafe { &*self.bytes };
        Some(RevocableGuard { bytes, _guard: guard })
    }

    /// How many bytes were lent.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether an empty slice was lent.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for RevocableSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocableSlice")
            .field("len", &self.len())
            .field("ended", &self.gate.is_closed())
            .finish()
    }
}

/// A read of lent bytes in progress: derefs to them and keeps their scope from ending.
#[derive(Debug)]
pub struct RevocableGuard<'l> {
    bytes: &'l [u8],
    _guard: GateGuard<'l>,
}

impl Deref for RevocableGuard<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

struct CloseOnDrop<'g>(&'g Gate);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn lent_bytes_are_gone_after_the_scope() {
        let data = [1u8, 2, 3];
        let kept = scope(|scope| {
            let lent = scope.lend(&data);
            assert_eq!(&*lent.read().expect("inside"), &[1, 2, 3]);
            lent
        });
        assert!(kept.read().is_none());
        assert_eq!(kept.len(), 3);
    }

    #[test]
    fn a_scope_that_unwinds_revokes_too() {
        let data = [1u8];
        let mut kept = None;
        let result = catch_unwind(AssertUnwindSafe(|| {
            scope(|scope| {
                kept = Some(scope.lend(&data));
                panic!("on purpose");
            })
        }));
        assert!(result.is_err());
        assert!(kept.expect("lent before the panic").read().is_none());
    }
}
