//! Finding the pages that were written: the kernel's record, against reading its page table.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::PAGE;
use pagestitch::{Chunk, Pool, Region, SharedRegion, Support};
use pagestitch_kernel::page_scan::PageScan;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, AddressRange, Features, Outcome, PageSize, Uffd, View};
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    if !Support::current().has(Features::WRITE_PROTECT_ASYNC) {
        // The kernel has no record of writes (before Linux 6.7).
        return Vec::new();
    }
    let bytes = options.size(1 << 30);
    warm(bytes);
    let region = Rc::new(tracked(bytes));
    let pages = bytes / PAGE;
    let mut cases = Vec::new();
    for (point, share) in [("1 % written", 100), ("all written", 1)] {
        let mut case = |system: &'static str, find: fn(&SharedRegion) -> usize| {
            let region = Rc::clone(&region);
            let run = move |seed| {
                let written = write_share(&region, share, seed);
                let mut found = 0;
                let sample = Sample::of(pages, bytes, || found = find(&region));
                assert_eq!(found, written, "each written page is found");
                region.changes().expect("a record");
                sample
            };
            cases.push(Case::new(system, run).at(point).against(&["pagemap"]));
        };
        case("changes()", |region| region.changes().expect("a record").bytes() as usize / PAGE);
        case("pagemap", read_pagemap);
    }
    cases.extend(arming(bytes));
    cases
}

/// The cases that arm pages, and find nothing new.
fn arming(bytes: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (point, is_huge) in [("arming small pages", false), ("arming huge pages", true)] {
        let memory = Unarmed::new(bytes, is_huge);
        if is_huge && memory.bytes_in_huge_pages() < bytes {
            eprintln!("SKIPPED changes: {point}: the kernel has too few huge pages, or gives none (THP)");
            continue;
        }
        cases.push(Case::new("PAGEMAP_SCAN", move |_| memory.arm()).at(point));
    }
    cases
}

/// Written pages without the marker of the record.
struct Unarmed {
    range: AddressRange,
    uffd: Uffd,
    scan: PageScan,
    _view: View,
}

impl Unarmed {
    fn new(bytes: usize, is_huge: bool) -> Self {
        let pages = NonZeroUsize::new(bytes / PAGE).expect("some pages");
        let (reservation, view) =
            View::reserve(pages, PageSize::system(), Access::Writable).expect("addresses");
        if is_huge {
            reservation.advise_hugepage()
        } else {
            reservation.use_small_pages()
        }
        let uffd =
            Uffd::open(Features::WRITE_PROTECT | Features::WRITE_PROTECT_ASYNC).expect("a userfaultfd");
        uffd.register(&reservation, RegisterMode::WRITE_PROTECT).expect("registering");
        (0..bytes).step_by(PAGE).for_each(|offset| view.write_at(offset as u64, &[1]).expect("a page"));
        let (range, scan) = (reservation.range(), PageScan::open().expect("/proc"));
        Self { range, uffd, scan, _view: view }
    }

    /// Removes all markers, and measures the scan that sets them.
    fn arm(&self) -> Sample {
        assert_eq!(self.uffd.unprotect(self.range), Outcome::Done, "pages without markers");
        let (bytes, mut armed) = (self.range.bytes(), 0);
        let sample = Sample::of(bytes / PAGE, bytes, || {
            self.scan.take_written(self.range, |run, _| armed += run.bytes()).expect("a scan");
        });
        assert_eq!(armed, bytes, "all pages are armed");
        sample
    }

    fn bytes_in_huge_pages(&self) -> usize {
        let maps = fs::read_to_string("/proc/self/smaps").expect("/proc");
        let (mut is_inside, mut kib) = (false, 0);
        for line in maps.lines() {
            let start = line.split_once('-').and_then(|(start, _)| usize::from_str_radix(start, 16).ok());
            if let Some(start) = start {
                is_inside = (self.range.start()..self.range.end()).contains(&start);
            }
            let found = line.strip_prefix("AnonHugePages:").and_then(|found| found.strip_suffix("kB"));
            kib += found.filter(|_| is_inside).map_or(0, |found| found.trim().parse().unwrap_or(0));
        }
        kib << 10
    }
}

/// A region whose pages are all present, with nothing written.
fn tracked(bytes: usize) -> SharedRegion {
    let pool = Pool::new().expect("a pool");
    let builder = Region::builder().chunk(Chunk::hole(bytes as u64)).writable().track_changes();
    let region = builder.build_shared(&pool).expect("a region");
    region.populate(..).expect("memory");
    region
}

/// Writes to one page in each `share` pages; returns their number.
fn write_share(region: &SharedRegion, share: usize, seed: u64) -> usize {
    let mut random = fastrand::Rng::with_seed(seed);
    let runs = region.len() / PAGE / share;
    for run in 0..runs {
        let page = run * share + random.usize(..share);
        region.write_at((page * PAGE) as u64, &[1]).expect("a page");
    }
    runs
}

/// The number of pages without a write-protect marker, by `/proc/self/pagemap`, which tells nothing
/// else and protects no page again.
fn read_pagemap(region: &SharedRegion) -> usize {
    let pagemap = File::open("/proc/self/pagemap").expect("/proc");
    let first = region.as_ptr().addr().get() / PAGE;
    let mut entries = vec![0; ENTRIES * ENTRY];
    let (mut page, mut written) = (0, 0);
    while page < region.len() / PAGE {
        let wanted = ENTRIES.min(region.len() / PAGE - page) * ENTRY;
        let entries = &mut entries[..wanted];
        pagemap.read_exact_at(entries, ((first + page) * ENTRY) as u64).expect("entries");
        // Bit 57: the marker.
        written += entries.chunks_exact(ENTRY).filter(|entry| entry[7] & 2 == 0).count();
        page += wanted / ENTRY;
    }
    written
}

const ENTRY: usize = 8;
/// The entries of one read: those of 32 MiB, which is the quickest here.
const ENTRIES: usize = 8192;
