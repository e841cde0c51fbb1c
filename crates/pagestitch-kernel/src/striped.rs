//! A value for each of a few stripes, in cache lines of their own: threads that write at the same time seldom meet.
//!
//! Which stripe a thread is in, its stack decides, which needs no system call, no thread-local and no allocation: a signal
//! handler may ask.

use crate::sync::atomic::AtomicUsize;
use std::hint::black_box;

/// Eight values, each in cache lines of its own.
#[derive(Debug, Default)]
pub struct Striped<T> {
    stripes: [Stripe<T>; STRIPES],
}

/// As far apart as processors prefetch: two lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe<T>(T);

impl Striped<AtomicUsize> {
    /// Zeros.
    pub(crate) const fn zero() -> Self {
        Self { stripes: [const { Stripe(AtomicUsize::new(0)) }; STRIPES] }
    }
}

impl<T> Striped<T> {
    /// The calling thread's. Another thread may have the same one, and the same thread another in another moment.
    #[must_use]
    pub fn local(&self) -> &T {
        let on_stack = 0_u8;
        let address = (&raw const *black_box(&on_stack)).addr();
        // Stacks are megabytes apart; a handler on an alternate stack is in another stripe, which does no harm.
        let mixed =
            (address >> STACK_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (usize::BITS - STRIPES.ilog2());
        &self.stripes[mixed].0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.stripes.iter().map(|stripe| &stripe.0)
    }
}

const STRIPES: usize = 8;
/// Below the distance of two threads' stacks, above the depth of most.
const STACK_SHIFT: u32 = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use std::thread;

    #[test]
    fn nothing_that_is_counted_is_lost() {
        let stripes = Striped::zero();
        let times = if cfg!(miri) { 20 } else { 1000 };
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for _ in 0..times {
                        stripes.local().fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(stripes.iter().map(|stripe| stripe.load(Ordering::Relaxed)).sum::<usize>(), 16 * times);
    }
}
