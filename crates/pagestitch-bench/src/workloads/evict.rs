//! Pages that leave a region with a budget, and that come back.
//!
//! | at | time of |
//! |---|---|
//! | pages in order, every other page | `evict()` of clean pages of a stable source, in batches; with two threads, each has a half |
//! | for new pages | what a budget adds to random first touches of four times as many pages: the time of these touches, less that of the same without a budget. A page is one that leaves |
//! | cold fault | a first touch |
//! | soft fault | a touch of a page that waits on the standby list |
//! | first write | the first write to a page that is present, in a region that is written back |
//!
//! The touching thread and the worker of the pool have the same CPU.

use crate::affinity::{Pinned, allowed};
use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::ooc::memory::region_of_memfd;
use crate::ooc::{Words, has_write_back};
use crate::prototypes::evict::moves_no_pages;
use crate::systems::{CHUNK, Data, PAGE, touch_all};
use crate::team::{at_once, parts};
use crate::touch::{first_touches, shuffled_pages, touches};
use pagestitch::{Budget, Inline, Placement, Pool, Readahead, Region, Server, SharedRegion};
use std::hint::black_box;
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(256 << 20), options.seed);
    warm(2 * data.bytes());
    let mut cases = leaving(&data);
    let data = Data::new(options.size(64 << 20), options.seed);
    for (system, server) in SERVERS {
        let touched = Arc::clone(&data);
        let run = move |seed| touch_cold(&touched, server, seed);
        cases.push(Case::new(system, run).at(COLD).chunks_of(CHUNK));
    }
    match moves_no_pages() {
        Some(reason) => eprintln!("SKIPPED evict: soft faults and first writes: {reason}"),
        None => cases.extend(coming_back(&data)),
    }
    cases
}

/// The cases in which pages leave.
fn leaving(data: &Arc<Data>) -> Vec<Case> {
    let mut cases = Vec::new();
    for (point, of, threads, baseline) in EVICTIONS {
        if threads > allowed().len() {
            continue;
        }
        let data = Arc::clone(data);
        let case =
            Case::new(EVICT, move |_| evict(&data, of, threads)).at(point).chunks_of(CHUNK).by(threads);
        cases.push(if baseline.is_empty() { case } else { case.against_point(baseline) });
    }
    let data = Arc::clone(data);
    cases.push(Case::new("budget", move |seed| make_room(&data, seed)).at("for new pages").chunks_of(CHUNK));
    cases
}

/// Measures the evictions of a region that is four times as long as its budget.
fn make_room(data: &Data, seed: u64) -> Sample {
    let offsets = shuffled_pages(data.bytes(), seed);
    let touch = |region: &Region| {
        let pages = (data.pages(), data.bytes());
        let touch = |part: &[usize]| touch_all(region.as_slice(), part);
        at_once(pages, &allowed()[..1], vec![&offsets[..]], touch).0
    };
    let without = touch(&data.region(Readahead::None, Inline));
    let budget = Budget::bytes((data.bytes() as u64 / 4).max(8 << 20)).expect("a budget");
    let with = touch(&bounded(data, &budget, Inline.into()));
    let (time, processor) =
        (with.time.saturating_sub(without.time), with.processor.saturating_sub(without.processor));
    let left = budget.evictions();
    Sample { time, processor, pages: left, bytes: left * PAGE as u64, ..Sample::default() }
}

/// Has one page of `of` in memory, and measures their eviction.
fn evict(data: &Data, of: usize, threads: usize) -> Sample {
    let budget = Budget::bytes(2 * data.bytes() as u64).expect("a budget");
    let region = bounded(data, &budget, Inline.into());
    let wanted: Vec<usize> = (0..data.bytes()).step_by(of * PAGE).collect();
    touch_all(region.as_slice(), &wanted);
    let halves = parts(&wanted, threads, 1).map(|part| part[0] as u64..(part[part.len() - 1] + PAGE) as u64);
    let halves: Vec<_> = halves.collect();
    let (sample, left) =
        at_once((wanted.len(), wanted.len() * PAGE), &allowed()[..threads], halves, |half| {
            region.evict(half).expect("pages that leave")
        });
    // A batch stays while another thread empties the slots that it needs.
    let left: u64 = left.iter().sum();
    assert!(left > sample.bytes / 2, "{left} of {} bytes have left", sample.bytes);
    data.check(region.as_slice());
    Sample { pages: left / PAGE as u64, bytes: left, ..sample }
}

/// The cases in which pages come back, or are written.
fn coming_back(data: &Arc<Data>) -> Vec<Case> {
    let mut cases = Vec::new();
    for (system, server) in SERVERS {
        let touched = Arc::clone(data);
        let run = move |seed| touch_soft(&touched, server, seed);
        cases.push(Case::new(system, run).at("soft fault").chunks_of(CHUNK).against_point(COLD));
        if !has_write_back() {
            continue;
        }
        let bytes = data.bytes();
        let of_write_back = "cold fault, write-back";
        cases.push(Case::new(system, move |seed| read_cold(bytes, server, seed)).at(of_write_back));
        let mut case = Case::new(system, move |seed| write_first(bytes, server, seed)).at("first write");
        case.baselines = [COLD, of_write_back].map(|point| (system, String::from(point))).into();
        cases.push(case);
    }
    cases
}

fn touch_cold(data: &Data, server: NewServer, seed: u64) -> Sample {
    let _pinned = Pinned::here();
    let region = bounded(data, &roomy(data.bytes()), server());
    let offsets = shuffled_pages(data.bytes(), seed);
    Sample::of_touches(data.bytes(), || first_touches(region.as_slice(), &offsets))
}

fn touch_soft(data: &Data, server: NewServer, seed: u64) -> Sample {
    let _pinned = Pinned::here();
    let budget = roomy(data.bytes());
    let region = bounded(data, &budget, server());
    let offsets = shuffled_pages(data.bytes(), seed);
    black_box(first_touches(region.as_slice(), &offsets));
    region.evict(..).expect("pages that leave");
    let sample = Sample::of_touches(data.bytes(), || first_touches(region.as_slice(), &offsets));
    data.check(region.as_slice());
    let soft_faults = Some(budget.metrics().soft_faults as f64 / offsets.len() as f64);
    Sample { soft_faults, ..sample }
}

fn read_cold(bytes: usize, server: NewServer, seed: u64) -> Sample {
    let _pinned = Pinned::here();
    let region = written_back(bytes, server());
    let words = Words::of(&region);
    let read = |offset: usize| words.word((offset / PAGE) as u32, 0) as u8;
    Sample::of_touches(bytes, || touches(shuffled_pages(bytes, seed), read))
}

fn write_first(bytes: usize, server: NewServer, seed: u64) -> Sample {
    let _pinned = Pinned::here();
    let region = written_back(bytes, server());
    let words = Words::of(&region);
    let offsets = shuffled_pages(bytes, seed);
    let page_of = |offset: usize| (offset / PAGE) as u32;
    assert!(offsets.iter().all(|&offset| words.word(page_of(offset), 0) == u64::from(page_of(offset)) + 1));
    let write = |offset: usize| {
        words.write(page_of(offset), 1, offset as u64);
        0
    };
    let sample = Sample::of_touches(bytes, || touches(&offsets, write));
    assert!(offsets.iter().all(|&offset| words.word(page_of(offset), 1) == offset as u64), "a lost write");
    sample
}

/// A region that is filled by touches only.
fn bounded(data: &Data, budget: &Budget, server: Server) -> Region {
    data.builder(Readahead::None).budget(budget).build(server).expect("a region")
}

/// A region of memory that takes the written pages.
fn written_back(bytes: usize, server: Server) -> SharedRegion {
    region_of_memfd(bytes / PAGE, &roomy(bytes))
        .readahead(Readahead::None)
        .build_shared(server)
        .expect("a region")
}

/// A budget with room for all pages, also on its standby list.
fn roomy(bytes: usize) -> Budget {
    Budget::bytes(16 * bytes as u64).expect("a budget")
}

type NewServer = fn() -> Server;

/// The server of a region, for a thread that stays on its CPU.
const SERVERS: [(&str, NewServer); 2] = [
    ("inline", || Inline.into()),
    ("pool, same CPU", || {
        let pool = Pool::builder().placement(Placement::Cpus(vec![Pinned::here().cpu])).start();
        (&pool.expect("a pool")).into()
    }),
];
/// The point, one page of so many, the threads, and the point of the baseline.
const EVICTIONS: [(&str, usize, usize, &str); 4] = [
    ("pages in order", 1, 1, ""),
    ("pages in order, 2 threads", 1, 2, "pages in order"),
    ("every other page", 2, 1, ""),
    ("every other page, 2 threads", 2, 2, "every other page"),
];
const EVICT: &str = "evict()";
const COLD: &str = "cold fault";
