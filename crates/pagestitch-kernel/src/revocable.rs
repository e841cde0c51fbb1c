//! Borrowed bytes for threads that may outlive the borrow. The end of the borrow revokes them.
//!
//! A handler thread is `'static`, so it cannot hold a `&'env [u8]`, and a value that holds the
//! borrow can be leaked past its end. The thread holds a [`RevocableSlice`] instead: a pointer
//! behind [gates](Gate). The scope closes the gates as its last act, which waits for readers.
//! Afterwards [`RevocableSlice::read`] returns `None`.
//!
//! ```
//! use pagestitch_kernel::revocable;
//!
//! let data = vec![7u8; 100];
//! let kept = revocable::scope(|scope| {
//!     let lent = scope.lend(&data);
//!     assert_eq!(lent.read().unwrap()[0], 7);
//!     lent                                  // escapes, as a leaked value does
//! });
//! assert!(kept.read().is_none());           // and reads nothing
//! ```

use crate::gate::{Gate, GateGuard};
use crate::guarded_ref::GuardedRef;
use crate::striped::{STRIPES, Striped};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

/// Runs `body` with a scope that lends borrowed bytes, and revokes all of them before it returns or
/// unwinds.
///
/// The return waits for threads that hold a [`RevocableGuard`].
pub fn scope<'env, R>(body: impl for<'scope> FnOnce(&'scope RevocableScope<'scope, 'env>) -> R) -> R {
    let gates = Arc::new(Striped::new(STRIPES));
    let scope = RevocableScope { gates, scope: PhantomData, env: PhantomData };
    let _closes = CloseOnDrop(&scope.gates);
    body(&scope)
}

/// A scope that lends bytes which live at least as long as `'scope`. Made by [`scope`].
pub struct RevocableScope<'scope, 'env: 'scope> {
    gates: Gates,
    // Invariant in both lifetimes, as in std::thread::scope: 'scope can be neither shortened nor
    // stretched.
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

impl<'scope> RevocableScope<'scope, '_> {
    /// Lends `bytes` until the scope ends.
    #[must_use]
    pub fn lend(&'scope self, bytes: &'scope [u8]) -> RevocableSlice {
        RevocableSlice { bytes, gates: Arc::clone(&self.gates) }
    }
}

impl fmt::Debug for RevocableScope<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocableScope").field("ended", &is_closed(&self.gates)).finish()
    }
}

/// Lent bytes. Readable until the scope that has lent them ends.
#[derive(Clone)]
pub struct RevocableSlice {
    /// Invariant: while one of `gates` is open or has a guard, the bytes are valid for reads and no
    /// code writes to them.
    bytes: *const [u8],
    gates: Gates,
}

// SAFETY: the pointer serves reads of a `&[u8]` only, and that type is Send.
#[expect(unsafe_code, reason = "a raw pointer is what outlives the borrow")]
unsafe impl Send for RevocableSlice {}
// SAFETY: threads share reads of a `&[u8]` only, and by the field's invariant no code writes to the
// bytes meanwhile.
#[expect(unsafe_code, reason = "a raw pointer is what outlives the borrow")]
unsafe impl Sync for RevocableSlice {}

impl RevocableSlice {
    /// The bytes; `None` if their scope has ended. The scope does not end before the guard is
    /// dropped.
    #[must_use]
    pub fn read(&self) -> Option<RevocableGuard<'_>> {
        let guard = self.gates.local().enter()?;
        // SAFETY: the guard keeps `scope()` from returning, so the borrow of the bytes for 'scope
        // is still in force.
        #[expect(unsafe_code, reason = "the borrow's lifetime is replaced by the gate")]
        let bytes = unsafe { &*self.bytes };
        Some(RevocableGuard { bytes: GuardedRef::new(bytes), _guard: guard })
    }

    /// The number of lent bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if the lent slice is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for RevocableSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocableSlice")
            .field("len", &self.len())
            .field("ended", &is_closed(&self.gates))
            .finish()
    }
}

/// A read of lent bytes: derefs to them and keeps their scope from ending.
#[derive(Debug)]
pub struct RevocableGuard<'l> {
    bytes: GuardedRef<'l, [u8]>,
    _guard: GateGuard<'l>,
}

impl Deref for RevocableGuard<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: this guard holds the gate until its drop.
        #[expect(unsafe_code, reason = "reads through the pointer of a guard")]
        unsafe {
            self.bytes.get()
        }
    }
}

/// The gates of a scope, all open or all closed: one for each stripe of threads, so that reading
/// threads do not write to one line.
type Gates = Arc<Striped<Gate>>;

fn is_closed(gates: &Striped<Gate>) -> bool {
    gates.iter().any(Gate::is_closed)
}

struct CloseOnDrop<'g>(&'g Striped<Gate>);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(Gate::close);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn lent_bytes_are_revoked_at_the_end_of_the_scope() {
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
