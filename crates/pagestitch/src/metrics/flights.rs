//! The faults that are being served at this moment: how many, and since when.

use pagestitch_kernel::Page;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A place for each fault in flight. Workers are few; who finds no place is not counted.
#[derive(Debug)]
pub(crate) struct Flights {
    /// Since when, in nanoseconds; 0 where nobody is.
    since: [AtomicU64; PLACES],
    page: [AtomicU64; PLACES],
}

/// A fault in flight, until it is dropped.
#[derive(Debug)]
pub(crate) struct Flight<'f> {
    flights: &'f Flights,
    place: usize,
}

impl Flights {
    pub(super) fn new() -> Self {
        let zeros = || std::array::from_fn(|_| AtomicU64::new(0));
        Self { since: zeros(), page: zeros() }
    }

    /// Takes a place for a fault on a page that was read at a moment.
    pub(super) fn begin(&self, page: Page, read: Instant) -> Option<Flight<'_>> {
        let now = nanoseconds(read);
        let free =
            |since: &AtomicU64| since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let place = self.since.iter().position(free)?;
        self.page[place].store(page.0 as u64, Ordering::Relaxed);
        Some(Flight { flights: self, place })
    }

    pub(super) fn count(&self) -> usize {
        self.since.iter().filter(|since| since.load(Ordering::Relaxed) > 0).count()
    }

    /// The oldest: its page, and its age.
    pub(super) fn oldest(&self) -> Option<(Page, Duration)> {
        let now = nanoseconds(Instant::now());
        let all = self.since.iter().map(|since| since.load(Ordering::Relaxed)).enumerate();
        let (place, since) = all.filter(|&(_, since)| since > 0).min_by_key(|&(_, since)| since)?;
        let page = Page(self.page[place].load(Ordering::Relaxed) as usize);
        Some((page, Duration::from_nanos(now.saturating_sub(since))))
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.since[self.place].store(0, Ordering::Relaxed);
    }
}

/// Since a moment before all others of this process; never 0.
fn nanoseconds(moment: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(|| moment);
    u64::try_from(moment.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX).max(1)
}

const PLACES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_in_flight_is_told_until_it_lands() {
        let flights = Flights::new();
        assert!(flights.oldest().is_none());
        let first = flights.begin(Page(7), Instant::now()).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let second = flights.begin(Page(9), Instant::now()).unwrap();
        assert_eq!(flights.count(), 2);
        let (page, age) = flights.oldest().unwrap();
        assert!(page == Page(7) && age >= Duration::from_millis(2), "{page:?} {age:?}");
        drop(first);
        assert_eq!(flights.oldest().unwrap().0, Page(9));
        drop(second);
        assert_eq!(flights.count(), 0);
    }

    #[test]
    fn more_than_there_are_places_for_are_not_counted_and_harm_nothing() {
        let flights = Flights::new();
        let taken: Vec<_> = (0..100).filter_map(|page| flights.begin(Page(page), Instant::now())).collect();
        assert_eq!((taken.len(), flights.count()), (PLACES, PLACES));
        drop(taken);
        assert_eq!(flights.count(), 0);
    }
}
