//! The shards of a mapping: contiguous parts of its addresses, each with a userfaultfd of its own.
//!
//! ```text
//!   addresses   |------ shard 0 ------|------ shard 1 ------|--- shard 2 ---|    whole blocks of 2 MiB
//!   uffds             0                     1                     2
//! ```
//!
//! The kernel has one wait queue and one lock for each userfaultfd. So threads that fault in
//! different shards do not wait for each other, and each shard wakes its own worker first.
//!
//! A fill wakes only the threads that wait at its own userfaultfd. So each fill lies in one shard, and
//! goes to the userfaultfd of that shard.

use crate::space::shared_uffd::SharedPlace;
use crate::space::spare_uffds::SpareUffds;
use crate::space::target::ListedUffd;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::{FaultMode, RegisterMode};
use pagestitch_kernel::{AddressRange, Errno, Features, Outcome, Page, PageSize, Reservation, Span, Uffd};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{iter, mem, slice};

/// The userfaultfds of a mapping, in the order of their addresses.
#[derive(Debug)]
pub(crate) struct Shards {
    /// One for each shard.
    ///
    /// Invariant: all have the features of the first one. Empty only while it is dropped.
    uffds: Uffds,
    /// The first address.
    start: usize,
    /// The length of each shard but the last, which has the rest.
    bytes: usize,
    /// Takes the userfaultfds when they are [retired](Self::retire).
    spares: Option<Arc<SpareUffds>>,
    /// True if nothing is registered with the userfaultfds any more, and no thread waits.
    retired: AtomicBool,
}

/// The userfaultfds of a mapping.
#[derive(Debug)]
enum Uffds {
    /// They are its own.
    Own(Box<[Uffd]>),
    /// One that the owner of the memory has opened.
    Adopted(ListedUffd),
    /// One that it shares with other regions.
    Shared(SharedPlace),
}

impl Deref for Uffds {
    type Target = [Uffd];

    #[inline]
    fn deref(&self) -> &[Uffd] {
        match self {
            Self::Own(uffds) => uffds,
            Self::Adopted(listed) => slice::from_ref(listed.uffd()),
            Self::Shared(place) => slice::from_ref(&place.uffd.uffd),
        }
    }
}

impl Shards {
    /// One shard with all addresses.
    pub(crate) fn one(uffd: Uffd) -> Self {
        Self::single(Uffds::Own(Box::new([uffd])))
    }

    fn single(uffds: Uffds) -> Self {
        Self { uffds, start: 0, bytes: usize::MAX, spares: None, retired: AtomicBool::new(false) }
    }

    /// One shard with all addresses, which their owner has registered.
    pub(crate) fn adopted(uffd: ListedUffd) -> Self {
        Self::single(Uffds::Adopted(uffd))
    }

    /// Divides a reservation into as many shards as there are userfaultfds, or as it has blocks, and
    /// registers it and opens a span of it. `spares` takes the userfaultfds after the end of the region.
    pub(crate) fn register(
        mut uffds: Vec<Uffd>,
        spares: Option<Arc<SpareUffds>>,
        reservation: &Reservation,
        open: Span,
    ) -> Result<Self, Errno> {
        let range = reservation.range();
        let blocks = (range.bytes() / HUGE).max(1);
        uffds.truncate(blocks);
        let bytes = (blocks / uffds.len()).max(1) * HUGE;
        let (uffds, retired) = (Uffds::Own(uffds.into_boxed_slice()), AtomicBool::new(false));
        let shards = Self { uffds, start: range.start(), bytes, spares, retired };
        let all = Span { first: Page(0), pages: reservation.pages() };
        let modes = match shards.features().contains(Features::WRITE_PROTECT) {
            true => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
            false => RegisterMode::MISSING,
        };
        for (uffd, span) in shards.spans(all, reservation.page_size()) {
            uffd.register_part(reservation, span, modes)?;
        }
        // Opened afterwards, because a page that is filled before the range is registered never
        // faults.
        reservation.open_span(open)?;
        Ok(shards)
    }

    /// Registers a reservation with a userfaultfd that it shares with other regions, and opens it.
    pub(crate) fn register_shared(place: SharedPlace, reservation: &Reservation) -> Result<Self, Errno> {
        let shards = Self::single(Uffds::Shared(place));
        shards.get(0).register(reservation, RegisterMode::MISSING)?;
        Ok(shards)
    }

    /// True if other regions have the userfaultfd, too.
    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self.uffds, Uffds::Shared(_))
    }

    /// The number of shards.
    pub(crate) fn count(&self) -> usize {
        self.uffds.len()
    }

    /// The userfaultfd of a shard.
    pub(crate) fn get(&self, shard: usize) -> &Uffd {
        &self.uffds[shard]
    }

    /// All userfaultfds, in the order of their shards.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Uffd> {
        self.uffds.iter()
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
        let (pages, last) = (self.bytes / size.bytes(), self.uffds.len() - 1);
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
    pub(crate) fn features(&self) -> Features {
        self.uffds[0].features()
    }

    /// The faults that all userfaultfds serve. One of a dropped region may serve more than others, because
    /// the process has given up privileges since.
    pub(crate) fn mode(&self) -> FaultMode {
        let restricted = self.iter().map(Uffd::mode).find(|&mode| mode == FaultMode::UserOnly);
        restricted.unwrap_or(FaultMode::All)
    }

    /// As [`Uffd::is_stand_in`].
    pub(crate) fn is_stand_in(&self) -> bool {
        self.uffds[0].is_stand_in()
    }

    /// As [`Uffd::has_waiters`], for any shard. Of a shared userfaultfd: true if a fault may be on its
    /// way to its region. The region knows of all other faults.
    pub(crate) fn has_waiters(&self) -> bool {
        match &self.uffds {
            Uffds::Shared(place) => place.uffd.has_faults_under_way(),
            uffds => uffds.iter().any(Uffd::has_waiters),
        }
    }

    /// As [`Uffd::keep_open`], for all shards.
    pub(crate) fn keep_open(&self) {
        self.iter().for_each(Uffd::keep_open);
    }

    /// The userfaultfd that fills a range. The range lies [in one shard](Self::in_one).
    #[inline]
    pub(crate) fn of(&self, range: AddressRange) -> &Uffd {
        if self.count() == 1 { &self.uffds[0] } else { self.find(range) }
    }

    #[inline(never)]
    fn find(&self, range: AddressRange) -> &Uffd {
        debug_assert_eq!(self.in_one(range), range, "the range lies in one shard");
        self.get(self.shard_at(range.start()))
    }

    /// The leading part of a range that lies in one shard.
    #[inline]
    pub(crate) fn in_one(&self, range: AddressRange) -> AddressRange {
        if self.count() == 1 { range } else { self.cut_at_border(range) }
    }

    #[inline(never)]
    fn cut_at_border(&self, range: AddressRange) -> AddressRange {
        let shard = self.shard_at(range.start());
        let border = self.start + (shard + 1) * self.bytes;
        let is_last = shard + 1 == self.count();
        if is_last { range } else { range.prefix(border - range.start()) }
    }

    /// The number of the shard that holds an address of the mapping.
    fn shard_at(&self, address: usize) -> usize {
        ((address - self.start) / self.bytes).min(self.count() - 1)
    }

    /// As [`Uffd::wake`].
    #[inline]
    pub(crate) fn wake(&self, range: AddressRange) -> Result<(), Errno> {
        match self.count() == 1 {
            true => self.uffds[0].wake(range),
            false => self.parts(range).try_for_each(|(uffd, part)| uffd.wake(part)),
        }
    }

    /// As [`Uffd::unregister`]. After an error, the rest is unregistered all the same.
    pub(crate) fn unregister(&self, range: AddressRange) -> Result<(), Errno> {
        let refused = self.parts(range).filter_map(|(uffd, part)| uffd.unregister(part).err());
        refused.last().map_or(Ok(()), Err)
    }

    /// Ends the registration of a fenced range where no thread waits, so that the userfaultfds can
    /// serve another region after the drop. If the application has changed the range, or is about
    /// to, they are closed instead, as is each one that may serve a part of it elsewhere.
    pub(crate) fn retire(&self, range: AddressRange) {
        if self.spares.is_none() || self.unregister(range).is_err() {
            return;
        }
        // The kernel fills nothing while an event is pending, and answers this first.
        let page = range.prefix(PageSize::system().bytes());
        let is_idle = |uffd: &Uffd| uffd.continue_pages(page) == Outcome::NotRegistered;
        self.retired.store(self.iter().all(is_idle), Ordering::Release);
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        let retired = *self.retired.get_mut();
        if let (Some(spares), Uffds::Own(uffds), true) = (&self.spares, &mut self.uffds, retired) {
            mem::take(uffds).into_iter().for_each(|uffd| spares.keep(uffd));
        }
    }
}
