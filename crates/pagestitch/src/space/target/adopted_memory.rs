//! The description of adopted memory: a userfaultfd, the ranges registered with it, and their
//! owner.

use super::foreign::{Foreign, ForeignRange};
use super::listed::ListedUffd;
use super::owner::{OnDiscard, OnUnavailable};
use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use pagestitch_kernel::Features;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::process::Process;
use pagestitch_kernel::uffd::{AdoptError, OwnMemory};
use pagestitch_kernel::{AddressRange, Page, PageSize, Span, Uffd};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Memory that its owner has registered with a userfaultfd, for
/// [`Builder::build_adopted`](crate::Builder::build_adopted).
///
/// # What the owner must do
///
/// * **Forks.** Children of the owner are not served. If the userfaultfd has
///   `UFFD_FEATURE_EVENT_FORK`, absent pages are poisoned in the child (Linux 6.6). Without it they
///   read as zeros in the child, so the owner must exclude the memory from children
///   (`MADV_DONTFORK`, see madvise(2)). Memory of *this* process must always be excluded: `fork(2)`
///   would wait for a worker that may wait for the allocator lock, which `fork(2)` holds.
/// * **Death of this process** (SIGKILL, out of memory). No page is filled or poisoned any more.
///   With its last descriptor the kernel closes the userfaultfd, and absent pages then silently
///   *read as zeros*. While another descriptor is open, a thread that touches such a page blocks
///   instead. The owner should therefore keep a descriptor open as long as it has the memory. So
///   may a supervisor, which then fills or poisons the absent pages, or kills the owner.
/// * **Locked memory.** Under `mlockall(MCL_FUTURE)` the kernel populates new mappings with zeros,
///   which never fault. Such an owner must map the memory `PROT_NONE`, `munlock(2)` it, register
///   it, and only then make it accessible.
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
    /// Takes over a userfaultfd of another process. Add at least one [range](Self::range).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotUserfaultfd`] if the descriptor is not a userfaultfd with registered memory;
    /// [`ErrorKind::OwnMemory`] if it serves memory of *this* process: see
    /// [`of_this_process`](Self::of_this_process).
    pub fn new(uffd: OwnedFd) -> Result<Self, Error> {
        Self::of(Uffd::adopt(uffd))
    }

    /// Takes over a userfaultfd whose memory may belong to this process, registered by another part
    /// of the program. Creating `promise`, the promise that the memory may be filled, is `unsafe`.
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
    /// Does not compile without the promise:
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
    /// [`ErrorKind::NotUserfaultfd`] if the descriptor is not a userfaultfd.
    pub fn of_this_process(uffd: OwnedFd, promise: OwnMemory) -> Result<Self, Error> {
        Self::of(Uffd::adopt_own(uffd, promise))
    }

    pub(super) fn of(uffd: Result<Uffd, AdoptError>) -> Result<Self, Error> {
        let uffd = uffd.map_err(|error| {
            let kind = match error {
                AdoptError::OwnMemory => ErrorKind::OwnMemory,
                _ => ErrorKind::NotUserfaultfd,
            };
            Error::because(kind, "cannot adopt memory", error)
        })?;
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

    /// Appends a range of `bytes` bytes at address `start` of the owner. The region's bytes lie in
    /// its ranges in the order of these calls.
    ///
    /// ```no_run
    /// use pagestitch::{AdoptedMemory, OnDiscard, OnUnavailable, Process};
    /// # fn receive() -> (std::os::fd::OwnedFd, usize, Process) { unimplemented!() }
    ///
    /// let (uffd, address, vmm) = receive();
    /// let memory = AdoptedMemory::new(uffd)?
    ///     .range(address, 1 << 30)
    ///     .range(address + (2 << 30), 1 << 30)                    // the region has two gibibytes
    ///     .owner(vmm)
    ///     .on_unavailable(OnUnavailable::Kill)                    // rather than SIGBUS in the guest's kernel
    ///     .on_discard(OnDiscard::Zeros);                          // of a balloon
    /// # let _ = memory;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn range(mut self, start: usize, bytes: usize) -> Self {
        self.ranges.push((start, bytes));
        self
    }

    /// Sets the page size of the memory, in bytes: 2 MiB for hugetlbfs. Default: the system's page
    /// size.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidOption`] if the size is not a power of two from the system's page size
    /// to 2 MiB.
    ///
    /// ```no_run
    /// # use pagestitch::AdoptedMemory;
    /// # fn receive() -> (std::os::fd::OwnedFd, usize) { unimplemented!() }
    /// let (uffd, address) = receive();
    /// let memory = AdoptedMemory::new(uffd)?.range(address, 1 << 30).page_size(2 << 20)?;   // hugetlbfs
    /// # let _ = memory;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn page_size(mut self, bytes: usize) -> Result<Self, Error> {
        let page =
            PageSize::new(bytes).filter(|page| (PageSize::system().bytes()..=HUGE).contains(&page.bytes()));
        self.page = page.ok_or_else(|| {
            let (page, least) = (Bytes(bytes as u64), PageSize::system());
            let what = format!("pages of {page}: serve pages of {least} or 2 MiB");
            Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::PageSize)
        })?;
        Ok(self)
    }

    /// Names the process that owns the memory. It is killed if [`OnUnavailable::Kill`] is chosen
    /// and bytes are unavailable, or if the kernel has no poison markers (before Linux 6.6).
    pub fn owner(mut self, owner: impl Into<Arc<Process>>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// Sets the fate of the owner when bytes are unavailable. Default: [`OnUnavailable::Poison`].
    pub const fn on_unavailable(mut self, on_unavailable: OnUnavailable) -> Self {
        self.on_unavailable = on_unavailable;
        self
    }

    /// Sets the bytes of pages that the owner has discarded. Default: [`OnDiscard::Zeros`].
    pub const fn on_discard(mut self, on_discard: OnDiscard) -> Self {
        self.on_discard = on_discard;
        self
    }

    /// Checks the description for a region: the ranges must hold exactly `bytes` bytes, and no
    /// other region may serve the userfaultfd.
    pub(crate) fn settle(self, region: &str, bytes: u64) -> Result<(Foreign, ListedUffd), Error> {
        let can_poison = self.uffd.features().contains(Features::POISON);
        if self.owner.is_none() && (self.on_unavailable == OnUnavailable::Kill || !can_poison) {
            let what = "the owner must be killed if bytes are unavailable, and it is unknown: name the owner() \
                        (before Linux 6.6 there are no poison markers)";
            return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Owner));
        }
        let parts = parts(&self.ranges, self.page)?;
        let pages = parts.last().map_or(0, |part| part.span.end().0);
        let total = self.page.offset_of(Page(pages));
        if total != bytes {
            let what = format!(
                "the chunks hold {} and the memory's ranges {total}: lay chunks for exactly its ranges",
                Bytes(bytes)
            );
            return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Range));
        }
        let Self { uffd, page, owner, on_unavailable, on_discard, .. } = self;
        let uffd = ListedUffd::new(uffd, region).map_err(|other| {
            let what = format!("region {other} serves this userfaultfd already: drop that first");
            Error::new(ErrorKind::InUse, what)
        })?;
        let foreign = Foreign::new(page, parts, owner, on_unavailable, on_discard)
            .map_err(|errno| Error::refused("cannot reserve a table of its pages", errno))?;
        Ok((foreign, uffd))
    }
}

fn parts(ranges: &[(usize, usize)], page: PageSize) -> Result<Vec<ForeignRange>, Error> {
    let bad = |what: String| Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Range));
    let mut parts: Vec<ForeignRange> = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let range = format!("the range of {bytes:#x} bytes at {start:#x}");
        if AddressRange::new(start, bytes, page).is_none() || bytes == 0 || start.checked_add(bytes).is_none()
        {
            return bad(format!("{range} is not whole pages of {page}: align its start and length to pages"));
        }
        let overlaps =
            |part: &ForeignRange| start < part.start + page.bytes_of(part.span) && part.start < start + bytes;
        if let Some(other) = parts.iter().find(|part| overlaps(part)) {
            return bad(format!("{range} overlaps the range at {:#x}: pass each page once", other.start));
        }
        let first = parts.last().map_or(Page(0), |part| part.span.end());
        parts.push(ForeignRange { span: Span { first, pages: bytes / page.bytes() }, start });
    }
    if parts.is_empty() {
        bad(String::from("adopted memory has no range: add one with range()"))
    } else {
        Ok(parts)
    }
}
