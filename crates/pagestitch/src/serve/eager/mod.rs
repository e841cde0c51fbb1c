//! Eager: a server without faults. The build maps the pages that can be mapped, and fills all others.
//!
//! | file | content |
//! |---|---|
//! | `spans` | the pages to fill, and the holes that are shown without a fill |
//! | `admission` | refuses a region that is larger than the memory that is left |
//! | `fill` | reads the sources, in parallel, into a memfd |
//! | `show` | maps the filled pages, opens the holes, and poisons the pages that have failed |
//!
//! ```text
//!   sources ──read, in parallel──▶ memfd ──seal──▶ mapped MAP_PRIVATE over the closed reservation
//!                                                  holes: opened, zero pages
//!                                                  failed pages: an empty memfd over them, SIGBUS
//! ```
//!
//! The reservation stays closed until its bytes are mapped over it, so no page ever reads as zeros
//! for bytes. The bytes lie in a memfd, because a page that is discarded (`MADV_DONTNEED`) then has
//! its bytes again. In anonymous memory it would read as zeros.

mod admission;
mod fill;
mod show;
mod spans;

use crate::error::{BuildOption, Error, ErrorKind, Failure, FailureReason};
use crate::fault::PrefetchJob;
use crate::metrics::{Coverage, Presence};
use crate::serve::Served;
use crate::serve::contract::{Attachment, Demands, EAGER, FaultServer};
use crate::space::Mapping;
use pagestitch_kernel::{Page, Span, View};
use spans::Spans;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

/// Fills a region when it is built, without userfaultfd. For processes that may not use it: in a
/// container with Docker's default seccomp profile, in gVisor, on a kernel without it.
/// [`best_server`](crate::best_server()) takes a [`Pool`](crate::Pool) where it can, and this where it
/// must.
///
/// The build maps what can be mapped in place, as for any server. It reads everything else from the
/// sources, on a thread for each CPU, on [`populate_threads`](crate::Builder::populate_threads), and on
/// no more than [`max_in_flight`](crate::Builder::max_in_flight) allows.
///
/// * **Sources**: all. Donated pages are copied, because a moved page that is discarded would read as
///   zeros. A memfd that is filled later is filled and copied.
/// * **Memory**: the region takes the memory of all pages that are not mapped in place. The build
///   refuses a region for which `MemAvailable`, or the limit of a cgroup, has not enough left
///   ([`ErrorKind::LimitReached`]), because the kernel would end a process for it. That is an
///   estimate: other processes take memory meanwhile. The build drops the sources that it has copied.
/// * **Holes** of 64 KiB and more take no memory, also if they are read. Each takes two mappings, so
///   the smallest are filled if too few are left (`vm.max_map_count`).
/// * **A source that fails** fails the build, which leaves nothing behind; the error names the chunk
///   and the offset. [`on_failure`](crate::Chunk::on_failure) tells otherwise: it retries, gives
///   zeros, or with [`OnFailure::Poison`](crate::OnFailure::Poison) poisons the page. A touch of that
///   page is SIGBUS, in a forked child SIGSEGV.
///   [`retry_failed`](crate::AnyRegion::retry_failed) cannot fill it later.
/// * **A discarded page** (`MADV_DONTNEED`) has the bytes of its source again, without the
///   region's writes.
/// * **Forked children** inherit the region, each page copy-on-write, with or without
///   [`inherit_on_fork`](crate::Builder::inherit_on_fork).
/// * **System calls** can read and write all pages that have not failed.
/// * **Options**: there are no faults, so readahead, prefetches and replays have no work left. A
///   recording is refused, because nothing reveals a touch.
///
/// ```
/// use pagestitch::{Chunk, Eager, Region};
///
/// let region = Region::builder().chunk(vec![7u8; 100_000]).chunk(Chunk::hole(1 << 40)).build(Eager)?;
/// assert_eq!(region.as_slice()[50_000], 7);
/// assert_eq!(region.metrics().faults, 0);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Eager;

impl FaultServer for Eager {
    fn noun(&self) -> &'static str {
        "Eager"
    }

    fn number(&self) -> usize {
        EAGER
    }

    fn is_of_this_process(&self) -> bool {
        true
    }

    fn serves_faults(&self) -> bool {
        false
    }

    fn check(&self, demands: &Demands) -> Result<(), Error> {
        let refused = |what: &str| Err(Error::new(ErrorKind::UnsuitableServer, what));
        if demands.adopted {
            return refused("adopted memory is filled through its owner's userfaultfd: use a pool");
        }
        if demands.growth {
            let what = "a region that is filled when it is built takes no further chunks: leave out capacity(), or use a pool";
            return refused(what).map_err(|error| error.of_option(BuildOption::Capacity));
        }
        if demands.recording == Some(BuildOption::Record) {
            let what = "a region that is filled when it is built does not notice a touch: leave out record(), or use a pool";
            return refused(what).map_err(|error| error.of_option(BuildOption::Record));
        }
        if demands.on_memfd {
            let what = "the build fills a private memfd, which no other process can write: leave out on_memfd(), or use a pool and populate()";
            return refused(what).map_err(|error| error.of_option(BuildOption::OnMemfd));
        }
        if let Some(option) = demands.tracked {
            let what = "the kernel records writes through a userfaultfd, which Eager does without: leave out track_changes() and write_back(), or use a pool";
            return refused(what).map_err(|error| error.of_option(option));
        }
        Ok(())
    }

    fn fill(&self, region: &Mapping, view: &mut View, most: Option<usize>) -> Result<(), Error> {
        let spans = Spans::of(region);
        admission::check(region, &spans)?;
        let by_default = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = region.populate_threads.unwrap_or_else(by_default);
        let filled = fill::fill(region, &spans, most.map_or(threads, |most| threads.min(most)))?;
        show::show(region, view, &spans, filled)
    }

    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        let poisoned = region.failed_pages(region.target.all()).map(|(page, _)| page).collect();
        Ok(Box::new(Attached { poisoned }))
    }
}

/// A region whose pages are all present, or poisoned.
struct Attached {
    /// Ascending.
    poisoned: Arc<[Page]>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Eager")
    }
}

impl Attachment for Attached {
    /// A forked child has all that it needs.
    fn is_of_this_process(&self) -> bool {
        true
    }

    /// It is over, because no page is absent.
    fn prefetch(&self, _region: &Arc<Served>, job: &Arc<PrefetchJob>) -> Result<(), Error> {
        job.end_present(|span| inside(&self.poisoned, span).len());
        Ok(())
    }

    fn detach(&self, _region: &Served) {}

    fn populate(
        &self,
        region: &Mapping,
        span: Span,
        _go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), Arc<Failure>> {
        let failed = inside(&self.poisoned, span).first();
        failed.and_then(|&page| region.failure(page)).map_or(Ok(()), Err)
    }

    fn retry_failed(&self, region: &Mapping, span: Span) -> Result<(), Arc<Failure>> {
        // The source is not read, so the attempts stay.
        let again =
            |failure: Arc<Failure>| Failure { attempts: failure.attempts, ..failure.again(irrecoverable()) };
        self.populate(region, span, &|| true).map_err(|failure| Arc::new(again(failure)))
    }

    fn presence(&self, _region: &Mapping) -> Arc<dyn Presence> {
        Arc::new(AllPresent { poisoned: Arc::clone(&self.poisoned) })
    }
}

fn irrecoverable() -> std::io::Error {
    FailureReason::Irrecoverable
        .error("the server Eager reads the sources only when a region is built: build the region anew")
}

/// Tells that all pages are present but the poisoned ones.
#[derive(Debug)]
struct AllPresent {
    poisoned: Arc<[Page]>,
}

impl Presence for AllPresent {
    fn coverage(&self, span: Span) -> Coverage {
        let (pages, poisoned) = (span.pages as u64, inside(&self.poisoned, span).len() as u64);
        Coverage { pages, present: pages - poisoned, poisoned, ..Coverage::default() }
    }
}

/// The pages of an ascending list that lie in a span.
fn inside(pages: &[Page], span: Span) -> &[Page] {
    let start = pages.partition_point(|&page| page < span.first);
    &pages[start..start + pages[start..].partition_point(|&page| page < span.end())]
}
