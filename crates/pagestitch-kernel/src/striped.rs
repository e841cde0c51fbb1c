//! One value for each of a few stripes, in cache lines of its own: threads that write at the same
//! time seldom write to the same line.
//!
//! The address of its control block decides a thread's stripe. That takes one load, no system call,
//! no lazily initialised storage and no allocation, so a signal handler may use it, and it has the
//! stripe of the thread that it interrupts. The address of the stack would not do, because the
//! alternate stacks of signal handlers lie side by side.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::OnceLock;
use std::thread::available_parallelism;

/// A value for each stripe.
#[derive(Debug)]
pub struct Striped<T> {
    /// Invariant: their number is a power of two.
    stripes: Box<[Stripe<T>]>,
}

/// A value in two cache lines of its own, because processors prefetch pairs of lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Stripe<T>(pub T);

impl<T> Deref for Stripe<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Default> Striped<T> {
    /// Default values: two for each CPU, so that the running threads mostly have stripes of their own,
    /// but at most `most`, and at most [`STRIPES`].
    #[must_use]
    pub fn new(most: usize) -> Self {
        let count = most.min(2 * cpus()).clamp(1, STRIPES);
        // Rounded up, which exceeds `most` by less than the next power of two.
        Self { stripes: (0..count.next_power_of_two()).map(|_| Stripe::default()).collect() }
    }
}

impl<T> Striped<T> {
    /// The value of the calling thread's stripe. Threads may share a stripe.
    #[must_use]
    pub fn local(&self) -> &T {
        &self.stripes[own_stripe(self.stripes.len())]
    }

    /// The values of all stripes.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.stripes.iter().map(Deref::deref)
    }
}

/// The number of CPUs that this process could use at the first call. Asked once, because the standard
/// library reads files of the cgroup for it, which takes longer than the build of a region.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| available_parallelism().map_or(STRIPES, NonZeroUsize::get))
}

/// The number of the calling thread's stripe, of so many stripes, which are a power of two and at most
/// [`STRIPES`].
#[must_use]
pub fn own_stripe(stripes: usize) -> usize {
    // The control blocks of threads lie at equal distances, in pages of their own. The product spreads
    // such addresses evenly over its upper bits.
    let mixed = (control_block() >> PAGE_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed >> (usize::BITS - STRIPES.ilog2()) & (stripes - 1)
}

/// The address of the calling thread's control block, which each thread of the C library has.
#[cfg(not(any(miri, shuttle)))]
fn control_block() -> usize {
    let address: usize;
    // SAFETY: the ABI of x86-64 has the address of the thread's control block at its start, where the
    // register fs points from the start of the thread on. The load changes nothing.
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "reads a register of the processor")]
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) address, options(pure, readonly, nostack, preserves_flags));
    }
    // SAFETY: the ABI of AArch64 has the address of the thread's control block in this register, which each
    // program may read. The read changes nothing.
    #[cfg(target_arch = "aarch64")]
    #[expect(unsafe_code, reason = "reads a register of the processor")]
    unsafe {
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) address, options(pure, nomem, nostack, preserves_flags));
    }
    address
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "pagestitch is written for x86-64 and AArch64: see `control_block` for what another one needs"
);

/// An address on the thread's stack, for model checkers, whose threads share a control block.
#[cfg(any(miri, shuttle))]
fn control_block() -> usize {
    let on_stack = 0_u8;
    (&raw const *std::hint::black_box(&on_stack)).addr()
}

/// The most stripes. With more CPUs than half of them, threads share stripes.
pub const STRIPES: usize = 64;
const PAGE_SHIFT: u32 = 12;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn no_count_of_a_stripe_is_lost() {
        let stripes = Striped::<AtomicUsize>::new(STRIPES);
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

    #[test]
    #[cfg_attr(miri, ignore = "Miri's stacks are not at the distances of threads")]
    fn sixteen_threads_share_few_stripes() {
        let barrier = Barrier::new(16);
        let own = || {
            barrier.wait();
            let own = own_stripe(STRIPES);
            // No thread ends before all have looked, because its control block would be used again.
            barrier.wait();
            own
        };
        let stripes: HashSet<usize> = thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(own)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(stripes.len() >= 8, "{stripes:?}");
    }

    #[test]
    fn stripes_are_limited() {
        assert_eq!(Striped::<u8>::new(0).iter().count(), 1);
        assert!(Striped::<u8>::new(3).iter().count() <= 4);
        assert!(Striped::<u8>::new(usize::MAX).iter().count() <= STRIPES);
    }
}
