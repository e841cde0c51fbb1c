//! A region as the owner of its bytes, for APIs that take one; and its writes.

use crate::{PAGE, pattern};
use bytes::Bytes;
use pagestitch::source::{Memory, SharedFile};
use pagestitch::{
    AdoptedRegion, AnyRegion, Builder, Chunk, Error, ErrorKind, IntoChunk, Meter, Pool, Region, ScopedRegion,
    SharedRegion, Source,
};
use pagestitch_testkit::scripted::Scripted;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::thread;

const BYTES: usize = 5 * PAGE + 11;

/// Compiles if threads can share and exchange the type.
const fn shared<T: Send + Sync>() {}

const _: () = {
    shared::<Region>();
    shared::<SharedRegion>();
    shared::<AdoptedRegion>();
    shared::<AnyRegion>();
    shared::<ScopedRegion<'_>>();
    shared::<Builder>();
    shared::<Chunk>();
    shared::<Memory>();
    shared::<SharedFile>();
    shared::<Arc<dyn Source>>();
    shared::<Pool>();
    shared::<Meter>();
    shared::<Error>();
};

fn region(chunk: impl IntoChunk) -> Region {
    Region::builder().chunk(chunk).writable().build(&Pool::new().unwrap()).unwrap()
}

#[test]
fn bytes_own_a_region_and_their_slices_keep_it() {
    let expected = pattern(1, BYTES);
    let region = region(expected.clone());
    let (meter, address) = (region.meter(), region.as_ptr().addr().get());
    let bytes = Bytes::from_owner(region);
    assert_eq!((bytes.as_ptr().addr(), meter.metrics().pages_installed()), (address, 0));
    let part = bytes.slice(PAGE + 5..2 * PAGE);
    drop(bytes);
    let read = thread::spawn(move || part.to_vec()).join().unwrap();
    assert_eq!(read, expected[PAGE + 5..2 * PAGE]);
}

#[test]
fn a_cursor_reads_and_seeks_in_a_region() {
    let expected = pattern(2, BYTES);
    let mut cursor = Cursor::new(region(expected.clone()));
    assert_eq!(cursor.seek(SeekFrom::End(-7)).unwrap(), BYTES as u64 - 7);
    let mut read = Vec::new();
    cursor.read_to_end(&mut read).unwrap();
    assert_eq!(read, expected[BYTES - 7..]);
    pagestitch::scope(|scope| {
        let region = scope.region().borrow(&expected).build(&Pool::new().unwrap()).unwrap();
        let mut read = Vec::new();
        Cursor::new(region).read_to_end(&mut read).unwrap();
        assert_eq!(read, expected);
    });
}

#[test]
fn a_region_is_memory_of_another_one() {
    let expected = pattern(3, BYTES);
    let lower = region(expected.clone());
    lower.populate(..).unwrap();
    let upper = region(Memory::new(lower));
    assert_eq!(upper.as_slice(), expected);
}

#[test]
fn writes_stay_in_the_region_and_reach_no_source() {
    let expected = pattern(4, BYTES);
    let source: Arc<[u8]> = expected.clone().into();
    let mut region = region(Arc::clone(&source));
    region.write_at(PAGE as u64 - 2, b"across").unwrap();
    region.write_at(BYTES as u64, b"").unwrap();
    let mut written = expected.clone();
    written[PAGE - 2..PAGE + 4].copy_from_slice(b"across");
    assert_eq!(region.as_slice(), written);
    assert_eq!(*source, expected);
}

#[test]
fn a_write_that_cannot_be_made_changes_nothing_and_is_an_error() {
    let pool = Pool::new().unwrap();
    let mut read_only = Region::builder().chunk("text").build(&pool).unwrap();
    assert_eq!(read_only.write_at(0, b"T").unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(read_only.as_slice(), b"text");

    let mut region = region(pattern(5, BYTES));
    for offset in [BYTES as u64 - 1, u64::MAX] {
        assert_eq!(region.write_at(offset, b"xx").unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    let broken = Arc::new(Scripted::new(2 * PAGE as u64).failing(0..1));
    let mut region = Region::builder().chunk(Chunk::source(broken)).writable().build(&pool).unwrap();
    assert_eq!(region.write_at(5, b"xx").unwrap_err().kind(), ErrorKind::SourceFailed);
    region.write_at(PAGE as u64, b"xx").unwrap();
    assert_eq!(&region.as_slice()[PAGE..PAGE + 2], b"xx");
}
