//! Inline: the thread that touches a page fills it, in a signal handler. No other thread, no wake-up, no event.
//!
//! The same journey as in `fault`, a page at a time: claim, fill, resolve, settle, count. What runs here takes no lock,
//! allocates nothing and calls no source's code, as whoever was interrupted may be in the middle of anything; hence only
//! sources whose bytes lie at a stable address, or that are mapped.

use crate::error::{Error, ErrorKind};
use crate::region::page_table::{Claim, State};
use crate::region::{How, Plan, Run, Served};
use crate::server::fault::claim;
use crate::server::resolve::install_inline;
use crate::source::{fill_inline, gather_inline};
use pagestitch_kernel::Page;
use pagestitch_kernel::sigbus::{OnFault, Registration};
use std::sync::Arc;
use std::thread;

/// Starts to serve a region so.
pub(super) fn attach(region: &Arc<Served>) -> Result<Registration, Error> {
    refuse_what_blocks(region)?;
    let range = region.place.addresses(region.place.all());
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
        Some(Run { chunks, source, .. }) => refused(format!(
            "chunk {} ({source}) cannot be served inline, as a signal handler must not read it: use a pool, or read it \
             into memory first",
            chunks.start
        )),
        None => Ok(()),
    }
}

struct Inline(Arc<Served>);

impl OnFault for Inline {
    fn serve(&self, address: usize) -> bool {
        let region = self.0.as_ref();
        // No visit: whoever takes the registration back waits for those that are here.
        region.place.page_at(address).is_some_and(|page| serve(region, page))
    }
}

/// Whether to touch the page again is worth it.
fn serve(region: &Served, page: Page) -> bool {
    if region.pages.state(page) == State::Poisoned {
        return false;
    }
    region.counters.here().faults.add(1);
    let Some(mut claim) = claim(region, page) else {
        // It is there, or another thread is filling it.
        thread::yield_now();
        return true;
    };
    // What fails is absent again: this access is a signal, and `populate` will tell why.
    match fill_inline(region, page) {
        Some(content) => install_inline(region, &mut claim, content),
        None => gather(region, page, &mut claim),
    }
}

/// Apart, so that only pages that chunks meet in need the room on the stack.
#[inline(never)]
fn gather(region: &Served, page: Page, claim: &mut Claim<'_>) -> bool {
    let mut buffer = [0; PAGE];
    gather_inline(region, page, &mut buffer).is_some_and(|content| install_inline(region, claim, content))
}

const PAGE: usize = 4096;
