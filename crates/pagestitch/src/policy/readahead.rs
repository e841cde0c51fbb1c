//! Readahead: who reads page after page finds the next ones filled already; the worker fills while the reader reads.
//!
//! ```text
//!             marker                         end
//!   ... read |  m  |  filled ahead  ........  |          a fault at m says: half-way, go on
//!                                             m'  |  filled ahead, twice as far ......... | end'
//! ```
//!
//! The marker is a page left out on purpose. Nobody tells us of a page that is touched when it is there; the fault
//! at the marker does, and it comes while the pages behind it are still to be read, so that filling and reading
//! overlap. A stream begins with two faults in a row, and its window doubles at each marker. Random touches meet no
//! marker and stay at one page each.

use pagestitch_kernel::{Page, Span};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How far ahead of a sequential reader pages are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Readahead {
    /// Not at all: a fault fills one page. For sources that are dear or slow to read: filling ahead occupies the
    /// worker that served the fault.
    None,
    /// As far as the reading so far suggests, up to 2 MiB at once, for up to eight readers of a region. The default.
    ///
    /// A page whose source fails is left alone, and asked for again when it is touched.
    #[default]
    Adaptive,
}

/// The sequential readers of one region.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Marker and end of each, 32 bits a page; 0 for none, as no stream has its marker at page 0.
    streams: [AtomicU64; STREAMS],
    oldest: AtomicUsize,
    pages: usize,
}

impl Streams {
    pub(crate) fn new(readahead: Readahead, pages: usize) -> Option<Self> {
        match readahead {
            Readahead::None => None,
            // 8 TiB in pages of 4 KiB: farther, streams are not told apart.
            Readahead::Adaptive => (pages <= (u32::MAX / 2) as usize).then(|| Self {
                streams: Default::default(),
                oldest: AtomicUsize::new(0),
                pages,
            }),
        }
    }

    /// Takes note of a fault that fills `page`; says what else to fill.
    pub(crate) fn widen(&self, page: Page) -> Option<Span> {
        for stream in &self.streams {
            let seen = stream.load(Ordering::Relaxed);
            let (marker, end) = unpack(seen);
            if marker != page.0 || seen == 0 {
                continue;
            }
            let window = (2 * (end - marker)).clamp(WINDOW_MIN, WINDOW_MAX);
            let next = pack(end, end + 1 + window);
            // Two workers cannot both have claimed the marker's page; if another stream took the slot, leave it.
            stream.compare_exchange(seen, next, Ordering::Relaxed, Ordering::Relaxed).ok()?;
            let first = (end + 1).min(self.pages);
            return Some(Span { first: Page(first), pages: window.min(self.pages - first) });
        }
        let slot = self.oldest.fetch_add(1, Ordering::Relaxed) % STREAMS;
        // The next page is a marker with nothing filled behind it.
        self.streams[slot].store(pack(page.0 + 1, page.0 + 2), Ordering::Relaxed);
        None
    }
}

const fn pack(marker: usize, end: usize) -> u64 {
    (marker as u64) << 32 | (end as u64 & 0xffff_ffff)
}

const fn unpack(packed: u64) -> (usize, usize) {
    ((packed >> 32) as usize, (packed & 0xffff_ffff) as usize)
}

const STREAMS: usize = 8;
const WINDOW_MIN: usize = 8;
/// 2 MiB of pages of 4 KiB: past it, a call's own cost no longer shows.
const WINDOW_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads pages in order; says which were faults, and which of those read ahead how much.
    fn read(streams: &Streams, pages: impl Iterator<Item = usize>) -> (usize, Vec<usize>) {
        let (mut present, mut faults, mut windows) = (std::collections::HashSet::new(), 0, Vec::new());
        for page in pages {
            if !present.insert(page) {
                continue;
            }
            faults += 1;
            if let Some(ahead) = streams.widen(Page(page)) {
                present.extend(ahead.iter().map(|page| page.0));
                windows.push(ahead.pages);
            }
        }
        (faults, windows)
    }

    #[test]
    fn a_sequential_reader_faults_once_a_window_and_its_window_doubles() {
        let streams = Streams::new(Readahead::Adaptive, 10_000).unwrap();
        let (faults, windows) = read(&streams, 0..10_000);
        assert!(faults < 40, "{faults} faults for 10,000 pages");
        assert!(windows.is_sorted_by(|a, b| b >= a || *b < 512), "{windows:?}");
        assert_eq!(windows.iter().max(), Some(&512));
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        for pages in 1..50 {
            let streams = Streams::new(Readahead::Adaptive, pages).unwrap();
            for page in 0..pages {
                if let Some(ahead) = streams.widen(Page(page)) {
                    assert!(ahead.end().0 <= pages, "{ahead:?} of {pages}");
                }
            }
        }
    }

    #[test]
    fn random_touches_stay_at_one_page() {
        let streams = Streams::new(Readahead::Adaptive, 100_000).unwrap();
        let (_, windows) = read(&streams, (0..5_000).map(|i| i * 7919 % 100_000));
        assert!(windows.is_empty(), "{windows:?}");
    }

    #[test]
    fn several_readers_are_told_apart() {
        let streams = Streams::new(Readahead::Adaptive, 1 << 20).unwrap();
        let interleaved = (0..4_000).flat_map(|page| (0..8).map(move |reader| reader * 100_000 + page));
        let (faults, _) = read(&streams, interleaved);
        assert!(faults < 8 * 40, "{faults} faults for 8 times 4,000 pages");
    }
}
