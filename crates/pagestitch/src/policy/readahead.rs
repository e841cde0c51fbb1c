//! Readahead: a sequential reader finds its next pages filled already; the worker fills while the
//! reader reads.
//!
//! ```text
//!   pages:        marker                         end
//!     ... read |    m    |  filled ahead  ........  |       a fault at m says: half-way, go on
//!                                               m'  |  filled ahead, twice as far ......... | end'
//!   blocks:                                                 marker
//!     ... read | block filled with the fault | blocks filled ahead | m'    a fault at m': go on from there
//! ```
//!
//! The touch of a present page sends no event; the fault at the marker does. As long as the window
//! is smaller than a block, the marker is a page left out on purpose *before* what is filled, so
//! that it is touched while the rest is still to be read. From a block on, nothing is left out, as
//! only a whole block can move in at once: the marker is the first page *after* the window. A
//! stream begins with two faults in a row, and its window doubles at each marker. Random touches
//! meet no marker and stay at one page each.

use pagestitch_kernel::{Page, Span};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How far ahead of a sequential reader pages are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Readahead {
    /// Not at all: a fault fills one page. For sources that are dear or slow to read: filling ahead
    /// occupies the worker that served the fault.
    None,
    /// As far as the reading so far suggests, up to 32 MiB, for up to eight readers of a region;
    /// and a whole block of 2 MiB where its faults have cost as much as filling it would, in
    /// whatever order they came. The default.
    ///
    /// A thread that touches a page of such a fill waits for that fill, up to a block of it: where
    /// the slowest touch matters more than the time of all, choose [`None`](Self::None).
    ///
    /// A page whose source fails is left alone, and asked for again when it is touched.
    #[default]
    Adaptive,
}

/// What to install beside the page of a fault.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Prefetch {
    /// Together with it: the waiters of the page wait for these too.
    pub(crate) with_fault: Option<Span>,
    /// After it, while its waiters run.
    pub(crate) after_fault: Option<Span>,
    /// How many pages that were filled ahead the reader has passed by since it was last heard of.
    pub(crate) consumed: usize,
}

/// The sequential readers of one region.
#[derive(Debug)]
pub(super) struct Streams {
    /// A [`Stream`] each, packed; 0 for none, as no stream has its marker at page 0.
    streams: [AtomicU64; STREAMS],
    oldest: AtomicUsize,
    pages: usize,
    /// Pages in a block, where whole blocks can be filled at once.
    block: Option<usize>,
}

/// One reader: the page whose fault tells where it is, and how much was filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    marker: usize,
    /// How many pages were filled behind the marker; or, with `whole`, before it.
    window: usize,
    /// How many pages were filled ahead between the marker before and this one: the reader has
    /// passed them when it comes here.
    due: usize,
    whole: bool,
}

impl Streams {
    pub(super) fn new(pages: usize, block: Option<usize>) -> Option<Self> {
        // 4 TiB in pages of 4 KiB: farther, streams are not told apart.
        let told_apart = pages <= (u32::MAX / 4) as usize;
        told_apart.then(|| Self { streams: Default::default(), oldest: AtomicUsize::new(0), pages, block })
    }

    /// Takes note of a fault that fills `page`; says what else to fill.
    pub(super) fn on_fault(&self, page: Page) -> Prefetch {
        for slot in &self.streams {
            let seen = slot.load(Ordering::Relaxed);
            let stream = Stream::unpack(seen);
            if stream.marker != page.0 || seen == 0 {
                continue;
            }
            let (next, prefetch) = self.advance(stream);
            // Two workers cannot both have claimed the marker's page; if another stream took the
            // slot, leave it.
            let taken = slot.compare_exchange(seen, next.pack(), Ordering::Relaxed, Ordering::Relaxed);
            return if taken.is_ok() { prefetch } else { Prefetch::default() };
        }
        let slot = self.oldest.fetch_add(1, Ordering::Relaxed) % STREAMS;
        // The next page is a marker with nothing filled behind it.
        let begun = Stream { marker: page.0 + 1, window: 0, due: 0, whole: false };
        self.streams[slot].store(begun.pack(), Ordering::Relaxed);
        Prefetch::default()
    }

    /// The reader has come to its marker.
    fn advance(&self, Stream { marker, window, due: passed, whole }: Stream) -> (Stream, Prefetch) {
        let twice = (2 * window).max(WINDOW_MIN);
        match self.block {
            Some(block) if whole => {
                let window = twice.min(BLOCKS_MAX * block);
                let prefetch = Prefetch {
                    with_fault: self.inside(marker, marker + block),
                    after_fault: self.inside(marker + block, marker + window),
                    consumed: passed,
                };
                // The first block is the fault's own.
                (Stream { marker: marker + window, window, due: window - block, whole }, prefetch)
            }
            Some(block) if twice >= block => {
                let filled = marker + 1 + window;
                let end = (filled + twice).next_multiple_of(block);
                let prefetch =
                    Prefetch { with_fault: None, after_fault: self.inside(filled, end), consumed: passed };
                let due = window + (end - filled);
                (Stream { marker: end, window: twice, due, whole: true }, prefetch)
            }
            _ => {
                let filled = marker + 1 + window;
                let (window, due) = (twice.min(WINDOW_MAX), window);
                let prefetch = Prefetch {
                    with_fault: None,
                    after_fault: self.inside(filled + 1, filled + 1 + window),
                    consumed: passed,
                };
                (Stream { marker: filled, window, due, whole }, prefetch)
            }
        }
    }

    /// As much of some pages as there is in the region.
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
/// 2 MiB of pages of 4 KiB: past it, a call's own cost no longer shows.
const WINDOW_MAX: usize = 512;
/// 32 MiB: past it, neither does that of a fault for each window.
const BLOCKS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Reads pages in order; says which were faults, and which of those read ahead how much.
    fn read(streams: &Streams, pages: impl Iterator<Item = usize>) -> (usize, Vec<usize>) {
        let (mut present, mut faults, mut windows) = (std::collections::HashSet::new(), 0, Vec::new());
        for page in pages {
            if !present.insert(page) {
                continue;
            }
            faults += 1;
            let Prefetch { with_fault: now, after_fault: ahead, .. } = streams.on_fault(Page(page));
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

    #[test]
    fn from_a_block_on_whole_blocks_are_filled_and_nothing_is_left_out() {
        let streams = Streams::new(100 * 512, Some(512)).unwrap();
        let (faults, windows) = read(&streams, 0..100 * 512);
        assert!(faults < 25, "{faults} faults for 100 blocks");
        assert_eq!(windows.iter().max(), Some(&(15 * 512)));
        let mut stream = Stream { marker: 3 * 512, window: 512, due: 512, whole: true };
        for blocks in [2, 4, 8, 16, 16] {
            let (next, prefetch) = streams.advance(stream);
            assert_eq!(prefetch.with_fault, streams.inside(stream.marker, stream.marker + 512));
            assert_eq!((next.marker, next.window), (stream.marker + blocks * 512, blocks * 512));
            assert_eq!(Stream::unpack(next.pack()), next);
            stream = next;
        }
    }

    #[test]
    fn at_each_marker_it_is_known_what_the_reader_has_passed_of_what_was_filled_ahead() {
        for block in [None, Some(512)] {
            let streams = Streams::new(100 * 512, block).unwrap();
            let (mut present, mut ahead, mut passed) = (BTreeSet::new(), BTreeSet::<usize>::new(), 0);
            for page in 0..100 * 512 {
                if present.contains(&page) {
                    continue;
                }
                let prefetch = streams.on_fault(Page(page));
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
    fn nothing_is_read_past_the_end() {
        for (pages, block) in (1..200).flat_map(|pages| [(pages, None), (pages, Some(16))]) {
            let streams = Streams::new(pages, block).unwrap();
            for page in 0..pages {
                let prefetch = streams.on_fault(Page(page));
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
    fn several_readers_are_told_apart() {
        let streams = Streams::new(1 << 20, None).unwrap();
        let interleaved = (0..4_000).flat_map(|page| (0..8).map(move |reader| reader * 100_000 + page));
        let (faults, _) = read(&streams, interleaved);
        assert!(faults < 8 * 40, "{faults} faults for 8 times 4,000 pages");
    }
}
