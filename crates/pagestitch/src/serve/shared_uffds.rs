//! The userfaultfds that the small regions of a pool share, and the table from an address to its
//! region.
//!
//! A worker that reads a batch looks up each fault's region under one shared lock. A build and a drop
//! change one entry of the table, whatever its length.

use crate::fault::FaultRequest;
use crate::serve::Served;
use crate::serve::events::to_request;
use crate::serve::served::RegionHandle;
use crate::space::{Shards, SharedPlace, SharedRanges, SharedUffd};
use pagestitch_kernel::uffd::OpenError;
use pagestitch_kernel::{AddressRange, Batch, Errno, Event, Fault, Features, PageSize, Reservation, Uffd};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

/// The shared userfaultfds of a pool.
#[derive(Debug, Default)]
pub(crate) struct SharedUffds {
    /// Empty until the first region takes one.
    uffds: OnceLock<Box<[Arc<SharedUffd>]>>,
    opening: Mutex<()>,
    next: AtomicUsize,
    table: Arc<Table>,
}

/// The regions by their first address.
#[derive(Debug, Default)]
struct Table(RwLock<BTreeMap<usize, Entry>>);

#[derive(Debug)]
struct Entry {
    end: usize,
    /// The index of its userfaultfd.
    uffd: usize,
    /// `None` while the region is built.
    handle: Option<Arc<RegionHandle>>,
}

impl SharedRanges for Table {
    fn remove(&self, start: usize) {
        self.0.write().remove(&start);
    }
}

impl SharedUffds {
    /// The userfaultfds, opened at the first call; `number` of them, or as many as the process may open.
    /// `watch` is called once for each.
    pub(super) fn open(
        &self,
        (number, wanted): (usize, Features),
        watch: impl Fn(usize, &Uffd) -> Result<(), Errno>,
    ) -> Result<&[Arc<SharedUffd>], OpenError> {
        let _one_at_a_time = self.opening.lock();
        if let Some(uffds) = self.uffds.get() {
            return Ok(uffds);
        }
        let open = |index| {
            let uffd = Uffd::open(wanted)?;
            watch(index, &uffd).map_err(|errno| OpenError { device: errno, system_call: errno })?;
            Ok(Arc::new(SharedUffd::new(uffd)))
        };
        let mut uffds = vec![open(0)?];
        uffds.extend((1..number).map_while(|index| open(index).ok()));
        Ok(self.uffds.get_or_init(|| uffds.into_boxed_slice()))
    }

    pub(super) fn get(&self, index: usize) -> &Arc<SharedUffd> {
        &self.uffds.get().expect("a userfaultfd that is watched is open")[index]
    }

    /// The number of userfaultfds so far.
    pub(super) fn count(&self) -> usize {
        self.uffds.get().map_or(0, |uffds| uffds.len())
    }

    /// Registers a reservation with a userfaultfd that neither of its neighbours has.
    pub(super) fn register(&self, reservation: &Reservation) -> Result<Shards, Errno> {
        let range = reservation.range();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let uffd = {
            // Before the range is registered: a fault without an entry is of no region.
            let mut table = self.table.0.write();
            let before = table.range(..range.start()).next_back();
            let before = before.filter(|(_, entry)| entry.end == range.start()).map(|(_, entry)| entry.uffd);
            let after = table.get(&range.end()).map(|entry| entry.uffd);
            let uffds = (turn..turn + self.count()).map(|uffd| uffd % self.count());
            let free = uffds.clone().find(|&uffd| Some(uffd) != before && Some(uffd) != after);
            let uffd = free.unwrap_or_else(|| turn % self.count());
            table.insert(range.start(), Entry { end: range.end(), uffd, handle: None });
            Arc::clone(self.get(uffd))
        };
        let place = SharedPlace::new(uffd, range.start(), Arc::clone(&self.table) as Arc<dyn SharedRanges>);
        Shards::register_shared(place, reservation)
    }

    /// Begins to serve a region.
    pub(super) fn add(&self, region: &Arc<Served>) {
        let range = region.target.addresses(region.target.all());
        if let Some(entry) = self.table.0.write().get_mut(&range.start()) {
            entry.handle = Some(Arc::clone(region.handle()));
        }
    }

    /// Handles to the regions that are served.
    pub(super) fn handles(&self) -> Vec<Arc<RegionHandle>> {
        self.table.0.read().values().filter_map(|entry| entry.handle.clone()).collect()
    }

    /// The number of regions, at most `most`.
    pub(super) fn regions(&self, most: usize) -> usize {
        self.table.0.read().len().min(most)
    }

    /// Reads a batch, and passes each fault with its region to `each`, which neither waits nor calls a
    /// source. Calls `look_later` with each region of which a part was moved.
    pub(super) fn read(
        &self,
        index: usize,
        batch: &mut Batch,
        mut each: impl FnMut(&Arc<Served>, FaultRequest),
        look_later: impl Fn(&Arc<Served>),
    ) {
        let shared = self.get(index);
        // Until `each` region knows of its faults.
        let _reading = shared.reading();
        if let Err(errno) = batch.read(&shared.uffd, PageSize::system()) {
            log!(error, %errno, "cannot read events");
        }
        if batch.is_empty() {
            return;
        }
        let read = Instant::now();
        let table = self.table.0.read();
        for event in batch.take_events() {
            if let Event::Remap { from, to, bytes } = event {
                moved(&table, (from, to, bytes), &look_later);
            }
        }
        for fault in batch.faults() {
            match find(&table, fault.address) {
                // A region has taken the address of a moved part since the touch. Poison would be its page's,
                // because the kernel lets each userfaultfd of the process fill it.
                Some(entry) if entry.uffd != index => touch_again(&shared.uffd, fault),
                Some(Entry { handle: Some(handle), .. }) => match handle.enter() {
                    Some(region) => {
                        region.prefetch(0);
                        to_request(&region, fault, read).into_iter().for_each(|asked| each(&region, asked));
                    }
                    // It is being dropped, and wakes its waiters.
                    None => handle.note_stray(),
                },
                Some(Entry { handle: None, .. }) => touch_again(&shared.uffd, fault),
                None => answer_outside(&shared.uffd, fault),
            }
        }
    }
}

/// The entry that holds an address.
fn find(table: &BTreeMap<usize, Entry>, address: usize) -> Option<&Entry> {
    let (_, entry) = table.range(..=address).next_back()?;
    (address < entry.end).then_some(entry)
}

/// Tells the regions in a range that it was moved.
fn moved(
    table: &RwLockReadGuard<'_, BTreeMap<usize, Entry>>,
    (from, to, bytes): (usize, usize, usize),
    look_later: &impl Fn(&Arc<Served>),
) {
    let below = table.range(..from.saturating_add(bytes)).rev();
    for (_, entry) in below.take_while(|(_, entry)| entry.end > from) {
        let Some(region) = entry.handle.as_ref().and_then(|handle| handle.enter()) else { continue };
        // A log would run code of the application while the table is locked.
        region.moved(0, (from, to, bytes), &mut |_| Ok(()));
        look_later(&region);
    }
}

/// A thread has touched a page that this userfaultfd does not serve, or not yet: it faults again.
#[cold]
fn touch_again(uffd: &Uffd, fault: &Fault) {
    let _ = page_of(fault).map(|page| uffd.wake(page));
    thread::yield_now();
}

/// Answers a fault in memory of no region: a part of one that was moved, or a duplicate. No source has
/// bytes for it. The table is locked, so no region can be built at the address meanwhile.
#[cold]
fn answer_outside(uffd: &Uffd, fault: &Fault) {
    let Some(page) = page_of(fault).filter(|_| uffd.features().contains(Features::POISON)) else { return };
    let _ = uffd.poison(page);
    let _ = uffd.wake(page);
}

fn page_of(fault: &Fault) -> Option<AddressRange> {
    let size = PageSize::system();
    AddressRange::new(fault.address & !(size.bytes() - 1), size.bytes(), size)
}
