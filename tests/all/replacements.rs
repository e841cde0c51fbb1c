//! Replaced pages: each has its old bytes or its new ones, and no other page changes.

use crate::waits::until;
use crate::zero_copy::memfd;
use crate::{PAGE, lacks_poison, pattern};
use pagestitch::source::{FileSource, Memory, Pages};
use pagestitch::{
    Budget, BuildOption, Chunk, Eager, Error, ErrorKind, Inline, Manual, OnFailure, Pool, Region, Server,
    SharedRegion, Source,
};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::this_test;
use proptest::prelude::*;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn pool() -> Server {
    Server::from(&Pool::builder().workers(2).start().unwrap())
}

fn servers() -> [Server; 2] {
    [pool(), Inline.into()]
}

const fn pages(range: Range<usize>) -> Range<u64> {
    (range.start * PAGE) as u64..(range.end * PAGE) as u64
}

#[test]
fn replaced_pages_have_their_new_bytes_whether_they_were_touched_or_not() {
    for server in servers() {
        for (touched, writable) in [(false, false), (true, false), (true, true)] {
            let mut bytes = pattern(1, 20 * PAGE + 100);
            let builder = Region::builder().chunk(bytes[..5000].to_vec()).chunk(bytes[5000..].to_vec());
            let builder = if writable { builder.writable() } else { builder };
            let mut region = builder.build(server.clone()).unwrap();
            if touched {
                region.populate(..).unwrap();
            }
            if writable {
                region.write_at(PAGE as u64, b"gone").unwrap();
                region.write_at(9 * PAGE as u64, b"kept").unwrap();
                bytes[9 * PAGE..][..4].copy_from_slice(b"kept");
            }
            let new = pattern(2, 4 * PAGE + 7);
            region.replace(pages(1..5), Chunk::from(new.clone()).range(7..)).unwrap();
            bytes[PAGE..5 * PAGE].copy_from_slice(&new[7..]);
            region.replace(pages(4..5), memfd(&pattern(3, PAGE))).unwrap();
            bytes[4 * PAGE..5 * PAGE].copy_from_slice(&pattern(3, PAGE));
            region.discard(pages(17..18)).unwrap();
            bytes[17 * PAGE..18 * PAGE].fill(0);
            region.replace(19 * PAGE as u64.., pattern(4, PAGE + 100)).unwrap();
            bytes[19 * PAGE..].copy_from_slice(&pattern(4, PAGE + 100));
            assert!(region.as_slice() == bytes, "touched: {touched}, writable: {writable}");
            assert_eq!(region.chunk_count(), 2);
            region.discard(..0).unwrap();
            region.discard(..).unwrap();
            assert!(region.as_slice().iter().all(|&byte| byte == 0));
        }
    }
}

/// A source of bytes that all equal one, for so many pages; or one that fails.
struct Same(Option<u8>, usize);

impl Source for Same {
    fn size(&self) -> u64 {
        (self.1 * PAGE) as u64
    }

    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(self.0.ok_or_else(|| io::Error::other("unplugged"))?);
        Ok(())
    }

    fn name(&self) -> String {
        format!("same {:?}", self.0)
    }
}

#[test]
fn a_poisoned_page_is_replaced_by_bytes_and_a_failure_names_the_new_source() {
    if lacks_poison(this_test!()) {
        return;
    }
    let chunk = |byte, pages| Chunk::source(Arc::new(Same(byte, pages)));
    let builder = Region::builder().chunk(chunk(Some(1), 1)).chunk(chunk(None, 3));
    let mut region = builder.build(pool()).unwrap();
    region.populate(pages(1..2)).unwrap_err();
    region.populate(pages(2..3)).unwrap_err();
    region.replace(pages(1..2), chunk(Some(2), 1)).unwrap();
    assert_eq!(region.failures().len(), 1, "the failure of bytes that are gone");
    assert_eq!((region.as_slice()[PAGE], region.failures().len()), (2, 1));
    region.replace(pages(0..1), chunk(None, 1)).unwrap();
    let failure = region.populate(pages(0..1)).unwrap_err();
    let failure = failure.failure().unwrap();
    assert_eq!((failure.chunk(), failure.source_name()), (0, "same None"));
}

#[test]
fn readers_of_a_page_that_is_replaced_see_one_version_of_it() {
    let region = SharedRegion::builder().chunk(vec![1u8; 8 * PAGE]).build_shared(pool()).unwrap();
    let done = AtomicBool::new(false);
    scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|page| {
                let (region, done) = (&region, &done);
                scope.spawn(move || {
                    let (mut last, mut bytes) = (1, [0; PAGE]);
                    while !done.load(Ordering::Relaxed) {
                        region.read_at(((2 + page) * PAGE) as u64, &mut bytes).unwrap();
                        let touched = region.view().touch((2 + page) * PAGE + 1);
                        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "a mixture of two versions");
                        assert!(last <= bytes[0] && bytes[0] <= touched, "{last} {} {touched}", bytes[0]);
                        last = touched;
                    }
                })
            })
            .collect();
        for version in 2..=100 {
            region.replace(pages(2..4), vec![version; 2 * PAGE]).unwrap();
            assert!(region.view().touch(2 * PAGE) >= version - 1);
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    let mut bytes = [0; 8];
    (0..8).for_each(|page| region.read_at((page * PAGE) as u64, &mut bytes[page..=page]).unwrap());
    assert_eq!(bytes, [1, 1, 100, 100, 1, 1, 1, 1]);
}

/// A page that is being filled is waited for, and its waiter gets the new bytes or the old ones.
#[test]
fn a_replacement_waits_for_the_fill_of_its_pages() {
    struct Slow(Arc<[AtomicBool; 2]>);
    impl Source for Slow {
        fn size(&self) -> u64 {
            (4 * PAGE) as u64
        }
        fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
            self.0[0].store(true, Ordering::SeqCst);
            until(|| self.0[1].load(Ordering::SeqCst));
            into.fill(1);
            Ok(())
        }
    }
    let gates = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
    let chunk = Chunk::source(Arc::new(Slow(Arc::clone(&gates))));
    let region = SharedRegion::builder().chunk(chunk).build_shared(pool()).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.view().touch(PAGE));
        until(|| gates[0].load(Ordering::SeqCst));
        let replaced = scope.spawn(|| region.replace(pages(0..2), vec![2u8; 2 * PAGE]));
        gates[1].store(true, Ordering::SeqCst);
        replaced.join().unwrap().unwrap();
        assert!([1, 2].contains(&reader.join().unwrap()));
    });
    assert_eq!((region.view().touch(0), region.view().touch(PAGE), region.view().touch(2 * PAGE)), (2, 2, 1));
}

#[test]
fn discarded_pages_of_a_budget_take_no_memory_and_replaced_ones_come_back_with_their_new_bytes() {
    let budget = Budget::bytes(6 << 20).unwrap();
    let mut bytes = pattern(5, ALL * PAGE);
    let mut region = Region::builder().chunk(bytes.clone()).budget(&budget).build(pool()).unwrap();
    assert!(region.as_slice() == bytes);
    // Some of these are resident, some wait in standby, and most have left.
    let new = pattern(6, ALL / 2 * PAGE);
    region.replace(pages(ALL / 2..ALL), new.clone()).unwrap();
    bytes[ALL / 2 * PAGE..].copy_from_slice(&new);
    for _ in 0..2 {
        assert!(region.as_slice() == bytes);
    }
    region.discard(..).unwrap();
    // The frames of pages in standby are freed in their turn.
    let metrics = budget.metrics();
    assert!(metrics.resident_bytes - metrics.standby_bytes <= 1 << 20, "{metrics:?}");
    assert!(region.as_slice().iter().all(|&byte| byte == 0));
    assert!(budget.resident_bytes() <= budget.limit());
}

#[test]
fn pages_and_chunks_that_cannot_be_replaced_are_refused() {
    let refused = |result: Result<(), Error>, kind: ErrorKind| {
        let error = result.expect_err("it cannot be replaced");
        assert_eq!(error.kind(), kind, "{error}");
    };
    let build = || Region::builder().chunk(vec![1u8; 4 * PAGE]);
    let page = || vec![2u8; PAGE];
    let mut region = build().build(pool()).unwrap();
    refused(region.replace(pages(3..5), vec![2u8; 2 * PAGE]), ErrorKind::OutOfRange);
    refused(region.replace(1..PAGE as u64 + 1, page()), ErrorKind::OutOfRange);
    refused(region.replace(pages(0..2), page()), ErrorKind::InvalidChunk);
    let donated = Chunk::from(Pages::new(PAGE).unwrap());
    refused(region.replace(pages(0..1), donated), ErrorKind::InvalidChunk);
    let failing = Chunk::from(page()).on_failure(OnFailure::Zeros);
    refused(region.replace(pages(0..1), failing), ErrorKind::InvalidChunk);
    let own = std::env::current_exe().unwrap();
    let file = || Chunk::source(Arc::new(FileSource::open(&own).unwrap())).range(0..PAGE as u64);
    region.replace(pages(0..1), file()).unwrap();
    assert_eq!(&region.as_slice()[1..4], b"ELF");
    let mut inline = build().build(Inline).unwrap();
    refused(inline.replace(pages(0..1), file()), ErrorKind::InvalidChunk);
    let mut eager = build().build(Eager).unwrap();
    refused(eager.discard(..), ErrorKind::UnsuitableServer);
    let mut shown = build().chunk(memfd(&pattern(1, 2 * PAGE))).build(pool()).unwrap();
    refused(shown.discard(pages(3..5)), ErrorKind::OptionConflict);
    shown.discard(pages(3..4)).unwrap();
    let mut growing = Region::builder().chunk(vec![1u8; PAGE + 1]).capacity(1 << 20).build(pool()).unwrap();
    refused(growing.discard(PAGE as u64..), ErrorKind::OutOfRange);
    growing.discard(pages(0..1)).unwrap();
    assert_eq!((growing.as_slice()[0], growing.as_slice()[PAGE]), (0, 1));
    let mut limited = build()
        .budget(&Budget::bytes(6 << 20).unwrap())
        .build(&Pool::builder().workers(1).start().unwrap())
        .unwrap();
    refused(limited.replace(pages(0..1), file()), ErrorKind::InvalidChunk);
    let mut manual = build().build(&Manual::new().unwrap()).unwrap();
    if let Err(error) = manual.discard(..) {
        assert_eq!(
            (error.kind(), error.option()),
            (ErrorKind::OptionConflict, Some(BuildOption::ReportDiscards))
        );
    }
    build().report_discards(false).build(&Manual::new().unwrap()).unwrap().discard(..).unwrap();
}

/// The pages of the property below: more than its budget.
const ALL: usize = 2000;

/// A step of the property below: a kind, a page, a number of pages, and a seed.
type Step = (usize, usize, usize, u64);

fn step(region: &mut Region, model: &mut [u8], (kind, first, count, seed): Step) {
    let range = first..(first + count).min(model.len() / PAGE);
    let inside = range.start * PAGE..range.end * PAGE;
    match kind {
        0 => {
            region.discard(pages(range)).unwrap();
            model[inside].fill(0);
        }
        1 => {
            let new = vec![seed as u8; inside.len() + 10];
            let chunk =
                Chunk::from(Memory::from(new.clone())).range(seed % 10..seed % 10 + inside.len() as u64);
            region.replace(pages(range), chunk).unwrap();
            model[inside.clone()].copy_from_slice(&new[seed as usize % 10..][..inside.len()]);
        }
        _ => assert!(region.as_slice()[inside.clone()] == model[inside], "pages {range:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Random replacements and reads, against a vector.
    #[test]
    fn a_region_with_replaced_pages_has_the_bytes_of_a_vector(
        steps in prop::collection::vec((0usize..4, 0usize..ALL, 1usize..100, any::<u64>()), 1..40),
        server in 0usize..3,
    ) {
        let mut model: Vec<u8> = (0..ALL).flat_map(|page| [page as u8 | 1; PAGE]).collect();
        let builder = Region::builder().chunk(model[..777_777].to_vec()).chunk(model[777_777..].to_vec());
        let budget = Budget::bytes(6 << 20).unwrap();
        let mut region = match server {
            0 => builder.build(pool()).unwrap(),
            1 => builder.build(Inline).unwrap(),
            _ => builder.budget(&budget).build(&Pool::builder().workers(1).start().unwrap()).unwrap(),
        };
        for step_now in steps {
            step(&mut region, &mut model, step_now);
        }
        prop_assert!(region.as_slice() == model);
    }
}
