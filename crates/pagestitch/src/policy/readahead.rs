//! Readahead: workers fill the next pages of a sequential reader while it reads.
//!
//! ```text
//!   pages:        marker                         end
//!     ... read |    m    |  filled ahead  ........  |       a fault at m: the reader is half-way
//!                                               m'  |  filled ahead, twice as far ......... | end'
//!   blocks:                                                 marker
//!     ... read | block filled with the fault | blocks filled ahead | m'    a fault at m': next window
//! ```
//!
//! The touch of a present page sends no event, so one page stays absent: the *marker*, whose fault
//! tells that the reader has come there. A window smaller than a block has its marker *before* the
//! filled pages, so that the next window is filled while this one is read. A window of blocks has
//! its marker *after* them, because only a whole block can move in at once.
//!
//! A reader that is faster than the workers faults before its marker. If that is at the start of a
//! block, the block is filled with the fault.
//!
//! A stream begins with two faults on adjacent pages, and its window doubles at each marker. Random
//! touches meet no marker, and fill one page each. The streams of a region share a
//! [budget](BUDGET): each of many streams has a smaller window.

use crate::policy::stream_table::{Stream, StreamTable};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Page, PageSize, Span};

/// The number of pages that are filled ahead of their touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Readahead {
    /// A fault fills one page, or the pages that its source reads at once
    /// ([`granularity`](crate::Source::granularity)). For sources whose reads are slow or cost
    /// money, because filling ahead occupies a worker.
    None,
    /// Pages ahead of a sequential reader are filled, up to 32 MiB, and up to 256 MiB ahead of all
    /// readers of a region together. A region follows some hundreds of readers. A block of 2 MiB is
    /// filled when its faults have cost as much as that would, in any order. The default.
    ///
    /// A thread that touches a page of such a fill waits until up to a block is filled. If the
    /// slowest touch matters more than the total time, choose [`None`](Self::None).
    ///
    /// A page whose source fails stays absent, and its source is read again when it is touched.
    #[default]
    Adaptive,
}

/// The pages to install in addition to the page of a fault.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Prefetch {
    /// Installed with the faulting page, whose waiters wait for all of them.
    pub(crate) with_fault: Option<Span>,
    /// Installed later, while the waiters run.
    pub(crate) after_fault: Option<Span>,
    /// The number of pages filled ahead that the reader has passed since its last marker.
    pub(crate) consumed: usize,
}

/// The sequential readers of one region.
#[derive(Debug)]
pub(super) struct Streams {
    table: StreamTable,
    /// The pages of a block, if whole blocks can be filled at once.
    block: Option<usize>,
    /// The most pages filled ahead of all streams together, except for the smallest windows.
    budget: usize,
}

impl Streams {
    pub(super) fn new(pages: usize, size: PageSize, block: Option<usize>) -> Option<Self> {
        // A packed marker has 32 bits. A region of more than 4 TiB in pages of 4 KiB has no streams.
        let fits = pages <= (u32::MAX / 4) as usize;
        let budget = BUDGET / size.bytes();
        fits.then(|| Self { table: StreamTable::new(pages), block, budget })
    }

    /// Fills at most so many pages ahead of all streams together.
    pub(super) fn with_most(self, most: Option<usize>) -> Self {
        Self { budget: most.unwrap_or(self.budget).min(self.budget), ..self }
    }

    /// Notes the number of pages of a region that grows.
    pub(super) fn set_pages(&self, pages: usize) {
        self.table.set_pages(pages);
    }

    /// Records a fault that fills `filled`: its page, or the pages that its source reads at once.
    /// Returns the pages to fill in addition.
    pub(super) fn on_fault(&self, filled: Span, is_present: impl FnOnce(Page) -> bool) -> Prefetch {
        if let Some(stream) = self.table.take(filled) {
            return self.follow(stream, filled);
        }
        if let Some(block) = self.block_of_fast_reader(filled.first, is_present) {
            return Prefetch { with_fault: Some(block), ..Prefetch::default() };
        }
        // The next page becomes a marker, with no page filled after it.
        self.table.begin(filled.end().0);
        Prefetch::default()
    }

    /// The block that begins with a page, if the page before it is present: a reader comes from
    /// there, and is faster than the workers that fill pages ahead of it.
    fn block_of_fast_reader(&self, first: Page, is_present: impl FnOnce(Page) -> bool) -> Option<Span> {
        let block = self.block?;
        let follows = first.0 % block == 0 && first.0 > 0 && is_present(Page(first.0 - 1));
        if follows { self.inside(first.0, first.0 + block) } else { None }
    }

    #[cold]
    fn follow(&self, stream: Stream, filled: Span) -> Prefetch {
        // With few streams, those of readers that have ended take no share that others need.
        if self.table.streams() >= FULL_WINDOWS {
            self.table.sweep();
        }
        self.table.advance(self.budget, |most| self.advance(stream, filled, most))
    }

    /// The next state of a stream whose reader has faulted at its marker, and the pages to fill.
    /// The fault fills `unit`, which holds the marker. At most `most` pages are ahead of the reader
    /// then, unless the window is the smallest.
    fn advance(
        &self,
        Stream { marker, window, due: passed, whole }: Stream,
        unit: Span,
        most: usize,
    ) -> (Stream, Prefetch) {
        let smallest = WINDOW_MIN.next_multiple_of(unit.pages).min(WINDOW_MAX);
        let twice = (2 * window).max(smallest).next_multiple_of(unit.pages);
        let filled = unit.end().0 + window;
        let block_end = |block| (filled + twice).next_multiple_of(block);
        match self.block {
            Some(block) if whole => {
                let window = twice.min(BLOCKS_MAX * block).min(block + most / block * block);
                let prefetch = Prefetch {
                    with_fault: self.inside(marker, marker + block),
                    after_fault: self.inside(marker + block, marker + window),
                    consumed: passed,
                };
                // The first block is filled with the fault, not ahead.
                (Stream { marker: marker + window, window, due: window - block, whole }, prefetch)
            }
            Some(block) if twice >= block && window + block_end(block) - filled <= most => {
                let end = block_end(block);
                let prefetch =
                    Prefetch { with_fault: None, after_fault: self.inside(filled, end), consumed: passed };
                let due = window + (end - filled);
                (Stream { marker: end, window: twice, due, whole: true }, prefetch)
            }
            _ => {
                let most = most.saturating_sub(window) / unit.pages * unit.pages;
                let (window, due) = (twice.min(WINDOW_MAX).min(most.max(smallest)), window);
                let prefetch = Prefetch {
                    with_fault: None,
                    after_fault: self.inside(filled + unit.pages, filled + unit.pages + window),
                    consumed: passed,
                };
                (Stream { marker: filled, window, due, whole }, prefetch)
            }
        }
    }

    /// The part of some pages that lies in the region.
    fn inside(&self, first: usize, end: usize) -> Option<Span> {
        let end = end.min(self.table.pages());
        (first < end).then(|| Span { first: Page(first), pages: end - first })
    }
}

const WINDOW_MIN: usize = 8;
/// 2 MiB of pages of 4 KiB: in a larger window, the fixed cost of a call is negligible anyway.
const WINDOW_MAX: usize = 512;
/// 32 MiB: in a larger window, the cost of its one fault is negligible anyway.
const BLOCKS_MAX: usize = 16;
/// The number of streams that can all have the largest window.
const FULL_WINDOWS: usize = 8;
/// The most bytes filled ahead of all streams of a region together.
const BUDGET: usize = FULL_WINDOWS * BLOCKS_MAX * HUGE;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, HashMap, HashSet};

    fn streams(pages: usize, block: Option<usize>) -> Streams {
        Streams::new(pages, PageSize::new(4096).unwrap(), block).unwrap()
    }

    /// Reads pages in order. Returns the number of faults, and the number of pages of each
    /// prefetch.
    fn read(streams: &Streams, pages: impl Iterator<Item = usize>) -> (usize, Vec<usize>) {
        let (mut present, mut faults, mut windows) = (HashSet::new(), 0, Vec::new());
        for page in pages {
            if !present.insert(page) {
                continue;
            }
            faults += 1;
            let Prefetch { with_fault: now, after_fault: ahead, .. } =
                streams.on_fault(Page(page).span(), |_| false);
            present.extend(now.into_iter().flat_map(Span::iter).map(|page| page.0));
            if let Some(ahead) = ahead {
                present.extend(ahead.iter().map(|page| page.0));
                windows.push(ahead.pages);
            }
        }
        (faults, windows)
    }

    #[test]
    fn a_sequential_reader_faults_once_a_window_and_its_window_doubles() {
        let streams = streams(10_000, None);
        let (faults, windows) = read(&streams, 0..10_000);
        assert!(faults < 40, "{faults} faults for 10,000 pages");
        assert!(windows.is_sorted_by(|a, b| b >= a || *b < 512), "{windows:?}");
        assert_eq!(windows.iter().max(), Some(&512));
    }

    /// The reader of a source that is read in units is followed from unit to unit.
    #[test]
    fn a_reader_of_units_faults_once_a_window_of_whole_units() {
        for block in [None, Some(512)] {
            let streams = streams(100 * 512, block);
            let (mut present, mut faults) = (BTreeSet::new(), 0);
            for page in 0..100 * 512 {
                if present.contains(&page) {
                    continue;
                }
                faults += 1;
                let unit = Span { first: Page(page / 16 * 16), pages: 16 };
                let Prefetch { with_fault, after_fault, .. } = streams.on_fault(unit, |_| false);
                for span in [Some(unit), with_fault, after_fault].into_iter().flatten() {
                    assert_eq!((span.first.0 % 16, span.pages % 16), (0, 0), "{span:?}");
                    present.extend(span.iter().map(|page| page.0));
                }
            }
            assert!(faults < 250, "{faults} faults for 3200 units");
        }
    }

    #[test]
    fn large_windows_consist_of_whole_blocks() {
        let streams = streams(100 * 512, Some(512));
        let (faults, windows) = read(&streams, 0..100 * 512);
        assert!(faults < 25, "{faults} faults for 100 blocks");
        assert_eq!(windows.iter().max(), Some(&(15 * 512)));
        let mut stream = Stream { marker: 3 * 512, window: 512, due: 512, whole: true };
        for blocks in [2, 4, 8, 16, 16] {
            let (next, prefetch) = streams.advance(stream, Page(stream.marker).span(), streams.budget);
            assert_eq!(prefetch.with_fault, streams.inside(stream.marker, stream.marker + 512));
            assert_eq!((next.marker, next.window), (stream.marker + blocks * 512, blocks * 512));
            stream = next;
        }
    }

    #[test]
    fn each_marker_counts_the_prefetched_pages_that_the_reader_has_passed() {
        for block in [None, Some(512)] {
            let streams = streams(100 * 512, block);
            let (mut present, mut ahead, mut passed) = (BTreeSet::new(), BTreeSet::<usize>::new(), 0);
            for page in 0..100 * 512 {
                if present.contains(&page) {
                    continue;
                }
                let prefetch = streams.on_fault(Page(page).span(), |_| false);
                passed += prefetch.consumed;
                assert_eq!(passed, ahead.range(..page).count(), "at page {page}");
                present.extend(prefetch.with_fault.into_iter().flat_map(Span::iter).map(|page| page.0));
                let filled: Vec<_> =
                    prefetch.after_fault.into_iter().flat_map(Span::iter).map(|page| page.0).collect();
                present.extend(&filled);
                ahead.extend(&filled);
            }
            assert!(passed > 100 * 512 / 2);
        }
    }

    #[test]
    fn no_page_past_the_end_is_prefetched() {
        for (pages, block) in (1..200).flat_map(|pages| [(pages, None), (pages, Some(16))]) {
            let streams = streams(pages, block);
            for page in 0..pages {
                let prefetch = streams.on_fault(Page(page).span(), |_| false);
                for span in [prefetch.with_fault, prefetch.after_fault].into_iter().flatten() {
                    assert!(span.end().0 <= pages && !span.is_empty(), "{span:?} of {pages}");
                }
            }
        }
    }

    #[test]
    fn random_touches_stay_at_one_page() {
        let streams = streams(100_000, Some(512));
        let (_, windows) = read(&streams, (0..5_000).map(|i| i * 7919 % 100_000));
        assert!(windows.is_empty(), "{windows:?}");
    }

    /// A guest that touches a tenth of 2 GiB: a touch in a hundred finds the marker of a touch before it by
    /// chance, at most.
    #[test]
    fn random_touches_of_many_pages_prefetch_few() {
        let (streams, mut random) = (streams(1 << 19, None), 1_usize);
        let (mut present, mut touches, mut prefetched) = (HashSet::new(), 0, 0);
        while touches < (1 << 19) / 10 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = random >> 45;
            if !present.insert(page) {
                continue;
            }
            touches += 1;
            let Prefetch { with_fault, after_fault, .. } = streams.on_fault(Page(page).span(), |_| false);
            for span in [with_fault, after_fault].into_iter().flatten() {
                prefetched += span.pages;
                present.extend(span.iter().map(|page| page.0));
            }
        }
        assert!(prefetched < touches / 100, "{prefetched} pages ahead of {touches} touches");
    }

    /// Reads pages in turn, by so many readers at equal distances. Returns the number of faults of
    /// each reader.
    fn interleaved(streams: &Streams, readers: usize) -> Vec<usize> {
        let (part, mut present) = (streams.table.pages() / readers, vec![false; streams.table.pages()]);
        let mut faults = vec![0; readers];
        for (page, reader) in (0..part).flat_map(|page| (0..readers).map(move |reader| (page, reader))) {
            let page = reader * part + page;
            if present[page] {
                continue;
            }
            present[page] = true;
            faults[reader] += 1;
            let Prefetch { with_fault, after_fault, .. } = streams.on_fault(Page(page).span(), |_| false);
            for span in [with_fault, after_fault].into_iter().flatten() {
                present[span.first.0..span.end().0].fill(true);
            }
            let (counted, found) = streams.table.ahead();
            assert!(counted == found && counted <= streams.budget, "{counted} {found}");
        }
        faults
    }

    #[test]
    fn many_interleaved_readers_have_a_stream_each() {
        for block in [None, Some(512)] {
            for readers in [1, 8, 16, 40] {
                let faults = interleaved(&streams(readers * 8192, block), readers);
                assert!(faults.iter().all(|&faults| faults < 60), "{faults:?}");
                let all: usize = faults.iter().sum();
                assert!(all < 35 * readers, "{all} faults of {readers} readers");
            }
        }
    }

    /// Readers that share the blocks of a small region.
    #[test]
    fn readers_of_a_small_region_have_a_stream_each() {
        for readers in [2, 4, 8] {
            let faults = interleaved(&streams(readers * 512, Some(512)), readers);
            assert!(faults.iter().all(|&faults| faults < 60), "{faults:?}");
        }
    }

    #[test]
    fn a_reader_that_is_faster_than_the_workers_faults_once_a_block() {
        let streams = streams(100 * 512, Some(512));
        let (mut present, mut faults) = (HashSet::new(), 0);
        for page in 0..100 * 512 {
            if present.insert(page) {
                faults += 1;
                // No page is filled ahead.
                let answer = streams.on_fault(Page(page).span(), |page| present.contains(&page.0));
                present.extend(answer.with_fault.into_iter().flat_map(Span::iter).map(|page| page.0));
            }
        }
        assert!(faults < 4 * 512 + 100, "{faults} faults of 100 blocks");
    }

    #[test]
    fn touches_at_random_do_not_end_a_stream() {
        let (streams, mut random) = (streams(1 << 20, Some(512)), 1_usize);
        let (mut present, mut faults) = (HashSet::new(), 0);
        for page in 1..8192 {
            if present.insert(page) {
                faults += 1;
                let Prefetch { with_fault, after_fault, .. } = streams.on_fault(Page(page).span(), |_| false);
                let spans = [with_fault, after_fault].into_iter().flatten();
                present.extend(spans.flat_map(Span::iter).map(|page| page.0));
            }
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            streams.on_fault(Page(1 << 19 | random >> 45).span(), |_| false);
        }
        assert!(faults < 40, "{faults} faults");
    }

    /// The pages of a reader in the model.
    const PART: usize = 50_000_000;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Against a list of streams without an end. The table may lose a stream, and then answers
        /// as if the reader had just begun.
        #[test]
        fn the_table_answers_as_a_list_of_all_streams(
            touches in prop::collection::vec((0usize..12, 0usize..20), 0..400), blocks in any::<bool>(),
        ) {
            let streams = streams(12 * PART, blocks.then_some(512));
            let (mut list, mut places, mut jumps) = (HashMap::<usize, Stream>::new(), [0; 12], [0; 12]);
            let (mut lost, mut followed) = (0, 0);
            for (reader, jump) in touches {
                // A reader goes on at its marker, or elsewhere.
                let marker = places[reader];
                let jumps_now = jump == 0 || marker == 0;
                jumps[reader] += usize::from(jumps_now);
                let place = if jumps_now { reader * PART + jumps[reader] * PART / 100 } else { marker };
                let answer = streams.on_fault(Page(place).span(), |_| false);
                let expected = list.remove(&place).map(|stream| {
                    // The answer for some share of the budget.
                    let mut shares = (0..=streams.budget).rev().step_by(512).chain((0..2048).rev());
                    let advance = |most| streams.advance(stream, Page(place).span(), most);
                    shares.find_map(|most| Some(advance(most)).filter(|(_, expected)| *expected == answer))
                });
                match expected {
                    Some(Some((next, _))) => {
                        list.insert(next.marker, next);
                        places[reader] = next.marker;
                        followed += 1;
                    }
                    _ => {
                        lost += usize::from(expected.is_some());
                        prop_assert_eq!(answer, Prefetch::default());
                        let marker = place + 1;
                        list.insert(marker, Stream { marker, window: 0, due: 0, whole: false });
                        places[reader] = marker;
                    }
                }
                let (counted, found) = streams.table.ahead();
                prop_assert_eq!(counted, found);
                prop_assert!(counted <= streams.budget + streams.table.streams() * 2 * WINDOW_MIN);
            }
            prop_assert!(lost <= 20 + followed / 10, "{} of {}", lost, followed);
        }
    }
}
