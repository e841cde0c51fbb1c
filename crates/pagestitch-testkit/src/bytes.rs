//! Megabytes of known bytes, made and compared in one call each: in the workspace's own tests this crate is optimised, and a
//! test's loop over bytes is not.

/// Bytes that are never zero and differ for each seed, so that a test sees zeros, and bytes of
/// another page, as wrong. A shorter pattern of a seed is the start of a longer one.
///
/// ```
/// use pagestitch_testkit::bytes::pattern;
///
/// assert!(pattern(1, 10_000).iter().all(|&byte| byte != 0));
/// assert_eq!(pattern(1, 13), pattern(1, 10_000)[..13]);
/// assert_ne!(pattern(1, 13), pattern(2, 13));
/// ```
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_mut(size_of::<u64>()) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&(state | 0x0101_0101_0101_0101).to_le_bytes()[..word.len()]);
    }
    bytes
}

/// The number of bytes that differ from the expected ones. A missing byte differs.
///
/// ```
/// use pagestitch_testkit::bytes::differing;
///
/// assert_eq!(differing(b"pages", b"paged"), 1);
/// assert_eq!(differing(b"pag", b"paged"), 2);
/// ```
#[must_use]
pub fn differing(found: &[u8], expected: &[u8]) -> usize {
    let missing = found.len().abs_diff(expected.len());
    found.iter().zip(expected).filter(|(found, expected)| found != expected).count() + missing
}
