//! The table of the sequential readers of a region. A reader is found by its marker, without a lock.
//!
//! ```text
//!   set:  | begun | begun | followed | followed | followed | followed | followed | followed |
//!           a page that a reader     ◀─ advanced last              advanced first ─▶  falls out
//!           may touch next
//! ```
//!
//! The block of its marker selects the set of a stream. A set is one cache line, so faults in
//! different blocks seldom write to the same line. Most touches at random leave a begun stream
//! behind. Such streams have places of their own and few of them, because a later touch at random
//! that meets one would be taken for a reader.

use pagestitch_kernel::{Page, Span};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One reader: its marker, and the pages filled ahead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stream {
    pub(super) marker: usize,
    /// The number of pages filled after the marker or, with `whole`, before it.
    pub(super) window: usize,
    /// The number of pages filled ahead between the last marker and this one: the reader has passed
    /// them when it faults at this one.
    pub(super) due: usize,
    /// True if the window consists of whole blocks.
    pub(super) whole: bool,
}

/// The streams of a region.
#[derive(Debug)]
pub(super) struct StreamTable {
    sets: Box<[Set]>,
    /// The pages of the region: a marker lies before its end.
    pages: AtomicUsize,
    /// The number of followed streams.
    streams: AtomicUsize,
    /// The pages filled ahead of all followed streams.
    ahead: AtomicUsize,
    /// The number of advances that looked for abandoned streams.
    sweeps: AtomicUsize,
}

/// Packed streams; 0 is none, because no stream has its marker at page 0.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Streams after one fault, with no page filled ahead.
    begun: [AtomicU64; BEGUN],
    /// The other streams; the one that advanced last is first.
    followed: [AtomicU64; FOLLOWED],
}

impl StreamTable {
    /// A table for a region of so many pages.
    pub(super) fn new(pages: usize) -> Self {
        let sets = pages.div_ceil(SET_PAGES).next_power_of_two().min(SETS_MAX);
        Self {
            sets: (0..sets).map(|_| Set::default()).collect(),
            pages: AtomicUsize::new(pages),
            streams: AtomicUsize::new(0),
            ahead: AtomicUsize::new(0),
            sweeps: AtomicUsize::new(0),
        }
    }

    pub(super) fn pages(&self) -> usize {
        self.pages.load(Ordering::Relaxed)
    }

    /// Notes the number of pages of a region that grows.
    pub(super) fn set_pages(&self, pages: usize) {
        self.pages.store(pages, Ordering::Relaxed);
    }

    /// Takes the stream out whose marker a fault fills.
    pub(super) fn take(&self, filled: Span) -> Option<Stream> {
        let (first, last) = (filled.first.0 / SET_PAGES, (filled.end().0 - 1) / SET_PAGES);
        (first..=last).find_map(|number| self.take_in(self.set(number), filled))
    }

    fn take_in(&self, set: &Set, filled: Span) -> Option<Stream> {
        let begun = set.begun.iter().find_map(|slot| take_from(slot, filled));
        begun.or_else(|| {
            let stream = set.followed.iter().find_map(|slot| take_from(slot, filled))?;
            self.forget(stream);
            Some(stream)
        })
    }

    /// Adds a stream that has begun at a marker, perhaps in the place of another one.
    pub(super) fn begin(&self, marker: usize) {
        if marker >= self.pages() {
            return;
        }
        let begun = Stream { marker, window: 0, due: 0, whole: false }.pack();
        let set = &self.set(marker / SET_PAGES).begun;
        let free = set.iter().position(|slot| slot.load(Ordering::Relaxed) == 0);
        // With a fixed order, readers that fault in turn would replace each other for ever.
        set[free.unwrap_or_else(|| mixed(marker) % BEGUN)].store(begun, Ordering::Relaxed);
    }

    /// Adds a stream that has advanced. `step` decides its next state for the most pages that may be
    /// filled ahead of it, of `budget` pages ahead of all streams together.
    pub(super) fn advance<T>(&self, budget: usize, step: impl Fn(usize) -> (Stream, T)) -> T {
        let share = budget / (self.streams.fetch_add(1, Ordering::Relaxed) + 1);
        let mut taken = None;
        let _ = self.ahead.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ahead| {
            let (stream, step) = step(share.min(budget.saturating_sub(ahead)));
            taken = Some((stream, step));
            Some(ahead + stream.ahead())
        });
        let (stream, step) = taken.expect("the update has run");
        if stream.marker >= self.pages() {
            self.forget(stream);
            return step;
        }
        // The new stream pushes each older one to the next slot, and the oldest one out.
        let mut packed = stream.pack() | RECENT;
        for slot in &self.set(stream.marker / SET_PAGES).followed {
            packed = slot.swap(packed, Ordering::Relaxed);
            if packed == 0 {
                return step;
            }
        }
        self.forget(Stream::unpack(packed));
        step
    }

    /// Removes some streams that have not advanced for [`SWEEP`] calls of this function.
    pub(super) fn sweep(&self) {
        let (each, call) = (SWEEP / self.sets.len(), self.sweeps.fetch_add(1, Ordering::Relaxed));
        if call % each != 0 {
            return;
        }
        for slot in &self.sets[call / each % self.sets.len()].followed {
            let seen = slot.load(Ordering::Relaxed);
            let kept = if seen & RECENT == 0 { 0 } else { seen & !RECENT };
            let swept = slot.compare_exchange(seen, kept, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if seen != 0 && kept == 0 && swept {
                self.forget(Stream::unpack(seen));
            }
        }
    }

    /// The number of followed streams.
    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Counts a followed stream out.
    fn forget(&self, stream: Stream) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        self.ahead.fetch_sub(stream.ahead(), Ordering::Relaxed);
    }

    /// The set for the markers in a block, by the block's number.
    fn set(&self, number: usize) -> &Set {
        &self.sets[mixed(number) & (self.sets.len() - 1)]
    }

    /// The pages filled ahead of all streams, as counted and as found in the table.
    #[cfg(test)]
    pub(super) fn ahead(&self) -> (usize, usize) {
        let packed = self.sets.iter().flat_map(|set| &set.followed).map(|slot| slot.load(Ordering::Relaxed));
        let found = packed.map(|packed| Stream::unpack(packed).ahead()).sum();
        (self.ahead.load(Ordering::Relaxed), found)
    }
}

/// Takes the stream of a slot, if a fault fills its marker.
fn take_from(slot: &AtomicU64, filled: Span) -> Option<Stream> {
    let seen = slot.load(Ordering::Relaxed);
    let stream = Stream::unpack(seen);
    if seen == 0 || !filled.contains(Page(stream.marker)) {
        return None;
    }
    // Another worker may replace the stream at this moment: then the reader starts anew.
    slot.compare_exchange(seen, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok().then_some(stream)
}

/// Scatters numbers, so that readers at equal distances do not meet in one set again and again.
const fn mixed(number: usize) -> usize {
    let folded = (number ^ number >> 7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (folded ^ folded >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40
}

impl Stream {
    /// The most pages that may be filled and not yet touched, when the reader is at its last marker.
    pub(super) const fn ahead(self) -> usize {
        if self.whole { self.due } else { self.due + self.window }
    }

    /// From the low end: 1 bit, 15 for the window, [`RECENT`], 15 and 32. A window is no more than 16
    /// blocks of 512 pages.
    const fn pack(self) -> u64 {
        let Self { marker, window, due, whole } = self;
        (marker as u64) << 32 | (due as u64) << 17 | (window as u64) << 1 | whole as u64
    }

    const fn unpack(packed: u64) -> Self {
        let (marker, due) = ((packed >> 32) as usize, (packed >> 17 & 0x7fff) as usize);
        Self { marker, window: (packed >> 1 & 0x7fff) as usize, due, whole: packed & 1 == 1 }
    }
}

/// The pages whose markers share a set: those of a block of 2 MiB.
const SET_PAGES: usize = 512;
/// A table is 4 KiB at most. It then follows 384 streams.
const SETS_MAX: usize = 64;
const BEGUN: usize = 2;
const FOLLOWED: usize = 6;
/// The number of calls of [`StreamTable::sweep`] that look at all sets once.
const SWEEP: usize = 256;
/// This bit of a packed stream is set if the stream has advanced since the last look.
const RECENT: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_stream_is_unpacked_again() {
        for (marker, window, due, whole) in
            [(1, 0, 0, false), (u32::MAX as usize, 8192, 8704, true), (7, 512, 512, false)]
        {
            let stream = Stream { marker, window, due, whole };
            assert_eq!(
                (Stream::unpack(stream.pack()), Stream::unpack(stream.pack() | RECENT)),
                (stream, stream)
            );
        }
    }

    #[test]
    fn a_full_set_forgets_the_stream_that_advanced_first() {
        let table = StreamTable::new(SET_PAGES);
        let advance =
            |marker| table.advance(1000, |_| (Stream { marker, window: 8, due: 0, whole: false }, ()));
        (1..=FOLLOWED + 1).for_each(advance);
        assert_eq!((table.streams(), table.ahead()), (FOLLOWED, (8 * FOLLOWED, 8 * FOLLOWED)));
        assert_eq!(table.take(Page(1).span()), None);
        assert_eq!(table.take(Page(2).span()).map(|stream| stream.window), Some(8));
        assert_eq!((table.streams(), table.take(Page(2).span())), (FOLLOWED - 1, None));
    }

    #[test]
    fn a_sweep_removes_streams_that_do_not_advance() {
        let table = StreamTable::new(100 * SET_PAGES);
        let advance =
            |marker| table.advance(1000, |_| (Stream { marker, window: 8, due: 0, whole: false }, ()));
        (0..20).for_each(|number| advance(1 + number * SET_PAGES));
        for sweep in 0..2 * SWEEP {
            assert!(sweep >= SWEEP || table.streams() == 20);
            table.sweep();
            if sweep % (SWEEP / 2) == 0 {
                assert!(table.take(Page(1).span()).is_some());
                advance(1);
            }
        }
        assert_eq!((table.streams(), table.ahead()), (1, (8, 8)));
    }
}
