//! The processor's cache: a hint that values are needed soon, so that they come from memory while the
//! thread does other work.

/// The bytes of a cache line.
pub const LINE: usize = 64;

/// Tells the processor that a value is needed soon. Does not wait for it, and changes nothing.
///
/// ```
/// let table = [7u64; 100];
/// pagestitch_kernel::cache::prefetch(&table);
/// ```
#[inline]
pub fn prefetch<T: ?Sized>(value: &T) {
    prefetch_lines((&raw const *value).cast(), size_of_val(value));
}

/// As [`prefetch`], for a value that may be gone: any address is allowed.
///
/// ```
/// let value = std::sync::Arc::new([7u64; 100]);
/// let weak = std::sync::Arc::downgrade(&value);
/// drop(value);
/// pagestitch_kernel::cache::prefetch_at(weak.as_ptr());
/// ```
#[inline]
pub fn prefetch_at<T>(address: *const T) {
    prefetch_lines(address.cast(), size_of::<T>());
}

#[inline]
fn prefetch_lines(start: *const i8, bytes: usize) {
    (0..bytes).step_by(LINE).for_each(|line| prefetch_line(start.wrapping_add(line)));
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
fn prefetch_line(address: *const i8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: the instruction accesses no memory that the program sees, and any address is allowed.
    #[expect(unsafe_code, reason = "an instruction of the processor")]
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address);
    }
}

/// Miri has no cache, and stable Rust has no such instruction of other processors.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline]
fn prefetch_line(_: *const i8) {}
