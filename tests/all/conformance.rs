//! Each source of pagestitch passes the conformance suite of the testkit.

use crate::pattern;
use pagestitch::source::{FileSource, Hole, Memory};
use pagestitch_testkit::conformance::check;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use std::io::Write;
use std::sync::Arc;

#[test]
fn memory_conforms() {
    let bytes = pattern(1, 100_000);
    check(Arc::new(Memory::from(bytes.clone())), &bytes);
    check(Arc::new(Memory::new(bytes.clone())), &bytes);
}

#[test]
fn a_file_conforms() {
    let bytes = pattern(2, 100_000);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    check(Arc::new(FileSource::open(file.path()).unwrap()), &bytes);
}

#[test]
fn a_memfd_conforms() {
    let bytes = pattern(3, 100_000);
    check(Arc::new(crate::zero_copy::memfd(&bytes)), &bytes);
}

#[test]
fn a_hole_conforms() {
    check(Arc::new(Hole), &[0; 50_000]);
}

#[test]
fn a_scripted_source_conforms() {
    let bytes: Vec<u8> = (0..70_000).map(byte_at).collect();
    check(Arc::new(Scripted::new(70_000)), &bytes);
}

#[test]
#[should_panic(expected = "must fill all of the buffer")]
fn a_source_that_fills_half_does_not_conform() {
    struct Half;
    impl pagestitch::Source for Half {
        fn size(&self) -> u64 {
            100
        }
        fn read_at(&self, _offset: u64, into: &mut [u8]) -> std::io::Result<()> {
            let half = into.len() / 2;
            into[..half].fill(1);
            Ok(())
        }
    }
    check(Arc::new(Half), &[1; 100]);
}
