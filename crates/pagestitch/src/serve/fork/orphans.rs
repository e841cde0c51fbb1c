//! Orphans: memory of a region that no worker serves. These are parts that `mremap(2)` has moved,
//! and children for which there is no descriptor. Their missing pages are poisoned, and the
//! registration is ended, which wakes the threads that wait there.
//!
//! The thread that reads the region's events does this, a piece at a time, and waits for no other
//! thread. Where children are served, it is the fork reader, and a forking thread may hold the
//! allocator until the fork reader has closed the child before.

use crate::serve::fork::{Descriptors, first_page};
use crate::serve::rate_limit::RateLimit;
use crate::space::Mapping;
use pagestitch_kernel::{AddressRange, Batch, Errno, Event, Outcome, Page, Span, Uffd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// All orphans of a region.
#[derive(Debug)]
pub(crate) struct Orphans {
    // The standard library's lock: waiting for it does not allocate.
    known: Mutex<OrphanList>,
    /// True if there are some. It changes under the lock.
    some: AtomicBool,
    many: AtomicBool,
    /// True if a part of the region, or a duplicate of it, was ever moved.
    moved: AtomicBool,
    /// Limits the log lines about them.
    pub(crate) log_limit: RateLimit,
}

#[derive(Debug)]
struct OrphanList {
    orphans: Vec<Orphan>,
    /// Events of children.
    batch: Batch,
}

impl Orphans {
    /// An empty list. If `allocates` is false, its capacity is reserved from the start.
    pub(crate) fn new(allocates: bool) -> Self {
        let room = if allocates { 0 } else { ROOM };
        let known =
            Mutex::new(OrphanList { orphans: Vec::with_capacity(room), batch: Batch::with_capacity(BATCH) });
        Self {
            known,
            some: AtomicBool::new(false),
            many: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            log_limit: RateLimit::default(),
        }
    }

    /// Notes that memory which is registered with a userfaultfd of the region was moved.
    pub(crate) fn note_move(&self) {
        self.moved.store(true, Ordering::Relaxed);
    }

    /// Adds a part of a shard that was moved to `to`.
    pub(crate) fn moved(&self, shard: usize, to: usize, bytes: usize) {
        self.add(OrphanKind::Region { shard, to, bytes });
    }

    /// Adds a child that is not served.
    pub(crate) fn child(&self, uffd: Uffd) {
        self.add(OrphanKind::Child(uffd));
    }

    /// True if a part of the region, or a duplicate of it, was ever moved.
    pub(crate) fn have_moved(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    /// True if an orphan is a child.
    pub(crate) fn have_children(&self) -> bool {
        self.lock().orphans.iter().any(|orphan| !orphan.is_in_region())
    }

    /// True if there are as many children as can be added without allocating.
    pub(crate) fn is_full(&self) -> bool {
        let known = self.lock();
        known.orphans.len() > ROOM / 2
            && known.orphans.iter().filter(|orphan| !orphan.is_in_region()).count() > ROOM / 2
    }

    /// True if there are more orphans than any owner makes at once, except a hostile one. Each
    /// child takes a descriptor.
    pub(crate) fn are_many(&self) -> bool {
        self.many.load(Ordering::Relaxed)
    }

    /// Poisons the next pages of each orphan.
    pub(crate) fn close_some(&self, region: &Mapping, children: Option<&Descriptors>) -> Remaining {
        if !self.some.load(Ordering::SeqCst) {
            return Remaining::None;
        }
        let mut known = self.lock();
        let OrphanList { orphans, batch } = &mut *known;
        let (mut rest, mut index, mut blocked) = (Remaining::None, 0, false);
        while index < orphans.len() {
            let orphan = &mut orphans[index];
            if blocked && orphan.is_in_region() {
                index += 1;
                continue;
            }
            match orphan.close_some(region, (batch, children)) {
                Progress::Left(left) => {
                    (rest, index) = (rest.max(left), index + 1);
                    blocked |= left == Remaining::Blocked;
                }
                Progress::Done => drop(orphans.swap_remove(index)),
                // Closing its uffd would show zeros to the threads that wait there.
                Progress::Refused => std::mem::forget(orphans.swap_remove(index)),
            }
            // The children of an orphan are orphans too.
            let born = batch.take_events().filter_map(|event| match event {
                // This process must not end before the child is poisoned. If its userfaultfd is not
                // kept, because there is no room for the descriptor, nothing can be done.
                Event::Fork { child, kept: _ } => Some(Orphan::new(OrphanKind::Child(child))),
                _ => None,
            });
            orphans.extend(born);
        }
        self.some.store(!orphans.is_empty(), Ordering::SeqCst);
        self.many.store(orphans.len() >= MANY, Ordering::Relaxed);
        rest
    }

    fn add(&self, kind: OrphanKind) {
        let mut known = self.lock();
        known.orphans.push(Orphan::new(kind));
        self.some.store(true, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, OrphanList> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Orphan {
    kind: OrphanKind,
    /// The number of its pages that are poisoned or need no poison.
    seen: usize,
}

#[derive(Debug)]
enum OrphanKind {
    /// A part of a shard that was moved to the address `to`.
    Region { shard: usize, to: usize, bytes: usize },
    /// All of the region in a child, which has a uffd of its own.
    Child(Uffd),
}

/// The orphans that are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Remaining {
    None,
    /// Some, which cannot be closed before the region's own events are read.
    Blocked,
    /// Some, which the next call can close.
    Some,
}

/// A batch for the events of a child, and the descriptors for all children.
type Events<'a> = (&'a mut Batch, Option<&'a Descriptors>);

enum Progress {
    Left(Remaining),
    Done,
    /// The kernel refuses to poison it.
    Refused,
}

impl Orphan {
    const fn new(kind: OrphanKind) -> Self {
        Self { kind, seen: 0 }
    }

    const fn is_in_region(&self) -> bool {
        matches!(self.kind, OrphanKind::Region { .. })
    }

    /// Poisons the next missing pages.
    fn close_some(&mut self, region: &Mapping, (batch, children): Events<'_>) -> Progress {
        for _ in 0..STEPS {
            let Some(part) = self.next(region) else { return self.end(region, (batch, children)) };
            let page = region.page_size().bytes();
            self.seen += match self.uffd(region).poison_protected(part) {
                Outcome::Done => part.bytes() / page,
                Outcome::Partial { bytes } => bytes / page,
                // The page is present, or its address is no longer registered.
                Outcome::AlreadyThere | Outcome::NotRegistered => 1,
                Outcome::ProcessGone => return Progress::Done,
                // Memory may be free in a moment.
                Outcome::NoMemory => return Progress::Left(Remaining::Some),
                Outcome::Changing => return Progress::Left(self.read(region, (batch, children))),
                refused => return self.give_up(region, refused),
            };
        }
        Progress::Left(Remaining::Some)
    }

    /// Ends the registration. A child that began to fork before waits until its event is read: its
    /// userfaultfd is in flight ([`Descriptors::keep`]), so that dropping it here closes nothing
    /// and wakes no thread.
    fn end(&self, region: &Mapping, (batch, children): Events<'_>) -> Progress {
        self.unregister(region);
        match &self.kind {
            OrphanKind::Child(uffd) if uffd.continue_pages(first_page(region)) == Outcome::Changing => {
                Progress::Left(self.read(region, (batch, children)))
            }
            _ => Progress::Done,
        }
    }

    /// Reads the events of a child, because a process that changes its memory waits until its event
    /// is read. The region's own events are read by its reader.
    fn read(&self, region: &Mapping, (batch, children): Events<'_>) -> Remaining {
        match &self.kind {
            OrphanKind::Region { .. } => Remaining::Blocked,
            OrphanKind::Child(uffd) => {
                let mut read = || match children {
                    Some(children) => children.read(batch, (uffd, region.page_size()), first_page(region)),
                    None => batch.read(uffd, region.page_size()),
                };
                let first = read();
                // If there is no descriptor for a child of this child either, read again in a
                // moment.
                let is_short = matches!(first, Err(Errno::EMFILE | Errno::ENFILE));
                if is_short && children.is_some_and(|children| children.close_spare()) {
                    let _ = read();
                }
                Remaining::Some
            }
        }
    }

    /// The next addresses, as many as one call poisons.
    fn next(&self, region: &Mapping) -> Option<AddressRange> {
        let page = region.page_size();
        match &self.kind {
            OrphanKind::Region { to, bytes, .. } => {
                let seen = page.bytes_of(Span { first: Page(0), pages: self.seen });
                let rest = bytes.checked_sub(seen).filter(|rest| *rest > 0)?;
                AddressRange::new(to + seen, rest.min(PAGES * page.bytes()), page)
            }
            OrphanKind::Child(_) => {
                let all = region.target.all();
                let rest = all.without_prefix(self.seen.min(all.pages));
                let now = (!rest.is_empty()).then(|| region.target.contiguous(rest))?;
                Some(region.target.addresses(now.prefix(PAGES)))
            }
        }
    }

    fn unregister(&self, region: &Mapping) {
        // A refusal means that the range is unmapped, or that its owner has ended.
        match &self.kind {
            OrphanKind::Region { to, bytes, .. } => {
                let all = AddressRange::new(*to, *bytes, region.page_size());
                let _ = all.map(|all| self.uffd(region).unregister(all));
            }
            OrphanKind::Child(uffd) => region.target.ranges().for_each(|(span, _)| {
                let _ = uffd.unregister(region.target.addresses(span));
            }),
        }
    }

    /// Called where pages cannot be poisoned: missing pages would read as zeros.
    fn give_up(&self, region: &Mapping, refused: Outcome) -> Progress {
        match &self.kind {
            OrphanKind::Region { .. } => {
                eprintln!("pagestitch: region {} was moved, and {refused:?}: aborting", region.name);
                std::process::abort();
            }
            OrphanKind::Child(_) => {
                log!(
                    error,
                    region = region.name,
                    ?refused,
                    "a forked child cannot be served: it may wait forever"
                );
                Progress::Refused
            }
        }
    }

    fn uffd<'a>(&'a self, region: &'a Mapping) -> &'a Uffd {
        match &self.kind {
            OrphanKind::Region { shard, .. } => region.uffd.get(*shard),
            OrphanKind::Child(uffd) => uffd,
        }
    }
}

/// Orphans that fit without an allocation. Each is a mapping or a descriptor, of which a process
/// has no more by default (`vm.max_map_count`). The room takes memory only when it is used.
const ROOM: usize = 65_536;
/// From this many orphans on, they are closed before more events are read of a region whose
/// children are not served.
const MANY: usize = 64;
/// The most pages that one call poisons.
const PAGES: usize = 512;
/// Steps for one orphan before the next one's turn: the region's faults wait that long.
const STEPS: usize = 64;
/// Events of a child that are read at once.
const BATCH: usize = 4;
