//! Inline: the thread that touches a page fills it, in a signal handler. No other thread, no wake-up, no event.
//!
//! The same journey as in `fault`, a page at a time: claim, fill, resolve, settle, count. What runs here takes no lock,
//! allocates nothing and calls no source's code, as whoever was interrupted may be in the middle of anything; hence only
//! sources whose bytes lie at a stable address, or that are mapped.

use crate::error::{Error, ErrorKind};
use crate::fault::callers;
use crate::fault::fill::{Content, fill_inline, gather_inline};
use crate::fault::resolve::{install_beside, install_inline};
use crate::serve::Served;
use crate::space::page_table::{State, Unclaimed, Wake};
use crate::space::{How, Plan, PlanRun};
use pagestitch_kernel::sigbus::{FaultHandler, Registration};
use pagestitch_kernel::{Page, Span};
use parking_lot::Mutex;
use std::sync::Arc;
use std::thread;

/// Starts to serve a region so.
pub(super) fn attach(region: &Arc<Served>) -> Result<Registration, Error> {
    refuse_what_blocks(region)?;
    let range = region.target.addresses(region.target.all());
    // A thread in the signal handler does not wait for the kernel: it may run on after the drop at any time.
    region.linger();
    Registration::new(range, Arc::new(Inline(Arc::clone(region)))).map_err(|errno| {
        let what = format_args!("region {}: cannot install a SIGBUS handler", region.name);
        Error::because(ErrorKind::Resources, what, errno)
    })
}

fn refuse_what_blocks(region: &Served) -> Result<(), Error> {
    let refused =
        |what: String| Err(Error::new(ErrorKind::NotInline, format!("region {}: {what}", region.name)));
    if region.page_size().bytes() != PAGE {
        return refused(format!(
            "pages of {} are too large to gather on a stack: use a pool",
            region.page_size()
        ));
    }
    if region.replay.is_some() || region.recorder.is_some() {
        return refused(String::from("a recording needs workers, to be taken or replayed: use a pool"));
    }
    match Plan::of(region).runs().iter().find(|run| matches!(run.how, How::Read | How::Continue)) {
        Some(PlanRun { chunks, source, .. }) => refused(format!(
            "chunk {} ({source}) cannot be served inline, as a signal handler must not read it: use a pool, or read it \
             into memory first",
            chunks.start
        )),
        None => Ok(()),
    }
}

struct Inline(Arc<Served>);

// SAFETY: what `serve` calls makes system calls and uses atomics and what is immutable. It allocates nothing: `Filled` and `Failure`
// are not made here. It takes no lock: the buffers are tried, claims wake by the futex of an event count, and `Quiet` does not log.
#[expect(unsafe_code, reason = "the promise that it may run in a signal handler")]
unsafe impl FaultHandler for Inline {
    fn serve(&self, address: usize) -> bool {
        let region = self.0.as_ref();
        // No gate guard: whoever takes the registration back waits for those that are here.
        region.target.page_at(address).is_some_and(|page| serve(region, page))
    }
}

/// Whether to touch the page again is worth it.
fn serve(region: &Served, page: Page) -> bool {
    if region.pages.state(page) == State::Poisoned {
        return false;
    }
    region.counters.local().faults.add(1);
    let quiet = Quiet(region);
    match region.pages.claim_touched(page, &quiet, || region.is_resident(page)) {
        // What fails is absent again: this access is a signal, and `populate` will tell why.
        Ok(mut claim) => with_content(region, page, |content| install_inline(region, &mut claim, content)),
        // A handler that has interrupted this thread while it fills the page.
        Err(Unclaimed::Filling) if callers::fills(callers::this_thread(), region, page) => {
            with_content(region, page, |content| install_beside(region, page.span(), content))
        }
        Err(unclaimed) => {
            // It is there, another thread is filling it, or the mark of a bad page is on its way.
            if unclaimed == Unclaimed::Resident {
                region.counters.local().late.add(1);
            }
            thread::yield_now();
            true
        }
    }
}

/// Finds the bytes of a page, and has them installed. False where there are none.
fn with_content(region: &Served, page: Page, install: impl FnOnce(Content<'_>) -> bool) -> bool {
    if let Some(content) = fill_inline(region, page) {
        return install(content);
    }
    // Not on the stack: it may be a small one.
    let Some(mut buffer) = BUFFERS.iter().find_map(Mutex::try_lock) else {
        // Others are about to leave theirs: the page is touched again.
        thread::yield_now();
        return true;
    };
    gather_inline(region, page, buffer.as_mut_slice()).is_some_and(install)
}

/// Wakes without a word: to log is to take locks.
struct Quiet<'r>(&'r Served);

impl Wake for Quiet<'_> {
    fn wake(&self, span: Span) {
        let _ = self.0.uffd.wake(self.0.target.addresses(span));
    }
}

const PAGE: usize = 4096;
/// Where pages that chunks meet in are put together. They are only ever tried, so nothing waits for one.
static BUFFERS: [Mutex<[u8; PAGE]>; 16] = [const { Mutex::new([0; PAGE]) }; 16];

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::{Chunk, Inline as Server, Region};
    use std::sync::mpsc;
    use std::time::Duration;

    /// A page of each kind, present in the kernel and not in the table: as it is for a thread that comes second.
    fn region() -> Region {
        let builder = Region::builder().chunk(vec![7u8; PAGE]).chunk(Chunk::hole(PAGE as u64));
        builder.chunks([vec![8u8; 1000], vec![9u8; PAGE - 1000]]).build(Server).unwrap()
    }

    #[test]
    fn a_fault_is_served_while_other_threads_have_the_locks() {
        let region = region();
        region.populate(..).unwrap();
        let served = Arc::clone(region.served());
        served.keep_failure(
            Page(1),
            Arc::new(served.layout.piece_at(0, 1).failed(std::io::Error::other("once"))),
        );
        (0..3).for_each(|page| served.pages.forget_present(Page(page)));
        let (done, is_done) = mpsc::channel();
        served.with_failures_locked(|| {
            let busy: Vec<_> = BUFFERS[1..].iter().map(Mutex::lock).collect();
            let serves = Arc::clone(&served);
            thread::spawn(move || (0..3).for_each(|page| done.send(serve(&serves, Page(page))).unwrap()));
            for page in 0..3 {
                assert_eq!(is_done.recv_timeout(Duration::from_secs(20)), Ok(true), "page {page}");
            }
            drop(busy);
        });
    }
}
