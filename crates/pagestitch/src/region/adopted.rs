//! Memory that somebody else has registered: another part of this program, or another process that sent its userfaultfd.
//!
//! ```text
//!   its addresses    |-- 0x7f10.. --|          |-- 0x7f90.. --|     ranges, wherever they are
//!   pages            |  0 .. 1023   |          | 1024 .. 3071 |     counted through
//!   chunks           |  a   |     b            |      c       |     laid end to end over all of them
//! ```
//!
//! Nothing can be mapped there, moved there, or asked of its pages: they are copied, and what the kernel says is all that is
//! known. What its owner lets go of is zeros from then on, as it is in any memory: the source has lost it.

use crate::error::{Error, ErrorKind};
use crate::metrics::{Meter, Metrics};
use crate::policy::Recording;
use crate::region::page_table::State;
use crate::region::{Core, Plan, Served};
use crate::source::Failure;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::support::Features;
use pagestitch_kernel::words::Words;
use pagestitch_kernel::{AddressRange, Batch, Errno, Outcome, Page, PageSize, Span, Uffd};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::RangeBounds;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Memory that is registered with a userfaultfd already, and whoever owns it. For
/// [`Builder::build_adopted`](crate::Builder::build_adopted).
#[derive(Debug)]
#[must_use]
pub struct AdoptedMemory {
    pub(super) uffd: Uffd,
    page: PageSize,
    ranges: Vec<(usize, usize)>,
    owner: Option<Arc<Process>>,
    loss: Loss,
    let_go: LetGo,
}

/// What becomes of the owner of adopted memory when bytes of it cannot be had: its source fails, or the region is dropped
/// before all of it was filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Loss {
    /// Whoever touches a page without bytes gets SIGBUS; the others go on. Linux 6.6; before, as [`Kill`](Self::Kill).
    #[default]
    Poison,
    /// The owner is ended with SIGKILL.
    Kill,
}

/// What pages hold that the owner of adopted memory has let go of (`MADV_DONTNEED`, `MADV_REMOVE`) and touches anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LetGo {
    /// Zeros, as in any memory: a balloon has taken them.
    #[default]
    Zeros,
    /// What their source holds, once more: a cache has dropped them.
    Refill,
}

impl AdoptedMemory {
    /// Takes over a userfaultfd. The memory's ranges, at least one, have to be [told](Self::range).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotUserfaultfd`] if it is another descriptor.
    pub fn new(uffd: OwnedFd) -> Result<Self, Error> {
        let uffd = Uffd::adopt(uffd)
            .map_err(|error| Error::because(ErrorKind::NotUserfaultfd, "cannot adopt memory", error))?;
        let page = PageSize::system();
        Ok(Self { uffd, page, ranges: Vec::new(), owner: None, loss: Loss::Poison, let_go: LetGo::Zeros })
    }

    /// The next `bytes` of the region are at address `start` of the owner's.
    pub fn range(mut self, start: usize, bytes: usize) -> Self {
        self.ranges.push((start, bytes));
        self
    }

    /// The size of its pages, in bytes: 2 MiB for hugetlbfs. By default the system's.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BadOption`] for a size that is no power of two, or not between the system's and 2 MiB.
    pub fn page_size(mut self, bytes: usize) -> Result<Self, Error> {
        let page =
            PageSize::new(bytes).filter(|page| (PageSize::system().bytes()..=HUGE).contains(&page.bytes()));
        self.page = page.ok_or_else(|| {
            let what = format!("pages of {bytes} bytes: serve pages of {} or 2 MiB", PageSize::system());
            Error::new(ErrorKind::BadOption, what)
        })?;
        Ok(self)
    }

    /// Whose memory it is, to be ended where there is no other way.
    pub fn owner(mut self, owner: impl Into<Arc<Process>>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// What to do where bytes cannot be had.
    pub const fn on_loss(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }

    /// What pages hold that were let go.
    pub const fn let_go(mut self, let_go: LetGo) -> Self {
        self.let_go = let_go;
        self
    }

    /// Checks what was said of it: its ranges hold `bytes` together.
    pub(super) fn settle(self, bytes: u64) -> Result<(Adopted, Uffd), Error> {
        let can_poison = self.uffd.features().contains(Features::POISON);
        if self.owner.is_none() && (self.loss == Loss::Kill || !can_poison) {
            let what = "where bytes cannot be had, its owner is to be ended, and nobody knows who that is: name the owner() \
                        (before Linux 6.6 there are no poison marks)";
            return Err(Error::new(ErrorKind::BadOption, what));
        }
        let parts = parts(&self.ranges, self.page)?;
        let pages = parts.last().map_or(0, |part| part.span.end().0);
        let total = self.page.offset_of(Page(pages));
        if total != bytes {
            let what = format!(
                "the chunks hold {bytes} bytes and the memory's ranges {total}: lay chunks for exactly its ranges"
            );
            return Err(Error::new(ErrorKind::BadOption, what));
        }
        let words = NonZeroUsize::new(pages.div_ceil(64)).expect("at least one page");
        let removed = Words::new(words).map_err(|errno| {
            Error::because(ErrorKind::Resources, "cannot reserve a table of its pages", errno)
        })?;
        let Self { uffd, page, owner, loss, let_go, .. } = self;
        Ok((Adopted { page, pages, parts, removed, map: RwLock::new(()), owner, loss, let_go }, uffd))
    }
}

fn parts(ranges: &[(usize, usize)], page: PageSize) -> Result<Vec<Part>, Error> {
    let bad = |what: String| Err(Error::new(ErrorKind::BadOption, what));
    let mut parts: Vec<Part> = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let range = format!("the range of {bytes:#x} bytes at {start:#x}");
        if AddressRange::new(start, bytes, page).is_none() || bytes == 0 || start.checked_add(bytes).is_none()
        {
            return bad(format!(
                "{range} is not whole pages of {page}: say where the memory is, to the page"
            ));
        }
        let overlaps =
            |part: &Part| start < part.start + page.bytes_of(part.span) && part.start < start + bytes;
        if let Some(other) = parts.iter().find(|part| overlaps(part)) {
            return bad(format!("{range} overlaps another, at {:#x}: a page has one place", other.start));
        }
        let first = parts.last().map_or(Page(0), |part| part.span.end());
        parts.push(Part { span: Span { first, pages: bytes / page.bytes() }, start });
    }
    if parts.is_empty() { bad(String::from("no range was told: say where the memory is")) } else { Ok(parts) }
}

/// Adopted memory as it is served.
#[derive(Debug)]
pub(crate) struct Adopted {
    page: PageSize,
    pages: usize,
    /// In the order of the pages.
    parts: Vec<Part>,
    /// A bit for each page that its owner has let go of: zeros since.
    removed: Words,
    /// Held by all who install, and alone by who reads events: what is installed is what the page holds *now*. Who lets
    /// go of pages runs on as soon as its event is read, and old bytes must not come after.
    map: RwLock<()>,
    owner: Option<Arc<Process>>,
    loss: Loss,
    let_go: LetGo,
}

/// A range of addresses and the pages that it holds.
#[derive(Debug)]
struct Part {
    span: Span,
    start: usize,
}

impl Adopted {
    pub(super) const fn page_size(&self) -> PageSize {
        self.page
    }

    pub(super) const fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn addresses(&self, span: Span) -> AddressRange {
        let part = self.part_of(span.first);
        assert!(span.end() <= part.span.end(), "{span:?} is not inside {part:?}");
        let start = part.start + (span.first.0 - part.span.first.0) * self.page.bytes();
        AddressRange::new(start, self.page.bytes_of(span), self.page)
            .expect("whole pages of an aligned range")
    }

    pub(super) fn contiguous(&self, span: Span) -> Span {
        span.prefix(self.part_of(span.first).span.end().0 - span.first.0)
    }

    pub(super) fn page_at(&self, address: usize) -> Option<Page> {
        // A few, as a rule: guests have one or two.
        self.parts.iter().find_map(|part| {
            let offset = address.checked_sub(part.start)?;
            let page = Page(part.span.first.0 + offset / self.page.bytes());
            (page < part.span.end()).then_some(page)
        })
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = (Span, usize)> {
        self.parts.iter().map(|part| (part.span, part.start))
    }

    /// Until it is dropped, no event is read.
    pub(crate) fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.map.read()
    }

    /// Until it is dropped, nothing is installed.
    pub(crate) fn change(&self) -> RwLockWriteGuard<'_, ()> {
        self.map.write()
    }

    /// Takes note that the owner has let go of a span.
    pub(super) fn remove(&self, span: Span) {
        if self.let_go == LetGo::Zeros {
            for page in span.iter() {
                self.removed[page.0 / 64].fetch_or(1 << (page.0 % 64), Ordering::SeqCst);
            }
        }
    }

    /// How many pages of a span, from its first on, were let go alike, or not; and which of the two.
    pub(crate) fn removed_prefix(&self, span: Span) -> (usize, bool) {
        let is_removed =
            |page: Page| self.removed[page.0 / 64].load(Ordering::SeqCst) >> (page.0 % 64) & 1 == 1;
        let first = is_removed(span.first);
        let same = |page: Page| is_removed(page) == first;
        (span.iter().take_while(|&page| same(page)).count(), first)
    }

    /// The first pages of a span that are to have bytes: not what a balloon has taken.
    pub(crate) fn next_kept(&self, span: Span) -> Span {
        let mut rest = span;
        while !rest.is_empty() {
            match self.removed_prefix(rest) {
                (pages, false) => return rest.prefix(pages),
                (pages, true) => rest = rest.without_prefix(pages),
            }
        }
        rest
    }

    /// Bytes of a page were lost: whether its owner was to be ended for it.
    pub(crate) fn lose(&self, region: &str) {
        if self.loss == Loss::Kill
            && let Err(errno) = self.end_owner()
        {
            tracing::error!(region, %errno, "cannot end the owner");
        }
    }

    /// Ends whoever owns the memory.
    pub(super) fn end_owner(&self) -> Result<(), Errno> {
        self.owner.as_ref().ok_or(Errno::ESRCH)?.kill()
    }

    fn part_of(&self, page: Page) -> &Part {
        let part = self.parts.iter().find(|part| part.span.contains(page));
        part.expect("a page of the region")
    }
}

/// Memory of another process, or another part of this program, that is filled on first touch. Made by
/// [`Builder::build_adopted`](crate::Builder::build_adopted).
///
/// Its owner opened a userfaultfd, registered ranges of its memory with it, and handed it over; from then on whoever touches
/// a missing page there waits for us. Linux 4.11; other page sizes than the system's: hugetlbfs.
///
/// # Drop
///
/// What was not filled by then is lost to the owner: it is [poisoned](Loss::Poison) or [ended](Loss::Kill), because it would read
/// zeros otherwise. [`finish`](Self::finish) fills everything first; the owner then goes on alone.
///
/// # Example
///
/// Two processes: the sender is as in `examples/adopt.rs`.
///
/// ```no_run
/// use pagestitch::{AdoptedMemory, Pool, Region, source::File};
/// # fn receive() -> (std::os::fd::OwnedFd, usize) { unimplemented!() }
///
/// let (uffd, address) = receive();                     // SCM_RIGHTS, see unix(7)
/// let memory = AdoptedMemory::new(uffd)?.range(address, 1 << 30);
/// let region = Region::builder().name("guest").chunk(File::open("guest.mem")?).build_adopted(memory, &Pool::new()?)?;
/// region.finish()?;                                    // fills what nobody has asked for yet, and lets it go
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub struct AdoptedRegion {
    core: Core,
}

impl AdoptedRegion {
    pub(super) const fn new(core: Core) -> Self {
        Self { core }
    }

    /// The name given to the builder, for errors, logs and plans.
    #[must_use]
    pub fn name(&self) -> &str {
        self.core.name()
    }

    /// How many bytes its ranges hold together.
    #[expect(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.len()
    }

    /// As [`Region::populate`](crate::Region::populate). What the owner has let go of is left alone.
    ///
    /// # Errors
    ///
    /// As there; [`ErrorKind::Source`] also where the owner has ended.
    pub fn populate(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.populate(range)
    }

    /// As [`Region::heal`](crate::Region::heal).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn heal(&self, range: impl RangeBounds<u64>) -> Result<(), Error> {
        self.core.heal(range)
    }

    /// As [`Region::failures`](crate::Region::failures).
    #[must_use]
    pub fn failures(&self) -> Vec<(u64, Arc<Failure>)> {
        self.core.failures()
    }

    /// As [`Region::plan`](crate::Region::plan).
    #[must_use]
    pub fn plan(&self) -> Plan {
        self.core.plan()
    }

    /// As [`Region::metrics`](crate::Region::metrics).
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.core.metrics()
    }

    /// As [`Region::meter`](crate::Region::meter).
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.core.meter()
    }

    /// As [`Region::recording`](crate::Region::recording).
    #[must_use]
    pub fn recording(&self) -> Option<Recording> {
        self.core.recording()
    }

    /// Fills all that is missing, and lets the memory go: its owner needs nobody from then on.
    ///
    /// # Errors
    ///
    /// The first source that failed; what could be filled is filled, and what could not is lost, as by
    /// [dropping](Self#drop).
    pub fn finish(self) -> Result<Metrics, Error> {
        let size = self.core.served.page_size();
        let mut rest = 0..self.len() as u64;
        let mut first = None;
        while let Err(error) = self.populate(rest.clone()) {
            let failed =
                self.failures().into_iter().map(|(offset, _)| offset).find(|offset| rest.contains(offset));
            first.get_or_insert(error);
            // Go on behind the page that failed; where none did, the owner is gone.
            let Some(offset) = failed else { break };
            rest.start = (offset + size.bytes() as u64).min(rest.end);
        }
        let metrics = self.core.close();
        first.map_or(Ok(metrics), Err)
    }

    /// As [`Region::close`](crate::Region::close).
    #[must_use = "to give everything back, dropping is enough"]
    pub fn close(self) -> Metrics {
        self.core.close()
    }
}

impl fmt::Debug for AdoptedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdoptedRegion")
            .field("name", &self.name())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// The last act before the uffd of adopted memory is closed, when nobody works for the region any more: what was not filled
/// is made bad, as it would be zeros. What the owner let go of is zeros, and is left.
pub(super) fn abandon(region: &Served, adopted: &Adopted) {
    let mut rest = region.place.all();
    let mut lost = 0;
    while let Some(absent) = next_absent(region, adopted, rest) {
        // Before it meets a page that is bad.
        if adopted.loss == Loss::Kill {
            return end(region, adopted, Outcome::Refused(Errno::ENODATA));
        }
        rest = rest.without_prefix(absent.first.0 - rest.first.0);
        match lose(region, adopted, adopted.contiguous(absent.prefix(POISON_PAGES))) {
            Ok((pages, bad)) => {
                lost += bad;
                rest = rest.without_prefix(pages);
            }
            Err(outcome) => return end(region, adopted, outcome),
        }
    }
    if lost > 0 {
        tracing::warn!(region = region.name, pages = lost, "abandoned before it was filled: poisoned");
    }
    release(region, adopted);
}

/// The next pages of a span that are to have bytes and have none.
fn next_absent(region: &Served, adopted: &Adopted, span: Span) -> Option<Span> {
    let mut rest = span;
    loop {
        let kept = adopted.next_kept(rest);
        if kept.is_empty() {
            return None;
        }
        let absent = first_absent(region, kept);
        if !absent.is_empty() {
            return Some(absent);
        }
        rest = rest.without_prefix(kept.end().0 - rest.first.0);
    }
}

/// Ends the registration: its owner may hold the uffd, too, and would wait for ever for what nobody reads from it.
fn release(region: &Served, adopted: &Adopted) {
    for part in &adopted.parts {
        // What is refused was unmapped, or its owner has ended.
        let _ = region.uffd.unregister(adopted.addresses(part.span));
    }
    // Who was on the way to let go of something waits until that is read.
    let mut batch = Batch::with_capacity(POISON_PAGES);
    for _ in 0..2 {
        region.read_events(&mut batch);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The absent pages of a span up to the next that is not.
fn first_absent(region: &Served, span: Span) -> Span {
    let here = |page: &Page| matches!(region.pages.state(*page), State::Present | State::Poisoned);
    let before = span.iter().take_while(here).count();
    let rest = span.without_prefix(before);
    rest.prefix(rest.iter().take_while(|page| !here(page)).count())
}

/// Makes pages bad that are missing: how many were looked at, and how many of these were.
fn lose(region: &Served, adopted: &Adopted, span: Span) -> Result<(usize, usize), Outcome> {
    match region.uffd.poison(adopted.addresses(span)) {
        Outcome::Done => Ok((span.pages, span.pages)),
        Outcome::Partial { bytes } => Ok((bytes / adopted.page.bytes(), bytes / adopted.page.bytes())),
        Outcome::AlreadyThere => Ok((1, 0)),
        Outcome::Changing => {
            // The owner lets go of something, and waits for us to know.
            region.read_events(&mut Batch::with_capacity(POISON_PAGES));
            std::thread::yield_now();
            Ok((0, 0))
        }
        // Unmapped since: nobody can touch it.
        Outcome::NotRegistered => Ok((1, 0)),
        outcome => Err(outcome),
    }
}

/// There is no way to mark pages: the owner has to end, or it would read zeros or wait for ever.
fn end(region: &Served, adopted: &Adopted, why: Outcome) {
    if why == Outcome::ProcessGone {
        return;
    }
    match adopted.end_owner() {
        Ok(()) => {
            tracing::warn!(region = region.name, ?why, "abandoned before it was filled: its owner was ended")
        }
        Err(errno) => {
            tracing::error!(region = region.name, ?why, %errno, "abandoned, and its owner cannot be ended: it may wait for ever");
            // Closing would show it zeros: better that it waits.
            region.keep_open();
        }
    }
}

/// Pages marked at once.
const POISON_PAGES: usize = 512;
