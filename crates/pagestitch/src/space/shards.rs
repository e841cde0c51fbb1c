//! The shards of a mapping: contiguous parts of its addresses, each with a userfaultfd of its own.
//!
//! ```text
//!   addresses   |------ shard 0 ------|------ shard 1 ------|--- shard 2 ---|    whole blocks of 2 MiB
//!   uffds           first                 more[0]               more[1]
//! ```
//!
//! The kernel has one wait queue and one lock for each userfaultfd. So threads that fault in
//! different shards do not wait for each other, and each shard wakes its own worker first.
//!
//! A fill wakes only the threads that wait at its own userfaultfd. So each fill lies in one shard, and
//! goes to the userfaultfd of that shard.

use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::{FaultMode, RegisterMode};
use pagestitch_kernel::{AddressRange, Errno, Features, Page, PageSize, Reservation, Span, Uffd};
use std::iter;

/// The userfaultfds of a mapping, in the order of their addresses.
#[derive(Debug)]
pub(crate) struct Shards {
    first: Uffd,
    /// The userfaultfds of the shards after the first one.
    ///
    /// Invariant: all have the mode and the features of the first one.
    more: Box<[Uffd]>,
    /// The first address.
    start: usize,
    /// The length of each shard but the last, which has the rest.
    bytes: usize,
}

impl Shards {
    /// One shard with all addresses.
    pub(crate) fn one(uffd: Uffd) -> Self {
        Self { first: uffd, more: Box::default(), start: 0, bytes: usize::MAX }
    }

    /// Divides a reservation into as many shards as there are userfaultfds, or as it has blocks, and
    /// registers and opens it.
    pub(crate) fn register(mut uffds: Vec<Uffd>, reservation: &Reservation) -> Result<Self, Errno> {
        let range = reservation.range();
        let blocks = (range.bytes() / HUGE).max(1);
        uffds.truncate(blocks);
        let bytes = (blocks / uffds.len()).max(1) * HUGE;
        let more = uffds.split_off(1).into_boxed_slice();
        let first = uffds.pop().expect("the caller has opened one");
        let shards = Self { first, more, start: range.start(), bytes };
        let all = Span { first: Page(0), pages: reservation.pages() };
        for (uffd, span) in shards.spans(all, reservation.page_size()) {
            uffd.register_part(reservation, span, RegisterMode::MISSING)?;
        }
        // Opened afterwards, because a page that is filled before the range is registered never
        // faults.
        reservation.open()?;
        Ok(shards)
    }

    /// The number of shards.
    pub(crate) const fn count(&self) -> usize {
        1 + self.more.len()
    }

    /// The userfaultfd of a shard.
    pub(crate) fn get(&self, shard: usize) -> &Uffd {
        shard.checked_sub(1).map_or(&self.first, |index| &self.more[index])
    }

    /// All userfaultfds, in the order of their shards.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Uffd> {
        iter::once(&self.first).chain(&self.more)
    }

    /// The parts of a range that lie in one shard each, with their userfaultfds.
    pub(crate) fn parts(&self, range: AddressRange) -> impl Iterator<Item = (&Uffd, AddressRange)> {
        let mut done = 0;
        iter::from_fn(move || {
            let rest = range.without_prefix(done);
            let part = self.in_one(rest);
            done += part.bytes();
            (part.bytes() > 0).then(|| (self.of(part), part))
        })
    }

    /// The parts of a span that lie in one shard each, with their userfaultfds.
    pub(crate) fn spans(&self, span: Span, size: PageSize) -> impl Iterator<Item = (&Uffd, Span)> {
        let (pages, last) = (self.bytes / size.bytes(), self.more.len());
        let mut rest = span;
        iter::from_fn(move || {
            let shard = (rest.first.0 / pages).min(last);
            let border = if shard == last { rest.end().0 } else { (shard + 1) * pages };
            let part = rest.prefix(border - rest.first.0);
            rest = rest.without_prefix(part.pages);
            (!part.is_empty()).then(|| (self.get(shard), part))
        })
    }

    /// The features of all userfaultfds.
    pub(crate) const fn features(&self) -> Features {
        self.first.features()
    }

    /// The faults that all userfaultfds serve.
    pub(crate) const fn mode(&self) -> FaultMode {
        self.first.mode()
    }

    /// As [`Uffd::is_stand_in`].
    pub(crate) fn is_stand_in(&self) -> bool {
        self.first.is_stand_in()
    }

    /// As [`Uffd::has_waiters`], for any shard.
    pub(crate) fn has_waiters(&self) -> bool {
        self.iter().any(Uffd::has_waiters)
    }

    /// As [`Uffd::keep_open`], for all shards.
    pub(crate) fn keep_open(&self) {
        self.iter().for_each(Uffd::keep_open);
    }

    /// The userfaultfd that fills a range. The range lies [in one shard](Self::in_one).
    #[inline]
    pub(crate) fn of(&self, range: AddressRange) -> &Uffd {
        if self.more.is_empty() { &self.first } else { self.find(range) }
    }

    #[inline(never)]
    fn find(&self, range: AddressRange) -> &Uffd {
        debug_assert_eq!(self.in_one(range), range, "the range lies in one shard");
        self.get(self.shard_at(range.start()))
    }

    /// The leading part of a range that lies in one shard.
    #[inline]
    pub(crate) fn in_one(&self, range: AddressRange) -> AddressRange {
        if self.more.is_empty() { range } else { self.cut_at_border(range) }
    }

    #[inline(never)]
    fn cut_at_border(&self, range: AddressRange) -> AddressRange {
        let shard = self.shard_at(range.start());
        let border = self.start + (shard + 1) * self.bytes;
        let is_last = shard == self.more.len();
        if is_last { range } else { range.prefix(border - range.start()) }
    }

    /// The number of the shard that holds an address of the mapping.
    fn shard_at(&self, address: usize) -> usize {
        ((address - self.start) / self.bytes).min(self.more.len())
    }

    /// As [`Uffd::wake`].
    #[inline]
    pub(crate) fn wake(&self, range: AddressRange) -> Result<(), Errno> {
        match self.more.is_empty() {
            true => self.first.wake(range),
            false => self.parts(range).try_for_each(|(uffd, part)| uffd.wake(part)),
        }
    }

    /// As [`Uffd::unregister`]. After an error, the rest is unregistered all the same.
    pub(crate) fn unregister(&self, range: AddressRange) -> Result<(), Errno> {
        let refused = self.parts(range).filter_map(|(uffd, part)| uffd.unregister(part).err());
        refused.last().map_or(Ok(()), Err)
    }
}
