//! The faults in flight: read and not settled yet, with their start times. Faults that wait for a
//! worker are among them.

use pagestitch_kernel::Page;
use pagestitch_kernel::cache::prefetch;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A slot for each fault in flight, in segments. Each segment has twice as many slots as the one
/// before, and is allocated when all of those are taken.
#[derive(Debug)]
pub(crate) struct InFlight {
    segments: [OnceLock<Box<[SlotGroup]>>; SEGMENTS],
    /// True if the thread that reads a fault may allocate a segment.
    grows: bool,
}

/// As many slots as a word has bits.
#[derive(Debug)]
struct SlotGroup {
    taken: AtomicU64,
    slots: [Slot; GROUP],
}

#[derive(Debug, Default)]
struct Slot {
    /// The start time in nanoseconds; 0 without a fault.
    since: AtomicU64,
    page: AtomicU64,
    /// The kernel's number of the faulting thread; 0 if unknown.
    thread: AtomicU32,
    /// The steps taken for the fault: [`WARNED`], [`GIVEN_UP`], [`SET_ASIDE`].
    done: AtomicU8,
    /// The fault that the watchdog has seen here, by its start time, and the time that it has
    /// watched it.
    watched: AtomicU64,
    age: AtomicU64,
}

/// A fault that has been in flight for long.
#[derive(Debug)]
pub(crate) struct Overdue {
    pub(crate) page: Page,
    pub(crate) age: Duration,
    pub(crate) thread: u32,
    slot: usize,
    since: u64,
}

/// A fault in flight, until it is dropped.
#[derive(Debug)]
pub(crate) struct InFlightFault<'f> {
    in_flight: &'f InFlight,
    slot: usize,
}

impl InFlight {
    /// With a few slots, and more when these are taken.
    pub(super) fn new() -> Self {
        let in_flight = Self { segments: std::array::from_fn(|_| OnceLock::new()), grows: true };
        in_flight.make(0);
        in_flight
    }

    /// With slots for all faults that can be queued, and never more, because the reading thread may
    /// not allocate.
    pub(super) fn fixed() -> Self {
        let in_flight = Self { grows: false, ..Self::new() };
        for segment in 0..FIXED_SEGMENTS {
            in_flight.make(segment);
        }
        in_flight
    }

    /// Prefetches the slots that are taken first.
    pub(super) fn prefetch(&self) {
        if let Some([first, ..]) = self.segments[0].get().map(AsRef::as_ref) {
            prefetch(&first.taken);
            prefetch(&first.slots[..2]);
        }
    }

    fn make(&self, segment: usize) -> &[SlotGroup] {
        self.segments[segment].get_or_init(|| (0..1 << segment).map(|_| SlotGroup::new()).collect())
    }

    /// Takes a slot for a fault on a page. `None` if no slot is left.
    pub(super) fn begin(&self, page: Page, thread: u32, read: Instant) -> Option<usize> {
        let number = self.take()?;
        let slot = self.slot(number);
        slot.page.store(page.0 as u64, Ordering::Relaxed);
        slot.thread.store(thread, Ordering::Relaxed);
        slot.done.store(0, Ordering::Relaxed);
        slot.since.store(nanoseconds(read), Ordering::Release);
        Some(number)
    }

    fn take(&self) -> Option<usize> {
        (0..SEGMENTS).find_map(|segment| {
            let groups = match self.segments[segment].get() {
                Some(groups) => groups,
                None if self.grows => self.make(segment),
                None => return None,
            };
            let (index, bit) =
                groups.iter().enumerate().find_map(|(index, group)| Some((index, group.take()?)))?;
            Some((groups.len() - 1 + index) * GROUP + bit)
        })
    }

    fn slot(&self, number: usize) -> &Slot {
        let (group, bit) = self.group(number);
        &group.slots[bit]
    }

    fn group(&self, number: usize) -> (&SlotGroup, usize) {
        let group = number / GROUP + 1;
        let segment = group.ilog2() as usize;
        let groups = self.segments[segment].get().expect("a slot of it was taken");
        (&groups[group - (1 << segment)], number % GROUP)
    }

    /// The slot of a fault, as a guard that frees it.
    pub(super) fn flight(&self, slot: usize) -> InFlightFault<'_> {
        InFlightFault { in_flight: self, slot }
    }

    fn groups(&self) -> impl Iterator<Item = (usize, &SlotGroup)> {
        self.segments.iter().map_while(OnceLock::get).flatten().enumerate()
    }

    /// The faults in flight: their slots, start times and entries.
    fn all(&self) -> impl Iterator<Item = (usize, u64, &Slot)> {
        self.groups().filter(|(_, group)| group.taken.load(Ordering::Relaxed) > 0).flat_map(
            |(index, group)| {
                group.slots.iter().enumerate().filter_map(move |(bit, slot)| {
                    let since = slot.since.load(Ordering::Acquire);
                    (since > 0).then_some((index * GROUP + bit, since, slot))
                })
            },
        )
    }

    pub(super) fn count(&self) -> usize {
        self.all().count()
    }

    /// Adds the time since the last call to the age of each fault, and returns the faults whose age
    /// has reached `limit`. For one watchdog.
    pub(super) fn watch(&self, passed: Duration, limit: Duration) -> impl Iterator<Item = Overdue> {
        let now = nanoseconds(Instant::now());
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        self.all().filter_map(move |(number, since, slot)| {
            let age = if slot.watched.load(Ordering::Relaxed) == since {
                slot.age.load(Ordering::Relaxed).saturating_add(passed)
            } else {
                slot.watched.store(since, Ordering::Relaxed);
                now.saturating_sub(since).min(passed)
            };
            slot.age.store(age, Ordering::Relaxed);
            let page = Page(slot.page.load(Ordering::Relaxed) as usize);
            let (age, thread) = (Duration::from_nanos(age), slot.thread.load(Ordering::Relaxed));
            (age >= limit).then_some(Overdue { page, age, thread, slot: number, since })
        })
    }

    /// True if this step is taken for the fault for the first time, and the fault is still in
    /// flight.
    pub(super) fn first(&self, fault: &Overdue, what: u8) -> bool {
        let slot = self.slot(fault.slot);
        let before = slot.done.fetch_or(what, Ordering::Relaxed);
        let is_same = slot.since.load(Ordering::Relaxed) == fault.since;
        if !is_same {
            // Another fault has the slot by now: undo the step.
            self.undo(fault, what);
        }
        before & what == 0 && is_same
    }

    /// Sets a fault aside whose queue is full, for the watchdog to [take](Self::take_set_aside).
    pub(super) fn set_aside(&self, slot: usize) {
        self.slot(slot).done.fetch_or(SET_ASIDE, Ordering::Release);
    }

    /// Takes the faults that were set aside: their pages, threads and slots.
    pub(super) fn take_set_aside(&self) -> impl Iterator<Item = (Page, u32, usize)> {
        self.all().filter_map(|(number, _, slot)| {
            let aside = slot.done.fetch_and(!SET_ASIDE, Ordering::Acquire) & SET_ASIDE > 0;
            let page = Page(slot.page.load(Ordering::Relaxed) as usize);
            aside.then_some((page, slot.thread.load(Ordering::Relaxed), number))
        })
    }

    /// Undoes a step for a fault.
    pub(super) fn undo(&self, fault: &Overdue, what: u8) {
        self.slot(fault.slot).done.fetch_and(!what, Ordering::Relaxed);
    }

    /// Frees a slot by its number.
    pub(super) fn finish(&self, slot: usize) {
        let (group, bit) = self.group(slot);
        group.slots[bit].since.store(0, Ordering::Relaxed);
        group.taken.fetch_and(!(1 << bit), Ordering::Release);
    }

    /// Frees all slots, because no worker will take the queued faults. True if there were some.
    pub(super) fn finish_all(&self) -> bool {
        let taken: Vec<_> = self.all().map(|(slot, ..)| slot).collect();
        let had_some = !taken.is_empty();
        taken.into_iter().for_each(|slot| self.finish(slot));
        had_some
    }

    /// True if a fault is in flight.
    pub(super) fn has_any(&self) -> bool {
        self.all().next().is_some()
    }

    /// The oldest fault: its page and its age.
    pub(super) fn oldest(&self) -> Option<(Page, Duration)> {
        let now = nanoseconds(Instant::now());
        let (_, since, slot) = self.all().min_by_key(|&(_, since, _)| since)?;
        let page = Page(slot.page.load(Ordering::Relaxed) as usize);
        Some((page, Duration::from_nanos(now.saturating_sub(since))))
    }
}

impl SlotGroup {
    fn new() -> Self {
        Self { taken: AtomicU64::new(0), slots: std::array::from_fn(|_| Slot::default()) }
    }

    fn take(&self) -> Option<usize> {
        loop {
            let free = !self.taken.load(Ordering::Relaxed);
            let bit = free.trailing_zeros() as usize;
            if bit == GROUP {
                return None;
            }
            if self.taken.fetch_or(1 << bit, Ordering::Acquire) & (1 << bit) == 0 {
                return Some(bit);
            }
        }
    }
}

impl InFlightFault<'_> {
    /// Keeps the fault in flight until its slot is freed by its number.
    pub(crate) fn keep(self) -> usize {
        let slot = self.slot;
        std::mem::forget(self);
        slot
    }
}

impl Drop for InFlightFault<'_> {
    fn drop(&mut self) {
        self.in_flight.finish(self.slot);
    }
}

/// Nanoseconds since a fixed moment in this process; never 0.
fn nanoseconds(moment: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(|| moment);
    u64::try_from(moment.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX).max(1)
}

pub(super) const WARNED: u8 = 1;
pub(super) const GIVEN_UP: u8 = 2;
const SET_ASIDE: u8 = 4;
const GROUP: usize = u64::BITS as usize;
/// 131,008 slots: more than a process has threads that can wait in faults.
const SEGMENTS: usize = 11;
/// 4,032 slots: more than queued faults and workers together.
const FIXED_SEGMENTS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(in_flight: &InFlight, page: usize) -> usize {
        in_flight.begin(Page(page), 42, Instant::now()).unwrap()
    }

    #[test]
    fn the_oldest_fault_is_reported_until_it_is_finished() {
        let in_flight = InFlight::new();
        assert!(in_flight.oldest().is_none());
        let first = in_flight.flight(begin(&in_flight, 7));
        // The age is the subject, so a clock measures it.
        std::thread::sleep(Duration::from_millis(2));
        let second = in_flight.flight(begin(&in_flight, 9));
        assert_eq!(in_flight.count(), 2);
        let (page, age) = in_flight.oldest().unwrap();
        assert!(page == Page(7) && age >= Duration::from_millis(2), "{page:?} {age:?}");
        drop(first);
        assert_eq!(in_flight.oldest().unwrap().0, Page(9));
        drop(second);
        assert_eq!(in_flight.count(), 0);
    }

    #[test]
    fn a_fault_is_overdue_once_each_time_it_is_in_flight() {
        let in_flight = InFlight::new();
        for _ in 0..2 {
            let flight = in_flight.flight(begin(&in_flight, 7));
            assert_eq!(in_flight.watch(Duration::from_secs(9), Duration::from_secs(5)).count(), 0);
            let fault = in_flight.watch(Duration::ZERO, Duration::ZERO).next().unwrap();
            assert_eq!((fault.page, fault.thread), (Page(7), 42));
            assert!(in_flight.first(&fault, WARNED) && !in_flight.first(&fault, WARNED));
            assert!(in_flight.first(&fault, GIVEN_UP));
            in_flight.undo(&fault, GIVEN_UP);
            assert!(in_flight.first(&fault, GIVEN_UP), "once more");
            let slot = flight.keep();
            assert_eq!(in_flight.count(), 1);
            in_flight.finish(slot);
            assert!(in_flight.count() == 0 && !in_flight.first(&fault, WARNED), "it has landed");
        }
    }

    /// A fault ages only by time that the watchdog has watched, whatever the clock says.
    #[test]
    fn a_fault_ages_by_the_watched_time() {
        let in_flight = InFlight::new();
        let second = Duration::from_secs(1);
        begin(&in_flight, 7);
        assert_eq!(in_flight.watch(second, second).count(), 0, "it has just come");
        assert_eq!(in_flight.watch(second / 2, second).count(), 0);
        assert_eq!(in_flight.watch(second / 2, second).count(), 1);
    }

    #[test]
    fn a_segment_is_added_when_all_slots_are_taken() {
        let in_flight = InFlight::new();
        let mut taken: Vec<_> = (0..MANY).map(|page| begin(&in_flight, page)).collect();
        taken.sort_unstable();
        taken.dedup();
        assert_eq!((taken.len(), in_flight.count()), (MANY, MANY));
        let pages: std::collections::BTreeSet<_> =
            in_flight.watch(Duration::ZERO, Duration::ZERO).map(|fault| fault.page.0).collect();
        assert_eq!(pages.len(), MANY);
        taken.iter().for_each(|&slot| in_flight.finish(slot));
        assert_eq!((in_flight.count(), begin(&in_flight, 1)), (0, 0));
        in_flight.finish_all();
        assert_eq!(in_flight.count(), 0);
    }

    #[test]
    fn a_fault_that_was_set_aside_is_taken_once() {
        let in_flight = InFlight::new();
        let [_, left] = [7, 9].map(|page| begin(&in_flight, page));
        in_flight.set_aside(left);
        assert_eq!(in_flight.take_set_aside().collect::<Vec<_>>(), [(Page(9), 42, left)]);
        assert_eq!((in_flight.take_set_aside().count(), in_flight.count()), (0, 2));
    }

    /// More slots than the first segment has. Miri takes a minute for 1000.
    const MANY: usize = if cfg!(miri) { 70 } else { 1000 };

    #[cfg(not(miri))]
    #[test]
    fn a_full_table_that_may_not_grow_has_no_slot() {
        let in_flight = InFlight::fixed();
        let taken = (0..10_000).filter_map(|page| in_flight.begin(Page(page), 1, Instant::now())).count();
        assert_eq!((taken, in_flight.count()), (4032, 4032));
    }
}
