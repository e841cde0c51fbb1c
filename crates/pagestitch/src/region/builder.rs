//! Building a region: lay out, reserve, open, register, hand to the pool. All or nothing.

use crate::error::{Error, ErrorKind};
use crate::policy::Readahead;
use crate::region::in_place::{InPlaceRuns, memfd_of};
use crate::region::{Chunk, How, Layout, Plan, Region, Run, Served};
use crate::server::Pool;
use pagestitch_kernel::support::{Features, mappings_left};
use pagestitch_kernel::uffd::{FaultMode, RegisterMode};
use pagestitch_kernel::{Access, Errno, PageSize, Reservation, Uffd, View};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Describes a region. Made by [`Region::builder`]; nothing is reserved before [`build`](Builder::build).
#[derive(Debug)]
pub struct Builder {
    name: Option<String>,
    access: Access,
    zero_copy: bool,
    readahead: Readahead,
    /// The layout so far, or the first chunk that could not be laid.
    layout: Result<Layout, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            name: None,
            access: Access::ReadOnly,
            zero_copy: false,
            readahead: Readahead::Adaptive,
            layout: Ok(Layout::default()),
        }
    }
}

impl Builder {
    /// What to call the region in errors, logs and plans. By default `"unnamed"`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets [`Region::as_mut_slice`] write to the region. By default it is read-only.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.access = Access::Writable;
        self
    }

    /// How far ahead of a sequential reader pages are filled. By default [`Readahead::Adaptive`].
    #[must_use]
    pub fn readahead(mut self, readahead: Readahead) -> Self {
        self.readahead = readahead;
        self
    }

    /// Makes it an error if a byte would have to be copied: [`ErrorKind::NotZeroCopy`] names the chunk and the reason.
    #[must_use]
    pub fn require_zero_copy(mut self) -> Self {
        self.zero_copy = true;
        self
    }

    /// Lays a chunk at the end.
    #[must_use]
    pub fn chunk(mut self, chunk: impl Into<Chunk>) -> Self {
        self.push(chunk.into());
        self
    }

    /// Lays chunks at the end, in order.
    #[must_use]
    pub fn chunks(mut self, chunks: impl IntoIterator<Item = impl Into<Chunk>>) -> Self {
        let chunks = chunks.into_iter();
        if let Ok(layout) = &mut self.layout {
            layout.reserve(chunks.size_hint().0);
        }
        chunks.for_each(|chunk| self.push(chunk.into()));
        self
    }

    /// Reserves the addresses and starts to serve them. Reads no source.
    ///
    /// # Errors
    ///
    /// The first chunk that is [bad](ErrorKind::BadChunk) or [too much](ErrorKind::TooLarge); no chunk at all; no
    /// [userfaultfd](ErrorKind::NoUserfaultfd); a [limit](ErrorKind::Resources) of the process. Each names the thing and what to do.
    pub fn build(self, pool: &Pool) -> Result<Region, Error> {
        let name = self.name.unwrap_or_else(|| String::from("unnamed"));
        let in_region = |error: Error| error.inside(&name);
        let mut layout = self.layout.map_err(in_region)?;
        layout.finish().map_err(in_region)?;
        let page = PageSize::system();
        let pages = pages_for(&layout, page).map_err(in_region)?;
        let (reservation, mut view) = Reservation::new(pages, page, self.access)
            .map_err(|error| Error::because(ErrorKind::TooLarge, format_args!("region {name}"), error))?;
        let limit = |what, errno| {
            Error::because(ErrorKind::Resources, format_args!("region {name}: cannot {what}"), errno)
        };
        let uffd = open(&name)?;
        uffd.register(&reservation, RegisterMode::MISSING)
            .map_err(|errno| limit("register its range", errno))?;
        let in_place =
            show_in_place(&layout, page, &mut view).map_err(|errno| limit("map a memfd in place", errno))?;
        let served = Served::new(name.clone(), layout, in_place, self.readahead, reservation, uffd)
            .map_err(|errno| limit("reserve its page table (RLIMIT_AS: ulimit -v)", errno))?;
        if self.zero_copy {
            refuse_copies(&served)?;
        }
        served.counters.pages_in_place.add(served.in_place.pages());
        let served = Arc::new(served);
        let region = Region::new(view, served, pool.clone());
        pool.add(region.served())?;
        tracing::debug!(region = region.name(), bytes = region.len(), metrics = ?region.metrics(), "region built");
        Ok(region)
    }

    fn push(&mut self, chunk: Chunk) {
        if let Ok(layout) = &mut self.layout
            && let Err(error) = layout.push(chunk)
        {
            self.layout = Err(error);
        }
    }
}

fn pages_for(layout: &Layout, page: PageSize) -> Result<NonZeroUsize, Error> {
    let bytes = page.round_up(layout.total()).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.and_then(|bytes| NonZeroUsize::new(bytes / page.bytes())).ok_or_else(|| {
        let what = format!("{} bytes are more than there are addresses: split it", layout.total());
        Error::new(ErrorKind::TooLarge, what)
    })
}

/// Maps what can be shown in place, over a part of the range that was registered: what is mapped there is not.
fn show_in_place(layout: &Layout, page: PageSize, view: &mut View) -> Result<InPlaceRuns, Errno> {
    let mut runs = InPlaceRuns::decide(layout, page, || mappings_left() / MAPPINGS_A_RUN / BUDGET_SHARE);
    let mut mapped = 0;
    for run in runs.iter() {
        let memfd = memfd_of(layout, run.chunk).expect("only memfds are shown in place");
        match view.map(run.span, memfd.sealed(), run.offset) {
            Ok(()) => mapped += 1,
            // Somebody was quicker, and there are no more mappings after all: the rest is copied.
            Err(Errno::ENOMEM) => break,
            Err(errno) => return Err(errno),
        }
    }
    runs.truncate(mapped);
    Ok(runs)
}

fn refuse_copies(served: &Served) -> Result<(), Error> {
    match Plan::of(served).runs().iter().find(|run| !matches!(run.how, How::Map | How::Zero)) {
        Some(Run { chunks, source, why, .. }) => {
            let what =
                format!("region {}: chunk {} ({source}) is not zero-copy: {why}", served.name, chunks.start);
            Err(Error::new(ErrorKind::NotZeroCopy, what))
        }
        None => Ok(()),
    }
}

fn open(name: &str) -> Result<Uffd, Error> {
    let uffd = Uffd::open(Features::EVENT_REMOVE | Features::THREAD_ID | Features::POISON)
        .map_err(|error| Error::because(ErrorKind::NoUserfaultfd, format_args!("region {name}"), error))?;
    if uffd.mode() == FaultMode::UserOnly {
        tracing::debug!(
            region = name,
            "faults of system calls are not served: populate() before one reads the region"
        );
    }
    Ok(uffd)
}

/// A run is a mapping, and cuts the one around it in two.
const MAPPINGS_A_RUN: usize = 2;
/// One region takes no more than half of the mappings that are left.
const BUDGET_SHARE: usize = 2;
