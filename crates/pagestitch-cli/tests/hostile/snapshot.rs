//! The memory of all guests of this test.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The memory of a guest: mostly zeros, so that it costs no disk.
pub(crate) const BYTES: usize = 16 << 30;
pub(crate) const PAGE: usize = 4096;
/// The pages with bytes, which the innocent guest touches.
pub(crate) const PAGES: usize = 3000;

/// The byte at an offset of the snapshot; never zero in a page with bytes.
pub(crate) const fn byte_at(at: usize) -> u8 {
    (at.wrapping_mul(31).wrapping_add(at >> 12) % 251) as u8 + 1
}

/// Writes the memory file.
pub(crate) fn write(path: &Path) {
    let memory = File::create(path).unwrap();
    memory.set_len(BYTES as u64).unwrap();
    let bytes: Vec<u8> = (0..PAGES * PAGE).map(byte_at).collect();
    memory.write_all_at(&bytes, 0).unwrap();
}

/// The bytes of the memory file that [`write`] has written.
pub(crate) fn filled(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE];
    File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
