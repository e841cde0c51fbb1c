//! One value for each of a few stripes, in cache lines of its own: threads that write at the same
//! time seldom write to the same line.
//!
//! The address of its stack decides a thread's stripe. That takes no system call, no thread-local
//! storage and no allocation, so a signal handler may use it.

use crate::sync::atomic::AtomicUsize;
use std::hint::black_box;

/// Eight values, each in cache lines of its own.
#[derive(Debug, Default)]
pub struct Striped<T> {
    stripes: [Stripe<T>; STRIPES],
}

/// Two cache lines, because processors prefetch pairs of lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe<T>(T);

impl Striped<AtomicUsize> {
    /// Eight zeros.
    pub(crate) const fn zero() -> Self {
        Self { stripes: [const { Stripe(AtomicUsize::new(0)) }; STRIPES] }
    }
}

impl<T> Striped<T> {
    /// The value of the calling thread's stripe. Threads may share a stripe, and a thread may
    /// change its stripe from call to call.
    #[must_use]
    pub fn local(&self) -> &T {
        let on_stack = 0_u8;
        let address = (&raw const *black_box(&on_stack)).addr();
        // Stacks are megabytes apart. A signal handler on an alternate stack may use another stripe
        // than its thread, which is harmless.
        let mixed =
            (address >> STACK_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (usize::BITS - STRIPES.ilog2());
        &self.stripes[mixed].0
    }

    /// All eight values.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.stripes.iter().map(|stripe| &stripe.0)
    }
}

const STRIPES: usize = 8;
/// Smaller than the distance between two threads' stacks, larger than the depth of most stacks.
const STACK_SHIFT: u32 = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use std::thread;

    #[test]
    fn no_count_of_a_stripe_is_lost() {
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
