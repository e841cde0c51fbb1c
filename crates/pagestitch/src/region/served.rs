//! A region as its handler threads see it: where to look, where to put it, who is at it. Not its bytes.

use crate::guard::guarded;
use crate::metrics::Counters;
use crate::policy::{Policy, Recorder, Recording, Replay};
use crate::region::adopted::{Adopted, abandon};
use crate::region::family::{Family, refuse_births};
use crate::region::in_place::{Runs, Shown, whole_pages};
use crate::region::pace::{Pace, Reading};
use crate::region::page_table::{PageTable, State, Wake};
use crate::region::place::Place;
use crate::region::strays::{Rest, Strays};
use crate::region::{Door, Layout};
use crate::server::{Asked, Berths, Later, NoSignals, Permit, Permits};
use crate::source::{Backing, Donated, Failure, Fetched, LazyMemfd, Shared};
use pagestitch_kernel::Features;
use pagestitch_kernel::gate::{Gate, OwnedGateGuard};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::{Batch, Errno, Page, PageSize, Span, Uffd};
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// What the server shares with the region that it serves.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: String,
    pub(crate) layout: Arc<Layout>,
    /// Pages that are there without us, and never fault.
    pub(crate) in_place: Arc<Runs>,
    /// Pages that a memfd is mapped at, to be shown when it has them.
    pub(crate) lazy: Runs,
    /// What the kernel would not show in place, and why.
    pub(crate) refused: Vec<(Span, &'static str)>,
    has_donated: bool,
    has_fetched: bool,
    /// Whether donated pages move.
    pub(crate) moves: bool,
    pub(crate) pages: Arc<PageTable>,
    pub(crate) policy: Policy,
    pub(super) reporter: Option<Reporter>,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) replay: Option<Replay>,
    /// Whether whole blocks are filled in staging, and moved in; else why not.
    pub(crate) staged: Result<(), &'static str>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pace: Pace,
    /// How many faults may be served at once, and those that wait for that.
    pub(crate) limit: Option<(usize, Berths<Asked>)>,
    /// How many fetches its pool may have under way, where there is a limit.
    pub(crate) permits: OnceLock<Arc<Permits>>,
    /// Where what is to be done in a moment is kept.
    pub(crate) later: OnceLock<Arc<Later>>,
    pub(crate) place: Place,
    pub(crate) uffd: Uffd,
    /// Why a page was poisoned. Grows by an entry for each page that fails.
    failures: Mutex<BTreeMap<Page, Arc<Failure>>>,
    /// Whether there ever was one.
    any_failed: AtomicBool,
    /// Its forked children, where they are served.
    pub(crate) family: Option<Arc<Family>>,
    /// What nobody serves, until it has been seen to.
    pub(crate) strays: Strays,
    /// Whoever works for the region is inside; dropping the region closes it.
    gate: Arc<Gate>,
    /// What its server keeps of it.
    door: OnceLock<Arc<Door>>,
}

/// Why pages were poisoned, for one thread at a time. No signal handler interrupts that thread: the worker that serves what a
/// handler touches may need them, too.
struct LockedFailures<'s> {
    // The lock is left first.
    failures: MutexGuard<'s, BTreeMap<Page, Arc<Failure>>>,
    _quiet: NoSignals,
}

impl Deref for LockedFailures<'_> {
    type Target = BTreeMap<Page, Arc<Failure>>;

    fn deref(&self) -> &Self::Target {
        &self.failures
    }
}

impl DerefMut for LockedFailures<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.failures
    }
}

/// How a region is served.
#[derive(Debug, Default)]
pub(crate) struct Manner {
    /// Whether the parts of faults are timed.
    pub(crate) timed: bool,
    /// How many faults are served at once, where there is a limit.
    pub(crate) in_flight: Option<usize>,
    pub(crate) record: bool,
    pub(crate) replay: Option<Recording>,
    pub(crate) reporter: Option<Reporter>,
}

/// What is a table with a place for each page.
pub(crate) struct Tables {
    pages: Arc<PageTable>,
    recorder: Option<Recorder>,
}

impl Tables {
    pub(crate) fn new(pages: usize, manner: &Manner) -> Result<Self, Errno> {
        let pages = NonZeroUsize::new(pages).expect("a region has pages");
        let recorder = manner.record.then(|| Recorder::new(pages)).transpose()?;
        Ok(Self { pages: Arc::new(PageTable::new(pages)?), recorder })
    }
}

/// Whom to tell of a page that is bad: its offset, and why.
#[derive(Clone)]
pub(crate) struct Reporter(pub(crate) Arc<Tell>);

type Tell = dyn Fn(u64, &Failure) + Send + Sync;

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reporter")
    }
}

impl Served {
    /// `layout` and `shown` are of the same region, and so is all else.
    pub(crate) fn new(
        name: String,
        (layout, shown): (Arc<Layout>, Shown),
        (moves, staged): (bool, Result<(), &'static str>),
        (policy, manner, tables): (Policy, Manner, Tables),
        (place, uffd): (Place, Uffd),
        family: Option<impl Into<Arc<Family>>>,
    ) -> Self {
        let Manner { timed, in_flight, replay, reporter, .. } = manner;
        let size = (place.page_size(), place.all().pages);
        let counters = Counters::new(name.clone(), size, timed, family.is_some());
        Self {
            counters: Arc::new(counters),
            has_donated: layout.has_donated(),
            has_fetched: layout.has_fetched(),
            name,
            layout,
            in_place: Arc::new(shown.in_place),
            lazy: shown.lazy,
            refused: shown.refused,
            moves,
            pages: tables.pages,
            policy,
            reporter,
            recorder: tables.recorder,
            replay: replay.map(Replay::new),
            staged,
            pace: Pace::default(),
            permits: OnceLock::new(),
            later: OnceLock::new(),
            limit: in_flight.map(|most| (most, Berths::new(ROOM))),
            place,
            uffd,
            failures: Mutex::default(),
            any_failed: AtomicBool::new(false),
            strays: Strays::new(family.is_none()),
            family: family.map(Into::into),
            gate: Arc::new(Gate::new()),
            door: OnceLock::new(),
        }
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.place.page_size()
    }

    /// How many pages of a span, from its first on, show a memfd that is filled later; which, and from where on.
    pub(crate) fn lazy_pages(&self, span: Span) -> Option<(usize, &LazyMemfd, u64)> {
        let (pages, run) = self.lazy.prefix(span)?;
        match self.layout.backing_of(run.chunk) {
            Backing::Shared(Shared::Lazy(memfd)) => {
                Some((pages, memfd, run.offset_of(span.first, self.page_size())))
            }
            _ => unreachable!("only lazy memfds have lazy runs"),
        }
    }

    /// How many pages of a span, from its first on, lie in one chunk whose bytes come later; of which source, and from where on.
    pub(crate) fn fetched_pages(&self, span: Span) -> Option<(usize, &Fetched, u64)> {
        if !self.has_fetched || self.page_size() != PageSize::system() {
            return None;
        }
        let (first, span) = (span.first, self.place.contiguous(span));
        // What a balloon has taken is zeros.
        let span = self.place.adopted().map_or(span, |adopted| adopted.next_kept(span));
        if span.is_empty() || span.first != first {
            return None;
        }
        let offsets = self.page_size().offsets(span);
        let piece = self.layout.piece_at(offsets.start, offsets.end);
        let Backing::Fetched(fetched) = piece.backing else { return None };
        let pages = usize::try_from(piece.bytes / self.page_size().bytes() as u64).unwrap_or(usize::MAX);
        (pages > 0).then_some((pages.min(FETCH_PAGES), fetched, piece.offset))
    }

    /// Whether one more fetch may be under way, and the permission where there is a limit. Where there is a limit on faults, or
    /// something to be done about failures, sources are waited for.
    pub(crate) fn may_fetch(&self) -> Option<Option<Permit>> {
        if self.limit.is_some() || !self.layout.only_poisons() {
            return None;
        }
        match self.permits.get() {
            Some(permits) => permits.take().map(Some),
            None => Some(None),
        }
    }

    /// How many pages of a span, from its first on, a donation has to give; which, and from where on.
    pub(crate) fn movable_pages(&self, span: Span) -> Option<(usize, &Donated, u64)> {
        if !self.has_donated {
            return None;
        }
        let size = self.page_size();
        let chunk = self.layout.locate(size.offset_of(span.first));
        let Backing::Donated(donated) = self.layout.backing_of(chunk) else { return None };
        let own = whole_pages(&self.layout, size, chunk..chunk + 1)?;
        if span.first < own.span.first || own.span.end() <= span.first {
            return None;
        }
        let pages = span.pages.min(own.span.end().0 - span.first.0);
        Some((pages, donated, own.offset_of(span.first, size)))
    }

    /// The block of pages around one that are donated together and can move as one huge page. A region that is recorded moves
    /// each page by itself: those that come along have no first touch.
    pub(crate) fn movable_block(&self, page: Page) -> Option<Span> {
        let block = self.block_of(page).filter(|_| self.moves && self.recorder.is_none())?;
        let (movable, _, offset) = self.movable_pages(block)?;
        (movable == block.pages && offset.is_multiple_of(HUGE as u64)).then_some(block)
    }

    /// The block that a span begins with, if it can be filled in staging and moved in.
    pub(crate) fn stageable_block(&self, span: Span) -> Option<Span> {
        let block = self.block_of(span.first).filter(|_| self.staged.is_ok())?;
        let whole = block.first == span.first && block.pages <= span.pages;
        (whole && self.lazy.next_gap(block) == block && self.in_place.next_gap(block) == block)
            .then_some(block)
    }

    /// A span as far as the end of its first block, and what is behind it.
    pub(crate) fn first_block(&self, span: Span) -> (Span, Span) {
        let block = self.block_of(span.first).unwrap_or(span);
        let pages = block.end().0 - span.first.0;
        (span.prefix(pages), span.without_prefix(pages))
    }

    /// The aligned block of [`HUGE`] bytes that holds a page, if all of it is in the region.
    pub(crate) fn block_of(&self, page: Page) -> Option<Span> {
        let pages = HUGE / self.page_size().bytes();
        let block = Span { first: Page(page.0 / pages * pages), pages };
        (block.end() <= self.place.all().end()).then_some(block)
    }

    /// Whether a memfd that is filled later cannot be shown when it is, on this kernel.
    pub(crate) fn lacks_minor_faults(&self, backing: &Backing) -> bool {
        let lazy = matches!(backing, Backing::Shared(Shared::Lazy(_)));
        lazy && !self.uffd.features().contains(Features::MINOR_SHMEM)
    }

    /// The way in, for its server to keep.
    pub(crate) fn door(self: &Arc<Self>) -> &Arc<Door> {
        self.door.get_or_init(|| Arc::new(Door::new(&self.gate, self)))
    }

    /// The right to read what the kernel has to tell, if nobody has it who will.
    pub(crate) fn turn(&self) -> Option<Reading<'_>> {
        match &self.place {
            Place::Reserved(_) => Some(Reading::free()),
            Place::Adopted(_) => self.pace.turn(),
        }
    }

    /// The first pages of a span that are filled before anybody asks for them: neither there from the start, nor taken by a
    /// balloon.
    pub(crate) fn next_gap(&self, span: Span) -> Span {
        match &self.place {
            Place::Reserved(_) => self.in_place.next_gap(span),
            Place::Adopted(adopted) => adopted.next_kept(span),
        }
    }

    /// Nobody serves any more: who waits in the region, and who touches it, gets a signal.
    ///
    /// For a region of our own: **fence**, so that the whole range is inaccessible, then wake whoever waits, who tries again and
    /// meets the fenced range. Of adopted memory, what is missing is poisoned instead.
    pub(crate) fn shut(&self) {
        match &self.place {
            Place::Reserved(reservation) => {
                if let Err(errno) = reservation.fence() {
                    // Going on would show zeros for bytes, or leave them to hang. Not known to happen.
                    eprintln!("pagestitch: cannot fence region {} ({errno}): aborting", self.name);
                    std::process::abort();
                }
                // No thread begins to wait any more. One that waits runs on when it is woken, which may be after the drop.
                if self.uffd.has_waiters() {
                    reservation.linger();
                }
            }
            Place::Adopted(adopted) => abandon(self, adopted),
        }
        self.wake(self.place.all());
        if self.place.adopted().is_some() {
            refuse_births(self);
        }
        let began = Instant::now();
        while self.close_strays() != Rest::None {
            // An owner that moves or forks without end is ended, where it is known.
            let is_stuck = || self.place.adopted().is_some() && began.elapsed() > STRAYS_MAX;
            if is_stuck() && self.place.revoke(self.place.all()).is_ok() {
                break;
            }
            self.read_events(&mut Batch::with_capacity(STRAY_EVENTS), &mut |news| self.hear(news));
            thread::yield_now();
        }
    }

    /// Whether the process that adopted memory belongs to has ended, as far as it is known.
    pub(crate) fn owner_has_ended(&self) -> bool {
        self.place.adopted().is_some_and(Adopted::has_ended)
    }

    /// Keeps a region's addresses from other mappings for a while after its drop.
    pub(crate) fn linger(&self) {
        if let Place::Reserved(reservation) = &self.place {
            reservation.linger();
        }
    }

    /// Never closes the uffd: to whom waits there, that would be zeros.
    pub(crate) fn keep_open(&self) {
        self.uffd.keep_open();
    }

    pub(crate) fn failure(&self, page: Page) -> Option<Arc<Failure>> {
        // As a rule there is none, and no lock to be taken.
        if !self.any_failed.load(Ordering::SeqCst) {
            return None;
        }
        self.locked_failures().get(&page).cloned()
    }

    /// Keeps the lock of failures, for as long as `body` runs.
    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn with_failures_locked<R>(&self, body: impl FnOnce() -> R) -> R {
        let _failures = self.locked_failures();
        body()
    }

    fn locked_failures(&self) -> LockedFailures<'_> {
        let quiet = NoSignals::until_dropped();
        LockedFailures { failures: self.failures.lock(), _quiet: quiet }
    }

    /// The pages of a span that have failed, and why; ascending.
    pub(crate) fn failures(&self, span: Span) -> Vec<(Page, Arc<Failure>)> {
        // One that was let go is not bad any more. One that was given up is still claimed by whoever asks for it.
        self.once_bad(span).filter(|(page, _)| self.pages.state(*page) != State::Absent).collect()
    }

    /// The pages of a span that have failed and were not filled since, though they may have been let go; and why; ascending.
    pub(crate) fn once_bad(&self, span: Span) -> impl Iterator<Item = (Page, Arc<Failure>)> {
        let failures = self.locked_failures();
        let bad = failures.range(span.first..span.end()).map(|(&page, failure)| (page, Arc::clone(failure)));
        let bad: Vec<_> = bad.filter(|(page, _)| self.pages.state(*page) != State::Present).collect();
        bad.into_iter()
    }

    /// Tells whoever asked to be told that a page is bad.
    pub(crate) fn report(&self, page: Page, failure: &Failure) {
        if let Some(Reporter(tell)) = &self.reporter {
            let offset = self.page_size().offset_of(page);
            // A panic in there is no reason for a thread to wait for ever.
            if guarded(|| tell(offset, failure)).is_err() {
                log!(error, region = self.name, "whoever was told of a failure panicked");
            }
        }
    }

    /// Pages have been filled, after all if they had failed.
    pub(crate) fn forget_failures(&self, span: Span) {
        if self.any_failed.load(Ordering::Relaxed) {
            let mut failures = self.locked_failures();
            let failed = failures.range(span.first..span.end()).map(|(&page, _)| page);
            // Unless they were let go and lost anew since.
            let filled: Vec<_> = failed.filter(|page| self.pages.state(*page) == State::Present).collect();
            filled.iter().for_each(|page| drop(failures.remove(page)));
        }
    }

    /// A page that has failed was settled. Somebody may have healed it before, and forgotten the reason, and it has failed anew: a page
    /// that is bad has one, or whoever asks for it would look for it for ever. So has one that is absent by now: it may have been let
    /// go before it was marked.
    pub(crate) fn settle_failure(&self, page: Page, failure: &Arc<Failure>) {
        let mut failures = self.locked_failures();
        if self.pages.state(page) != State::Present {
            failures.entry(page).or_insert_with(|| Arc::clone(failure));
        }
    }

    pub(crate) fn keep_failure(&self, page: Page, failure: Arc<Failure>) {
        self.any_failed.store(true, Ordering::SeqCst);
        self.locked_failures().insert(page, failure);
    }

    /// Goes to work for as long as it takes, in whichever thread.
    pub(crate) fn enter_owned(&self) -> Option<OwnedGateGuard> {
        self.gate.enter_owned()
    }

    /// Nobody works for the region when this returns, and nobody will: sources are not called any more.
    pub(crate) fn close(&self) {
        // A thread that waits now may be woken before the gate is closed, and run after the drop.
        if self.uffd.has_waiters() {
            self.linger();
        }
        self.gate.close();
        // No worker comes for the faults that are queued.
        self.counters.land_all();
    }

    /// Whether the kernel lacks pages of a span; those that were filled are forgotten.
    ///
    /// Who lets go of pages runs on as soon as the event is read, which is before it is taken note of: in this very moment, maybe.
    pub(crate) fn lacks_any(&self, span: Span) -> bool {
        let mut any = false;
        // Where the question cannot be answered, the table is believed.
        self.place.residency(span, |page, here| {
            if !here {
                self.pages.forget_present(page);
                any = true;
            }
        });
        any
    }

    /// Forgets that pages of memfds that are filled later were shown. False if there are none in a range.
    pub(crate) fn forget_lazy(&self, range: &Range<u64>) -> bool {
        let lazy = |page: &Page| self.lazy.contains(*page);
        let shown = self.page_size().covering(range).iter().filter(lazy);
        shown.map(|page| self.pages.forget_present(page)).count() > 0
    }

    /// Whether a page that was touched is there.
    pub(crate) fn is_resident(&self, page: Page) -> bool {
        // `mincore(2)` says that the memfd has it, not that it is mapped: reclaim and a collapse take it out of the page table. To map
        // it again is answered with EEXIST where it is there.
        if self.lazy.contains(page) {
            return false;
        }
        // Where the question cannot be answered, filling it again is answered with EEXIST.
        self.place.is_resident(page)
    }
}

impl Wake for Served {
    fn wake(&self, span: Span) {
        let mut rest = span;
        while !rest.is_empty() {
            let now = self.place.contiguous(rest);
            rest = rest.without_prefix(now.pages);
            if let Err(errno) = self.uffd.wake(self.place.addresses(now)) {
                log!(error, region = self.name, %errno, "cannot wake");
            }
        }
    }
}

/// Pages asked of a source at once whose bytes come later.
const FETCH_PAGES: usize = 64;
/// How long what the owner of adopted memory leaves behind may keep a region from its end.
const STRAYS_MAX: Duration = Duration::from_secs(5);
/// Events read at once, while what nobody serves is seen to.
const STRAY_EVENTS: usize = 16;
/// Faults that may wait for a berth before room has to be made.
const ROOM: usize = 256;
