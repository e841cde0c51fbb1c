//! Memory of one region as a chunk of another: allowed where another server fills it, and refused
//! where a server would wait for itself.

use crate::pattern;
use pagestitch::source::Memory;
use pagestitch::{Chunk, Error, ErrorKind, Inline, IntoChunk, Manual, Pool, Region, Server};
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;

const BYTES: usize = 3 << 20;

/// A region as the owner of its bytes.
struct Owner(Arc<Region>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

pub(crate) fn named(
    name: &str,
    chunk: impl IntoChunk,
    server: impl Into<Server>,
) -> Result<Arc<Region>, Error> {
    Region::builder().name(name).chunk(chunk).build(server).map(Arc::new)
}

pub(crate) fn over(region: &Arc<Region>) -> Memory {
    Memory::new(Owner(Arc::clone(region)))
}

fn one_worker() -> Pool {
    Pool::builder().workers(1).start().unwrap()
}

fn refused(built: Result<Arc<Region>, Error>) {
    let error = built.unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::NestedRegion, Some(0)), "{error}");
}

#[test]
fn memory_of_a_region_of_the_same_server_is_refused() {
    let pool = one_worker();
    let lower = named("lower", vec![7u8; BYTES], &pool).unwrap();
    refused(named("upper", over(&lower), &pool));
    refused(named("upper", Chunk::from(over(&lower)).range(5..100), &pool.clone()));
    let manual = Manual::new().unwrap();
    let lower = named("lower", vec![7u8; BYTES], &manual).unwrap();
    refused(named("upper", over(&lower), &manual));
    let lower = named("lower", vec![7u8; BYTES], &pool).unwrap();
    pagestitch::scope(|scope| {
        let built = scope.region().name("upper").borrow(&lower.as_slice()[100..5000]).build(&pool);
        refused(built.map(|_| lower.clone()));
    });
}

#[test]
fn memory_of_an_inline_region_is_refused() {
    let lower = named("lower", vec![7u8; BYTES], Inline).unwrap();
    refused(named("upper", over(&lower), &one_worker()));
    refused(named("upper", over(&lower), Inline));
}

#[test]
fn a_cycle_of_servers_is_refused() {
    let (first, second) = (one_worker(), one_worker());
    let lowest = named("lowest", vec![7u8; BYTES], &first).unwrap();
    let lower = named("lower", over(&lowest), &second).unwrap();
    refused(named("upper", over(&lower), &first));
    drop((lowest, lower));
    let bytes = pattern(1, BYTES);
    let upper = named("upper", bytes.clone(), &first).unwrap();
    assert!(upper.as_slice() == bytes, "the addresses of the dropped regions are forgotten");
}

#[test]
fn memory_of_a_region_of_another_server_is_filled_through_both() {
    child::run(this_test!(), || {
        let bytes = pattern(2, BYTES);
        let lower = named("lower", bytes.clone(), &one_worker()).unwrap();
        if !lower.serves_system_calls() {
            // For an ordinary user the kernel does not wait for an absent page of `lower`.
            lower.populate(..).unwrap();
        }
        let upper = named("upper", over(&lower), &one_worker()).unwrap();
        assert!(upper.as_slice() == bytes);
        let inline = named("inline", over(&lower), Inline).unwrap();
        assert!(inline.as_slice() == bytes);
    })
    .expect_pass();
}
