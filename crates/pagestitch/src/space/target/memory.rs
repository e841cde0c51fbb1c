//! What is adopted: a userfaultfd, the ranges that are registered with it, and whose they are.

use super::foreign::{Foreign, Part};
use super::listed::Listed;
use super::owner::{OnDiscard, OnUnavailable};
use crate::error::{Error, ErrorKind};
use pagestitch_kernel::Features;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::uffd::{AdoptError, OwnMemory};
use pagestitch_kernel::{AddressRange, Page, PageSize, Span, Uffd};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Memory that is registered with a userfaultfd already, and its owner. For
/// [`Builder::build_adopted`](crate::Builder::build_adopted).
///
/// Children that its owner forks are not served. Where the userfaultfd was opened with `UFFD_FEATURE_EVENT_FORK`, what a child does
/// not have is bad there (Linux 6.6); without, the kernel shows it zeros, so the owner is to keep children from having the memory
/// (`MADV_DONTFORK`, see madvise(2)). Memory of *this* process is always to be kept from them so: `fork(2)` would wait for a worker
/// that may wait for the allocator, which `fork(2)` holds.
///
/// **If this process dies** (SIGKILL, out of memory), nothing is filled or poisoned any more, and the kernel gives the userfaultfd up
/// with its last descriptor: a page that is missing then *reads as zeros*, in silence. As long as there is another descriptor, a thread
/// that touches such a page waits instead. So the owner keeps a descriptor of its own open for as long as it has the memory, or a
/// supervisor does, which fills or poisons what is missing, or ends the owner.
///
/// An owner that locks its memory (`mlockall(MCL_FUTURE)`) has pages populated with zeros when it maps them, and these never fault: it has
/// to map the memory `PROT_NONE`, `munlock(2)` and register it, and make it accessible only then.
#[derive(Debug)]
#[must_use]
pub struct AdoptedMemory {
    pub(crate) uffd: Uffd,
    page: PageSize,
    ranges: Vec<(usize, usize)>,
    owner: Option<Arc<Process>>,
    on_unavailable: OnUnavailable,
    on_discard: OnDiscard,
}

impl AdoptedMemory {
    /// Takes over a userfaultfd of another process. The memory's ranges, at least one, have to be [told](Self::range).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotUserfaultfd`] if it is another descriptor, or fills memory of *this* process: see
    /// [`of_this_process`](Self::of_this_process).
    pub fn new(uffd: OwnedFd) -> Result<Self, Error> {
        Self::of(Uffd::adopt(uffd))
    }

    /// Takes over a userfaultfd whose memory may be this process's own: another part of the program has registered it. To promise
    /// that it may be filled is `unsafe`.
    ///
    /// ```
    /// use std::os::fd::OwnedFd;
    /// use pagestitch::{AdoptedMemory, Error, OwnMemory};
    ///
    /// fn adopt(uffd: OwnedFd) -> Result<AdoptedMemory, Error> {
    ///     // SAFETY: the memory is a mapping of its own, of which nothing was read before it was registered.
    ///     let promise = unsafe { OwnMemory::promise() };
    ///     AdoptedMemory::of_this_process(uffd, promise)
    /// }
    /// ```
    ///
    /// Not so without the promise:
    ///
    /// ```compile_fail,E0133
    /// # use std::os::fd::OwnedFd;
    /// # use pagestitch::{AdoptedMemory, Error, OwnMemory};
    /// fn adopt(uffd: OwnedFd) -> Result<AdoptedMemory, Error> {
    ///     AdoptedMemory::of_this_process(uffd, OwnMemory::promise())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotUserfaultfd`] if it is another descriptor.
    pub fn of_this_process(uffd: OwnedFd, promise: OwnMemory) -> Result<Self, Error> {
        Self::of(Uffd::adopt_own(uffd, promise))
    }

    fn of(uffd: Result<Uffd, AdoptError>) -> Result<Self, Error> {
        let uffd =
            uffd.map_err(|error| Error::because(ErrorKind::NotUserfaultfd, "cannot adopt memory", error))?;
        let page = PageSize::system();
        Ok(Self {
            uffd,
            page,
            ranges: Vec::new(),
            owner: None,
            on_unavailable: OnUnavailable::Poison,
            on_discard: OnDiscard::Zeros,
        })
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
    pub const fn on_unavailable(mut self, on_unavailable: OnUnavailable) -> Self {
        self.on_unavailable = on_unavailable;
        self
    }

    /// What pages hold that were let go.
    pub const fn on_discard(mut self, on_discard: OnDiscard) -> Self {
        self.on_discard = on_discard;
        self
    }

    /// Checks what was said of it for a region: its ranges hold `bytes` together, and no other region serves it.
    pub(crate) fn settle(self, region: &str, bytes: u64) -> Result<(Foreign, Uffd), Error> {
        let can_poison = self.uffd.features().contains(Features::POISON);
        if self.owner.is_none() && (self.on_unavailable == OnUnavailable::Kill || !can_poison) {
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
        let Self { uffd, page, owner, on_unavailable, on_discard, .. } = self;
        let listed = Listed::new(&uffd, region).map_err(|other| {
            let what = format!("region {other} serves this userfaultfd already: drop that first");
            Error::new(ErrorKind::Busy, what)
        })?;
        let mut adopted = Foreign::new(page, parts, owner, on_unavailable, on_discard).map_err(|errno| {
            Error::because(ErrorKind::Resources, "cannot reserve a table of its pages", errno)
        })?;
        adopted.listed = Some(listed);
        Ok((adopted, uffd))
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
            return bad(format!("{range} overlaps the range at {:#x}: pass each page once", other.start));
        }
        let first = parts.last().map_or(Page(0), |part| part.span.end());
        parts.push(Part { span: Span { first, pages: bytes / page.bytes() }, start });
    }
    if parts.is_empty() { bad(String::from("no range was told: say where the memory is")) } else { Ok(parts) }
}
