//! Each source of pagestitch passes the conformance suite of the testkit.

use crate::pattern;
use crate::wrappers::Prompt;
use pagestitch::Retry;
use pagestitch::source::{Cached, FileSource, Hole, Limited, Memory, Retrying};
use pagestitch_testkit::conformance::{check, check_fetch};
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
fn wrapped_sources_conform() {
    let bytes: Vec<u8> = (0..200_000).map(byte_at).collect();
    let source = Arc::new(Scripted::new(200_000));
    check(Arc::new(Retrying::new(Arc::clone(&source), Retry::times(2))), &bytes);
    check(Arc::new(Limited::new(Arc::clone(&source), 1)), &bytes);
    for (capacity, block) in [(0, 512), (100_000, 4096), (1 << 20, 65_536)] {
        check(Arc::new(Cached::new(Arc::clone(&source), capacity).block(block)), &bytes);
    }
    let limited = Limited::new(Retrying::new(source, Retry::times(2)), 2);
    check(Arc::new(Cached::new(limited, 1 << 20)), &bytes);
    check(Arc::new(Limited::new(Memory::from(bytes.clone()), 1)), &bytes);
}

#[test]
fn asynchronous_sources_and_their_wrappers_conform() {
    for granularity in [1, 16_384] {
        let bytes: Vec<u8> = (0..200_000).map(byte_at).collect();
        let prompt = || Prompt::new(200_000, granularity);
        check_fetch(Arc::new(prompt()), &bytes);
        check_fetch(Arc::new(Retrying::new(prompt(), Retry::times(2))), &bytes);
        check_fetch(Arc::new(Limited::new(prompt(), 1)), &bytes);
        for (capacity, block) in [(0, 512), (100_000, 4096), (1 << 20, 65_536)] {
            check_fetch(Arc::new(Cached::new(prompt(), capacity).block(block)), &bytes);
        }
        let limited = Limited::new(Retrying::new(prompt(), Retry::times(2)), 2);
        check_fetch(Arc::new(Cached::new(limited, 1 << 20)), &bytes);
    }
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
