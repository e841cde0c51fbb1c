//! The faults that are being served at this moment: how many, and since when.

use pagestitch_kernel::Page;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A place for each fault in flight. Workers are few; who finds no place is not counted.
#[derive(Debug)]
pub(crate) struct Flights {
    /// Since when, in nanoseconds; 0 where nobody is.
    since: [AtomicU64; PLACES],
    page: [AtomicU64; PLACES],
    /// Who waits, by the kernel's number; 0 where that is not known.
    thread: [AtomicU32; PLACES],
    /// What was done about it: [`TOLD`], [`GIVEN_UP`].
    done: [AtomicU8; PLACES],
}

/// A fault that has been in flight for long.
#[derive(Debug)]
pub(crate) struct Overdue {
    pub(crate) page: Page,
    pub(crate) age: Duration,
    pub(crate) thread: u32,
    place: usize,
    since: u64,
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
        let (thread, done) =
            (std::array::from_fn(|_| AtomicU32::new(0)), std::array::from_fn(|_| AtomicU8::new(0)));
        Self { since: zeros(), page: zeros(), thread, done }
    }

    /// Takes a place for a fault on a page that was read at a moment.
    pub(super) fn begin(&self, page: Page, thread: u32, read: Instant) -> Option<Flight<'_>> {
        let now = nanoseconds(read);
        let free =
            |since: &AtomicU64| since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let place = self.since.iter().position(free)?;
        self.page[place].store(page.0 as u64, Ordering::Relaxed);
        self.thread[place].store(thread, Ordering::Relaxed);
        self.done[place].store(0, Ordering::Relaxed);
        Some(Flight { flights: self, place })
    }

    pub(super) fn count(&self) -> usize {
        self.since.iter().filter(|since| since.load(Ordering::Relaxed) > 0).count()
    }

    /// Those that are as old, or older.
    pub(super) fn overdue(&self, age: Duration) -> impl Iterator<Item = Overdue> {
        let now = nanoseconds(Instant::now());
        self.since.iter().enumerate().filter_map(move |(place, since)| {
            let since = Some(since.load(Ordering::Relaxed)).filter(|&since| since > 0)?;
            let old = Duration::from_nanos(now.saturating_sub(since));
            let page = Page(self.page[place].load(Ordering::Relaxed) as usize);
            let thread = self.thread[place].load(Ordering::Relaxed);
            (old >= age).then_some(Overdue { page, age: old, thread, place, since })
        })
    }

    /// True the first time that this is done about it, if it is still in flight.
    pub(super) fn first(&self, fault: &Overdue, what: u8) -> bool {
        let before = self.done[fault.place].fetch_or(what, Ordering::Relaxed);
        before & what == 0 && self.since[fault.place].load(Ordering::Relaxed) == fault.since
    }

    /// Ends a flight that was [kept](Flight::keep).
    pub(super) fn land(&self, place: usize) {
        self.since[place].store(0, Ordering::Relaxed);
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

impl Flight<'_> {
    /// Keeps it in flight until it is landed by its place.
    pub(crate) fn keep(self) -> usize {
        let place = self.place;
        std::mem::forget(self);
        place
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.land(self.place);
    }
}

/// Since a moment before all others of this process; never 0.
fn nanoseconds(moment: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(|| moment);
    u64::try_from(moment.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX).max(1)
}

pub(super) const TOLD: u8 = 1;
pub(super) const GIVEN_UP: u8 = 2;
const PLACES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_in_flight_is_told_until_it_lands() {
        let flights = Flights::new();
        assert!(flights.oldest().is_none());
        let first = flights.begin(Page(7), 1, Instant::now()).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let second = flights.begin(Page(9), 1, Instant::now()).unwrap();
        assert_eq!(flights.count(), 2);
        let (page, age) = flights.oldest().unwrap();
        assert!(page == Page(7) && age >= Duration::from_millis(2), "{page:?} {age:?}");
        drop(first);
        assert_eq!(flights.oldest().unwrap().0, Page(9));
        drop(second);
        assert_eq!(flights.count(), 0);
    }

    #[test]
    fn what_is_overdue_is_told_once_each_time_it_flies() {
        let flights = Flights::new();
        for _ in 0..2 {
            let flight = flights.begin(Page(7), 42, Instant::now()).unwrap();
            assert_eq!(flights.overdue(Duration::from_secs(1)).count(), 0);
            let fault = flights.overdue(Duration::ZERO).next().unwrap();
            assert_eq!((fault.page, fault.thread), (Page(7), 42));
            assert!(
                flights.first(&fault, TOLD)
                    && !flights.first(&fault, TOLD)
                    && flights.first(&fault, GIVEN_UP)
            );
            let place = flight.keep();
            assert_eq!(flights.count(), 1);
            flights.land(place);
            assert!(flights.count() == 0 && !flights.first(&fault, 4), "it has landed");
        }
    }

    #[test]
    fn more_than_there_are_places_for_are_not_counted_and_harm_nothing() {
        let flights = Flights::new();
        let taken: Vec<_> =
            (0..100).filter_map(|page| flights.begin(Page(page), 1, Instant::now())).collect();
        assert_eq!((taken.len(), flights.count()), (PLACES, PLACES));
        drop(taken);
        assert_eq!(flights.count(), 0);
    }
}
