//! Rare answers of the kernel, injected often: the result is bytes or an error, and no thread
//! hangs. `pagestitch stress`, built with the same feature, mixes them at random.

use pagestitch::source::{FileSource, FillMemfd, LazyMemfd, Pages, SharedFile, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, Inline, Pool, Process, Readahead, Region, Server};
use pagestitch_kernel::Features;
use pagestitch_kernel::Support;
use pagestitch_kernel::uffd::inject::Injected::{
    self, Again, Busy, Exists, NoMarker, NoMemory, Partial, ProcessGone,
};
use pagestitch_kernel::uffd::inject::{inject, injected};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;

/// Answers that change no outcome.
const HARMLESS: [Injected; 4] = [Again, Partial, Exists, Busy];

/// Injects an answer into one of `one_of` calls. One test at a time injects.
struct Injecting(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>, Injected, u64);

impl Injecting {
    fn new(kind: Injected, one_of: u32) -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = count(kind);
        inject(one_of, &[kind], 7);
        Self(alone, kind, before)
    }

    /// Ends the injection, which has happened at least once.
    fn end(self) {
        inject(0, &[], 0);
        assert!(count(self.1) > self.2, "{:?} was never answered", self.1);
    }
}

fn count(kind: Injected) -> u64 {
    injected().into_iter().find(|(of, _)| *of == kind).expect("a kind").1
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 | 1).collect()
}

/// Eight pages for each way to fill a page and blocks that move, and their bytes.
fn all_ways() -> (Vec<Chunk>, Vec<u8>) {
    let own = bytes(8 * PAGE);
    let mut donated = Pages::new(own.len()).unwrap();
    donated.copy_from_slice(&own);
    let file = UnsealedMemfd::create("file", own.len() as u64).unwrap();
    file.file().write_all_at(&own, 0).unwrap();
    let file = FileSource::from_file(file.file().try_clone().unwrap(), "file").unwrap();
    let chunks = vec![
        Chunk::from(own.clone()),
        Chunk::hole(8 * PAGE as u64),
        donated.into(),
        file.into(),
        // Pages in which chunks meet.
        Chunk::from(own.clone()).range(0..100),
        Chunk::from(bytes(8 << 20)),
    ];
    let all = [&own[..], &vec![0; 8 * PAGE], &own, &own, &own[..100], &bytes(8 << 20)].concat();
    (chunks, all)
}

fn memory_and_hole() -> (Vec<Chunk>, Vec<u8>) {
    let chunks = vec![Chunk::from(bytes(20 * PAGE)), Chunk::hole(8 * PAGE as u64), Chunk::from(bytes(100))];
    (chunks, [bytes(20 * PAGE), vec![0; 8 * PAGE], bytes(100)].concat())
}

fn touched_by_three(region: &Region, expected: &[u8]) {
    scope(|scope| {
        for first in 0..3 {
            scope.spawn(move || {
                let pages = (0..expected.len()).step_by(PAGE).skip(first * 5);
                for at in pages.clone().chain(pages.rev()) {
                    let end = expected.len().min(at + PAGE);
                    assert!(region.as_slice()[at..end] == expected[at..end], "page {}", at / PAGE);
                }
            });
        }
    });
}

fn built(chunks: Vec<Chunk>, readahead: bool, server: impl Into<Server>) -> Region {
    let builder = Region::builder().chunks(chunks);
    let builder = if readahead { builder } else { builder.readahead(Readahead::None) };
    builder.build(server).unwrap()
}

#[test]
fn harmless_answers_of_the_kernel_cost_no_byte_in_a_pool() {
    for kind in HARMLESS {
        for readahead in [false, true] {
            let (chunks, expected) = all_ways();
            let region = built(chunks, readahead, &Pool::new().unwrap());
            let injecting = Injecting::new(kind, 2);
            scope(|scope| {
                if readahead {
                    scope.spawn(|| region.populate(..).unwrap());
                }
                touched_by_three(&region, &expected);
            });
            // A fill of one page is never partial, and older kernels move no pages.
            let given = match kind {
                Partial => readahead,
                Busy => Support::current().has(Features::MOVE),
                _ => true,
            };
            if given {
                injecting.end();
            }
        }
    }
}

#[test]
fn harmless_answers_of_the_kernel_cost_no_byte_inline() {
    for kind in [Again, Exists] {
        let (chunks, expected) = memory_and_hole();
        let region = built(chunks, false, Inline);
        let injecting = Injecting::new(kind, 2);
        touched_by_three(&region, &expected);
        injecting.end();
    }
}

#[test]
fn harmless_answers_of_the_kernel_cost_no_byte_of_adopted_memory() {
    for kind in [Again, Exists] {
        let expected = bytes(64 * PAGE);
        let guest = Guest::new(&[64 * PAGE], false).unwrap();
        let memory = guest.memory().unwrap();
        let memory = memory.owner(Process::open(std::process::id()).unwrap());
        let region = Region::builder()
            .chunk(expected.clone())
            .readahead(Readahead::None)
            .build_adopted(memory, &Pool::new().unwrap())
            .unwrap();
        let injecting = Injecting::new(kind, 2);
        scope(|scope| {
            for _ in 0..3 {
                let (guest, expected) = (&guest, &expected);
                scope.spawn(move || {
                    (0..expected.len()).step_by(PAGE).all(|at| guest.read(at) == expected[at])
                });
            }
        });
        region.populate(..).unwrap();
        injecting.end();
    }
}

#[test]
fn harmless_answers_of_the_kernel_cost_no_byte_of_a_lazy_memfd() {
    for kind in [Again, Partial, Exists] {
        let expected = bytes(64 * PAGE);
        let memfd = UnsealedMemfd::create("lazy", expected.len() as u64).unwrap();
        let fill = Written(memfd.file().try_clone().unwrap(), expected.clone());
        let lazy = LazyMemfd::new(memfd.file().try_clone().unwrap().into(), Arc::new(fill)).unwrap();
        let region = Region::builder().chunk(lazy).build_shared(&Pool::new().unwrap()).unwrap();
        let injecting = Injecting::new(kind, 2);
        scope(|scope| {
            scope.spawn(|| region.populate(expected.len() as u64 / 2..).unwrap());
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut read = vec![0; 3 * PAGE];
                    for at in (0..expected.len() - read.len()).step_by(PAGE) {
                        region.read_at(at as u64, &mut read).unwrap();
                        assert!(read == expected[at..at + read.len()]);
                    }
                });
            }
        });
        injecting.end();
    }
}

#[test]
fn a_refused_fill_is_an_error_and_succeeds_in_a_retry() {
    for kind in [NoMemory, ProcessGone] {
        let (chunks, expected) = all_ways();
        let region = built(chunks, false, &Pool::new().unwrap());
        // A fill waits for memory for a while, so NoMemory has to come several times in a row.
        let injecting = Injecting::new(kind, if kind == NoMemory { 1 } else { 2 });
        let mut errors = 0;
        for at in (0..50 * PAGE).step_by(if kind == NoMemory { 9 * PAGE } else { PAGE }) {
            let mut read = vec![0; PAGE];
            match region.read_at(at as u64, &mut read) {
                Ok(()) => assert!(read == expected[at..at + PAGE]),
                Err(error) => {
                    let expected =
                        if kind == NoMemory { ErrorKind::OutOfMemory } else { ErrorKind::MemoryGone };
                    assert_eq!(error.kind(), expected, "{error}");
                    errors += 1;
                }
            }
        }
        injecting.end();
        assert_eq!(region.failures().len(), errors);
        if Support::current().has(Features::POISON) {
            region.retry_failed(..).unwrap();
            touched_by_three(&region, &expected);
        }
    }
}

#[test]
fn a_page_without_memory_for_a_poison_marker_is_taken_away() {
    let end = child::run(this_test!(), || {
        let region = built(
            vec![bytes(PAGE).into(), Chunk::source(Arc::new(Never)), bytes(PAGE).into()],
            false,
            &Pool::new().unwrap(),
        );
        inject(1, &[NoMarker], 7);
        let error = region.populate(..).unwrap_err();
        assert_eq!((error.kind(), error.chunk()), (ErrorKind::SourceFailed, Some(1)), "{error}");
        assert!(count(NoMarker) > 0);
        assert!(region.as_slice()[..PAGE] == bytes(PAGE) && region.as_slice()[2 * PAGE..] == bytes(PAGE));
        std::hint::black_box(region.as_slice()[PAGE]);
    });
    assert_eq!(end.signal(), Some(7), "{}", end.output());
}

/// A filler that writes its bytes.
struct Written(fs::File, Vec<u8>);

impl FillMemfd for Written {
    fn fill(&self, _: &SharedFile, range: Range<u64>) -> io::Result<()> {
        self.0.write_all_at(&self.1[range.start as usize..range.end as usize], range.start)
    }
}

/// A source that fails.
struct Never;

impl pagestitch::Source for Never {
    fn size(&self) -> u64 {
        PAGE as u64
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("never"))
    }
}
