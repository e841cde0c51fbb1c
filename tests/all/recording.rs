//! What was touched in one run is there in the next.

use crate::until;
use pagestitch::{Chunk, ErrorKind, Inline, Manual, Pool, Recording, Region};
use pagestitch_testkit::scripted::{Scripted, byte_at};
use std::fs;
use std::sync::Arc;

const PAGE: usize = 4096;

fn builder(source: &Arc<Scripted>) -> pagestitch::Builder {
    Region::builder().name("twice").chunk(Chunk::source(Arc::clone(source)))
}

/// Pages in an order that no readahead follows.
fn touched() -> Vec<usize> {
    (0..300).map(|i| i * 7919 % 2000).collect()
}

fn recording(pool: &Pool) -> Recording {
    let source = Arc::new(Scripted::new(2000 * PAGE as u64));
    let region = builder(&source).record().build(pool).unwrap();
    for page in touched() {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    let recording = region.recording().unwrap();
    assert_eq!(region.close().pages_installed(), 300, "nothing is filled ahead");
    recording
}

#[test]
fn pages_of_a_recording_are_there_before_anybody_asks() {
    let pool = Pool::new().unwrap();
    let recorded = recording(&pool);
    let order: Vec<u64> = touched().into_iter().map(|page| (page * PAGE) as u64).collect();
    assert_eq!(recorded.offsets().collect::<Vec<_>>(), order);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("first.touches");
    recorded.write(&path).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 300 * 4, "compact");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    let read = Recording::read(&path).unwrap();
    assert_eq!(read, recorded);

    let source = Arc::new(Scripted::new(2000 * PAGE as u64));
    let region = builder(&source).replay(&read).build(&pool).unwrap();
    until(|| region.metrics().pages_installed() == 300);
    for page in touched() {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    let metrics = region.close();
    assert_eq!((metrics.faults, metrics.pages_ahead), (0, 300));
}

#[test]
fn a_loop_of_ones_own_replays_too_and_a_source_that_fails_loses_nothing() {
    let mut manual = Manual::new().unwrap();
    let recorded = recording(&Pool::new().unwrap());
    let bad = 7919 % 2000 * PAGE as u64;
    let source = Arc::new(Scripted::new(2000 * PAGE as u64).failing(bad..bad + 1));
    let region = builder(&source).replay(&recorded).build(&manual).unwrap();
    while manual.serve_ready(1000) > 0 || region.metrics().pages_installed() < 299 {}
    assert_eq!(region.metrics().pages_installed(), 299);
    assert!(region.failures().is_empty(), "nobody has asked for it");
    source.mend();
    region.populate(..).unwrap();
}

#[test]
fn a_recording_of_something_else_is_refused_by_name() {
    let pool = Pool::new().unwrap();
    let recorded = recording(&pool);
    let other = || Region::builder().name("other").chunk(vec![1; 5 * PAGE]).replay(&recorded);
    let error = other().build(&pool).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadOption);
    let expected =
        "region other: the recording is of a region of 8192000 bytes in pages of 4 KiB, and this has 20480";
    assert!(error.to_string().starts_with(expected), "{error}");
    let error = Region::builder().chunk(vec![1; 10]).record().build(Inline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotInline);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    assert!(Recording::read(&path).unwrap_err().to_string().contains("cannot read"));
    fs::write(&path, "something else").unwrap();
    assert!(Recording::read(&path).unwrap_err().to_string().ends_with("is no recording of first touches"));
    recorded.write(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(Recording::read(&path).unwrap_err().to_string().contains("is damaged or cut short"));
    assert!(recorded.write(folder.path().join("no/folder")).is_err());
    assert!(Region::builder().chunk(vec![1; 10]).build(&pool).unwrap().recording().is_none());
}
