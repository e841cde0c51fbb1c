//! Building a region: lay out, reserve, open, register, hand to the pool. All or nothing.

use crate::error::{Error, ErrorKind};
use crate::region::{Chunk, Layout, Region, Served};
use crate::server::Pool;
use pagestitch_kernel::support::Features;
use pagestitch_kernel::uffd::{FaultMode, RegisterMode};
use pagestitch_kernel::{Access, PageSize, Reservation, Uffd};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// Describes a region. Made by [`Region::builder`]; nothing is reserved before [`build`](Builder::build).
#[derive(Debug)]
pub struct Builder {
    name: Option<String>,
    access: Access,
    /// The layout so far, or the first chunk that could not be laid.
    layout: Result<Layout, Error>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { name: None, access: Access::ReadOnly, layout: Ok(Layout::default()) }
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
        let (reservation, view) = Reservation::new(pages, page, self.access)
            .map_err(|error| Error::because(ErrorKind::TooLarge, format_args!("region {name}"), error))?;
        let uffd = open(&name)?;
        uffd.register(&reservation, RegisterMode::MISSING).map_err(|errno| {
            Error::because(
                ErrorKind::Resources,
                format_args!("region {name}: cannot register its range"),
                errno,
            )
        })?;
        let served = Served::new(name, layout, reservation, uffd).map_err(|errno| {
            Error::because(
                ErrorKind::Resources,
                "no address space for the page table (RLIMIT_AS: ulimit -v)",
                errno,
            )
        })?;
        let served = Arc::new(served);
        let region = Region::new(view, served, pool.clone());
        pool.add(region.served())?;
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
