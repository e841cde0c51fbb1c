//! Inline: the thread that touches a page fills it, in a signal handler (`in_handler`), without another thread,
//! a wake-up or an event. Hence it serves only sources whose bytes lie at a stable address, files, and mapped
//! sources.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::fault::PrefetchJob;
use crate::method::Method;
use crate::serve::Served;
use crate::serve::contract::{Attachment, Demands, FaultServer, INLINE};
use crate::serve::in_handler::{Handler, PAGE};
use crate::source::Backing;
use crate::space::{Chunk, Mapping, Plan, PlanRun};
use pagestitch_kernel::Features;
use pagestitch_kernel::fork::ForkGeneration;
use pagestitch_kernel::sigbus::Registration;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// The thread that touches a page fills it itself, in a SIGBUS handler. This takes about half the
/// time, because no thread is woken. Linux 4.14.
///
/// * **Sources**: memory at a stable address ([`Memory`](crate::source::Memory), sealed memfds,
///   donated pages, holes), files ([`FileSource`](crate::source::FileSource),
///   [`ImmutableFile`](crate::source::ImmutableFile), [`WritableFile`](crate::source::WritableFile)) and mapped
///   sources. `build` refuses other sources ([`ErrorKind::UnsuitableServer`]): their code must not run in a
///   signal handler. A wrapper around a `FileSource` is such a source.
/// * **Files** are read by one `pread(2)` for each page. The signals of the thread wait for the disk. A
///   read that fails, or a file that has become too short, raises SIGBUS, also if the chunk has another
///   [policy](crate::OnFailure): `populate` applies the policy, and tells the reason.
/// * **System calls** that touch an absent page fail with `EFAULT`: call
///   [`populate`](crate::AnyRegion::populate) before.
/// * **Many threads**: the kernel delivers all signals of a process under one lock. With more than about
///   four threads that fault all the time, the throughput does not grow further: a pool serves more.
/// * **A [`Budget`](crate::Budget)**: the thread evicts pages in its handler. No slice of a file that may change.
/// * **[Write-back](crate::Builder::write_back)** goes to a [`WritableFile`](crate::source::WritableFile). With a
///   budget, the first write to a page that was read is a second fault, and a system call that writes to such a
///   page fails with `EFAULT`: use [`write_at`](crate::SharedRegion::write_at). The touch that needs the room writes
///   a few other pages to the file, into the page cache; beyond `RLIMIT_FSIZE` that is SIGXFSZ, as of `write(2)`.
///   After a failure a thread of the budget (`pagestitch/wb`) writes them, and a touch without room waits for it. If
///   sources take no bytes back for three seconds, the touch raises SIGBUS, and
///   [`flush`](crate::AnyRegion::flush) tells the reason.
/// * **Readahead**: none. A fault fills one page; `populate` pages that are read in any case.
/// * **Threads that touch the same page** at once: one fills it, and the others the next absent pages, so that
///   such threads share their work. These pages are in memory, or in the file of the touched page: its thread may then
///   wait for the read of a page that no thread touches. Not in a budget.
/// * **SIGBUS handlers** of the application that are installed before the first inline region: our
///   handler calls them for the signals of other memory, with the mask that they were installed
///   with.
/// * **SIGBUS handlers that are installed later**, often by a runtime (Go, a JVM, a sanitizer), get
///   the faults of regions first. They must pass foreign signals to the previous handler, with
///   `SA_SIGINFO`, and without unblocking signals. Better load such a runtime before the first
///   inline region.
/// * A thread that blocks SIGBUS cannot touch absent pages.
/// * **Stack**: the handler runs on the alternate stack of a thread that has one
///   (`sigaltstack(2)`), and takes less than 4 KiB of it in addition to the kernel's frame (a debug
///   build 5 KiB, with `track_changes()`). If the previous handler was installed without `SA_ONSTACK`, it runs on the thread's own stack.
/// * **Signal handlers** of the application may touch a region. All signals wait while a page is
///   filled. A handler that interrupts `populate` or `read_at` also gets the pages that its thread
///   is filling, except donated pages: touching one of these raises SIGBUS.
/// * A touch of a page whose bytes are unavailable raises SIGBUS, as with every server. A fault of
///   the handler itself does so too, and writes a line to standard error: the memory of a source
///   must not be a region that is served inline.
///
/// ```
/// use pagestitch::{Inline, Region};
///
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(Inline)?;
/// assert_eq!(region.as_slice()[50_000], 7);
/// assert_eq!(region.metrics().pages_copied, 1);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inline;

impl FaultServer for Inline {
    fn noun(&self) -> &'static str {
        "Inline"
    }

    fn number(&self) -> usize {
        INLINE
    }

    fn is_of_this_process(&self) -> bool {
        true
    }

    fn features(&self) -> Features {
        Features::SIGBUS
    }

    fn is_in_handler(&self) -> bool {
        true
    }

    fn check_features(&self, given: Features) -> Result<(), Error> {
        if given.contains(Features::SIGBUS) {
            return Ok(());
        }
        not_inline(None, "this kernel cannot serve faults inline (Linux 4.14): use a pool")
    }

    fn check(&self, demands: &Demands) -> Result<(), Error> {
        let Demands {
            adopted,
            children,
            recording,
            readahead,
            limit,
            shards,
            report_discards,
            timed,
            tracked: _,
            growth: _,
            on_memfd: _,
        } = demands;
        let refused = [
            (
                adopted,
                None,
                "adopted memory cannot be served inline: its owner has registered it for events; use a pool",
            ),
            (
                children,
                Some(BuildOption::InheritOnFork),
                "an inline region serves no forked children: use a pool",
            ),
            (&recording.is_some(), *recording, "only workers can record or replay: use a pool"),
            (
                readahead,
                Some(BuildOption::Readahead),
                "a signal handler fills one page and none ahead: leave out readahead(), or use a pool",
            ),
            (
                limit,
                Some(BuildOption::MaxInFlight),
                "each thread fills its own page, so faults cannot be limited: leave out max_in_flight(), or use a pool",
            ),
            (
                shards,
                Some(BuildOption::Shards),
                "no thread waits at the userfaultfd of an inline region, so more of them do not help: leave out shards(), or use a pool",
            ),
            (
                report_discards,
                Some(BuildOption::ReportDiscards),
                "no thread reads the reports of an inline region, so the discarding thread would wait for ever: leave out report_discards(), or use a pool",
            ),
            (
                timed,
                Some(BuildOption::RecordLatency),
                "a signal handler reads no clock: leave out record_latency(), or use a pool",
            ),
        ];
        let first = refused.into_iter().find(|(is, ..)| **is);
        first.map_or(Ok(()), |(_, option, what)| not_inline(option, what))
    }

    fn attach(&self, region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
        refuse_what_blocks(region)?;
        let range = region.target.addresses(region.target.all());
        // The kernel does not know the threads in the signal handler, so they may touch their page
        // again after the drop.
        if !region.uffd.is_stand_in() {
            region.linger();
        }
        let registration = Registration::new(range, Arc::new(Handler::new(region))).map_err(|errno| {
            let what = format!("region {}: cannot install a SIGBUS handler", region.name);
            Error::refused(what, errno)
        })?;
        Ok(Box::new(Attached {
            registration: Mutex::new(Some(registration)),
            generation: ForkGeneration::current(),
        }))
    }
}

fn not_inline(option: Option<BuildOption>, what: &str) -> Result<(), Error> {
    let error = Error::new(ErrorKind::UnsuitableServer, what);
    Err(match option {
        Some(option) => error.of_option(option),
        None => error,
    })
}

/// A region's registration with the SIGBUS handler.
struct Attached {
    registration: Mutex<Option<Registration>>,
    generation: ForkGeneration,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inline")
    }
}

impl Attachment for Attached {
    fn is_of_this_process(&self) -> bool {
        self.generation.is_current()
    }

    fn serves_system_calls(&self) -> bool {
        false
    }

    fn check_chunk(&self, region: &Mapping, chunk: &Chunk) -> Result<(), Error> {
        let is_served = match chunk.backing() {
            Backing::Memory(_) | Backing::Memfd(_) | Backing::Hole(_) => true,
            other => other.file().is_some(),
        };
        if is_served {
            return Ok(());
        }
        let number = region.layout.next_number();
        let (name, is_written) = (chunk.backing().source().name(), chunk.backing().writer().is_some());
        Err(cannot_serve(number, &name, is_written).inside(&region.name))
    }

    fn prefetch(&self, region: &Arc<Served>, _job: &Arc<PrefetchJob>) -> Result<(), Error> {
        let what = format!(
            "region {}: it is served inline, so no idle worker fills pages ahead: call populate(), or use a pool",
            region.name
        );
        Err(Error::new(ErrorKind::UnsuitableServer, what))
    }

    fn detach(&self, _region: &Served) {
        drop(self.registration.lock().take());
    }
}

/// Refuses chunks that a signal handler cannot fill.
fn refuse_what_blocks(region: &Served) -> Result<(), Error> {
    let refused = |what: String| Error::new(ErrorKind::UnsuitableServer, what).inside(&region.name);
    if region.page_size().bytes() != PAGE {
        return Err(refused(format!(
            "pages of {} are too large to gather on a stack: use a pool",
            region.page_size()
        )));
    }
    let blocking = Plan::of(region)
        .runs()
        .iter()
        .find_map(|run| Some((first_blocking(region, run)?, run.source.clone())));
    let Some((chunk, source)) = blocking else { return Ok(()) };
    let is_written = backing(region, chunk).is_some_and(|backing| backing.writer().is_some());
    Err(cannot_serve(chunk, &source, is_written).inside(&region.name))
}

/// `is_written`: written pages go back to the source.
fn cannot_serve(chunk: usize, source: &str, is_written: bool) -> Error {
    let instead = if is_written { "a WritableFile" } else { "read it into memory first" };
    let what = format!(
        "chunk {chunk} ({source}) cannot be served inline, as a signal handler must not read it: use a pool, or {instead}"
    );
    Error::new(ErrorKind::UnsuitableServer, what).of_chunk(chunk)
}

/// The source of a chunk, by its number.
fn backing(region: &Served, number: usize) -> Option<&Backing> {
    region.layout.chunk_of(number).map(|chunk| region.layout.backing_of(chunk))
}

/// The first chunk of a run that a signal handler cannot fill.
fn first_blocking(region: &Served, run: &PlanRun) -> Option<usize> {
    let is_file = |number| backing(region, number).is_some_and(|backing| backing.file().is_some());
    match run.method {
        Method::Buffered => run.chunks.clone().find(|&number| !is_file(number)),
        Method::Continue => Some(run.chunks.start),
        _ => None,
    }
}
