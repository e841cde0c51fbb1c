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
//! A stream begins with two faults on adjacent pages, and its window doubles at each marker. Random
//! touches meet no marker, and fill one page each.

use pagestitch_kernel::{Page, Span};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The number of pages that are filled ahead of their touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Readahead {
    /// A fault fills one page, or the pages that its source reads at once
    /// ([`granularity`](crate::Source::granularity)). For sources whose reads are slow or cost
    /// money, because filling ahead occupies a worker.
    None,
    /// Pages ahead of a sequential reader are filled, up to 32 MiB, for up to eight readers of a
    /// region. A block of 2 MiB is filled when its faults have cost as much as that would, in any
    /// order. The default.
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
    /// Packed [`Stream`]s; 0 is none, because no stream has its marker at page 0.
    streams: [AtomicU64; STREAMS],
    /// The number of streams so far: modulo [`STREAMS`], the entry to replace next.
    oldest: AtomicUsize,
    /// The pages of the region.
    pages: usize,
    /// The pages of a block, if whole blocks can be filled at once.
    block: Option<usize>,
}

/// One reader: its marker, and the pages filled ahead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    marker: usize,
    /// The number of pages filled after the marker or, with `whole`, before it.
    window: usize,
    /// The number of pages filled ahead between the last marker and this one: the reader has passed
    /// them when it faults at this one.
    due: usize,
    /// True if the window consists of whole blocks.
    whole: bool,
}

impl Streams {
    pub(super) fn new(pages: usize, block: Option<usize>) -> Option<Self> {
        // The packed marker has 32 bits. A region of more than 4 TiB in pages of 4 KiB has no
        // streams.
        let fits = pages <= (u32::MAX / 4) as usize;
        fits.then(|| Self { streams: Default::default(), oldest: AtomicUsize::new(0), pages, block })
    }

    /// Records a fault that fills `filled`: its page, or the pages that its source reads at once.
    /// Returns the pages to fill in addition.
    pub(super) fn on_fault(&self, filled: Span) -> Prefetch {
        for slot in &self.streams {
            let seen = slot.load(Ordering::Relaxed);
            let stream = Stream::unpack(seen);
            if seen == 0 || !filled.contains(Page(stream.marker)) {
                continue;
            }
            let (next, prefetch) = self.advance(stream, filled);
            // Only one worker has claimed the marker's page. If another stream has taken the entry
            // meanwhile, that stream keeps it.
            let taken = slot.compare_exchange(seen, next.pack(), Ordering::Relaxed, Ordering::Relaxed);
            return if taken.is_ok() { prefetch } else { Prefetch::default() };
        }
        let slot = self.oldest.fetch_add(1, Ordering::Relaxed) % STREAMS;
        // The next page becomes a marker, with no page filled after it.
        let begun = Stream { marker: filled.end().0, window: 0, due: 0, whole: false };
        self.streams[slot].store(begun.pack(), Ordering::Relaxed);
        Prefetch::default()
    }

    /// The next state of a stream whose reader has faulted at its marker, and the pages to fill.
    /// The fault fills `unit`, which holds the marker.
    fn advance(
        &self,
        Stream { marker, window, due: passed, whole }: Stream,
        unit: Span,
    ) -> (Stream, Prefetch) {
        let twice = (2 * window).max(WINDOW_MIN).next_multiple_of(unit.pages);
        match self.block {
            Some(block) if whole => {
                let window = twice.min(BLOCKS_MAX * block);
                let prefetch = Prefetch {
                    with_fault: self.inside(marker, marker + block),
                    after_fault: self.inside(marker + block, marker + window),
                    consumed: passed,
                };
                // The first block is filled with the fault, not ahead.
                (Stream { marker: marker + window, window, due: window - block, whole }, prefetch)
            }
            Some(block) if twice >= block => {
                let filled = unit.end().0 + window;
                let end = (filled + twice).next_multiple_of(block);
                let prefetch =
                    Prefetch { with_fault: None, after_fault: self.inside(filled, end), consumed: passed };
                let due = window + (end - filled);
                (Stream { marker: end, window: twice, due, whole: true }, prefetch)
            }
            _ => {
                let filled = unit.end().0 + window;
                let (window, due) = (twice.min(WINDOW_MAX), window);
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
        let end = end.min(self.pages);
        (first < end).then(|| Span { first: Page(first), pages: end - first })
    }
}

impl Stream {
    /// 32 bits, 16, 15 and 1: a window is no more than 16 blocks of 512 pages.
    const fn pack(self) -> u64 {
        let Self { marker, window, due, whole } = self;
        (marker as u64) << 32 | (due as u64) << 16 | (window as u64) << 1 | whole as u64
    }

    const fn unpack(packed: u64) -> Self {
        let (marker, due) = ((packed >> 32) as usize, (packed >> 16 & 0xffff) as usize);
        Self { marker, window: (packed & 0xffff) as usize >> 1, due, whole: packed & 1 == 1 }
    }
}

const STREAMS: usize = 8;
const WINDOW_MIN: usize = 8;
/// 2 MiB of pages of 4 KiB: in a larger window, the fixed cost of a call is negligible anyway.
const WINDOW_MAX: usize = 512;
/// 32 MiB: in a larger window, the cost of its one fault is negligible anyway.
const BLOCKS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Reads pages in order. Returns the number of faults, and the number of pages of each
    /// prefetch.
    fn read(streams: &Streams, pages: impl Iterator<Item = usize>) -> (usize, Vec<usize>) {
        let (mut present, mut faults, mut windows) = (std::collections::HashSet::new(), 0, Vec::new());
        for page in pages {
            if !present.insert(page) {
                continue;
            }
            faults += 1;
            let Prefetch { with_fault: now, after_fault: ahead, .. } = streams.on_fault(Page(page).span());
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
        let streams = Streams::new(10_000, None).unwrap();
        let (faults, windows) = read(&streams, 0..10_000);
        assert!(faults < 40, "{faults} faults for 10,000 pages");
        assert!(windows.is_sorted_by(|a, b| b >= a || *b < 512), "{windows:?}");
        assert_eq!(windows.iter().max(), Some(&512));
    }

    /// The reader of a source that is read in units is followed from unit to unit.
    #[test]
    fn a_reader_of_units_faults_once_a_window_of_whole_units() {
        for block in [None, Some(512)] {
            let streams = Streams::new(100 * 512, block).unwrap();
            let (mut present, mut faults) = (BTreeSet::new(), 0);
            for page in 0..100 * 512 {
                if present.contains(&page) {
                    continue;
                }
                faults += 1;
                let unit = Span { first: Page(page / 16 * 16), pages: 16 };
                let Prefetch { with_fault, after_fault, .. } = streams.on_fault(unit);
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
        let streams = Streams::new(100 * 512, Some(512)).unwrap();
        let (faults, windows) = read(&streams, 0..100 * 512);
        assert!(faults < 25, "{faults} faults for 100 blocks");
        assert_eq!(windows.iter().max(), Some(&(15 * 512)));
        let mut stream = Stream { marker: 3 * 512, window: 512, due: 512, whole: true };
        for blocks in [2, 4, 8, 16, 16] {
            let (next, prefetch) = streams.advance(stream, Page(stream.marker).span());
            assert_eq!(prefetch.with_fault, streams.inside(stream.marker, stream.marker + 512));
            assert_eq!((next.marker, next.window), (stream.marker + blocks * 512, blocks * 512));
            assert_eq!(Stream::unpack(next.pack()), next);
            stream = next;
        }
    }

    #[test]
    fn each_marker_counts_the_prefetched_pages_that_the_reader_has_passed() {
        for block in [None, Some(512)] {
            let streams = Streams::new(100 * 512, block).unwrap();
            let (mut present, mut ahead, mut passed) = (BTreeSet::new(), BTreeSet::<usize>::new(), 0);
            for page in 0..100 * 512 {
                if present.contains(&page) {
                    continue;
                }
                let prefetch = streams.on_fault(Page(page).span());
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
            let streams = Streams::new(pages, block).unwrap();
            for page in 0..pages {
                let prefetch = streams.on_fault(Page(page).span());
                for span in [prefetch.with_fault, prefetch.after_fault].into_iter().flatten() {
                    assert!(span.end().0 <= pages && !span.is_empty(), "{span:?} of {pages}");
                }
            }
        }
    }

    #[test]
    fn random_touches_stay_at_one_page() {
        let streams = Streams::new(100_000, Some(512)).unwrap();
        let (_, windows) = read(&streams, (0..5_000).map(|i| i * 7919 % 100_000));
        assert!(windows.is_empty(), "{windows:?}");
    }

    #[test]
    fn several_readers_have_a_stream_each() {
        let streams = Streams::new(1 << 20, None).unwrap();
        let interleaved = (0..4_000).flat_map(|page| (0..8).map(move |reader| reader * 100_000 + page));
        let (faults, _) = read(&streams, interleaved);
        assert!(faults < 8 * 40, "{faults} faults for 8 times 4,000 pages");
    }
}
