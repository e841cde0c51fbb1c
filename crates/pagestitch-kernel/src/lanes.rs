//! A value for each of a few lanes, in cache lines of their own: threads that write at the same time seldom meet.
//!
//! Which lane a thread is in, its stack decides, which needs no system call, no thread-local and no allocation: a signal
//! handler may ask.

use crate::sync::atomic::AtomicUsize;
use std::hint::black_box;

/// Eight values, each in cache lines of its own.
#[derive(Debug, Default)]
pub struct Lanes<T> {
    lanes: [Lane<T>; LANES],
}

/// As far apart as processors prefetch: two lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Lane<T>(T);

impl Lanes<AtomicUsize> {
    /// Zeros.
    pub(crate) const fn zero() -> Self {
        Self { lanes: [const { Lane(AtomicUsize::new(0)) }; LANES] }
    }
}

impl<T> Lanes<T> {
    /// The calling thread's. Another thread may have the same one, and the same thread another in another moment.
    #[must_use]
    pub fn here(&self) -> &T {
        let on_stack = 0_u8;
        let address = (&raw const *black_box(&on_stack)).addr();
        // Stacks are megabytes apart; a handler on an alternate stack is in another lane, which does no harm.
        let mixed =
            (address >> STACK_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (usize::BITS - LANES.ilog2());
        &self.lanes[mixed].0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.lanes.iter().map(|lane| &lane.0)
    }
}

const LANES: usize = 8;
/// Below the distance of two threads' stacks, above the depth of most.
const STACK_SHIFT: u32 = 16;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use std::thread;

    #[test]
    fn nothing_that_is_counted_is_lost() {
        let lanes = Lanes::zero();
        let times = if cfg!(miri) { 20 } else { 1000 };
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for _ in 0..times {
                        lanes.here().fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(lanes.iter().map(|lane| lane.load(Ordering::Relaxed)).sum::<usize>(), 16 * times);
    }
}
