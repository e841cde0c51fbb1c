//! The release of sources: memory whose bytes are all in the region is dropped.
//!
//! A source is released when all pages with bytes of it are present. No page is counted. Each source
//! has a *watched* page instead, which is one of its missing pages. Only the thread that fills the
//! watched page looks for another missing page; if there is none, it releases the source. So the
//! cost of a fault is one load and one comparison for each chunk in its pages.
//!
//! ```text
//!   pages of a source   | P | P | - | P | - |      P present, - missing
//!                                 └ watched: the thread that fills it looks on, and finds the last one
//! ```
//!
//! **No source is missed.** A thread that watches another page looks at the page's state afterwards,
//! and a thread that fills a page looks at the watched page afterwards. So one of the two sees the
//! other, and looks on.
//!
//! **No reader loses its bytes.** A thread enters a source to read it. The release does not wait for
//! threads inside, because it may run on a worker: it makes the source watch *any* page, and each
//! thread looks at its pages again after it has left the source.

use super::Layout;
use super::page_table::PageTable;
use crate::source::{Memory, Releasables, Released};
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::{Page, PageSize, Span};
use std::ops::Range;

/// The sources of a region that are released.
#[derive(Debug)]
pub(crate) struct Releases {
    page: PageSize,
    /// The chunks of each source that can be released, ascending, source by source.
    chunks: Vec<u32>,
    /// An entry for each source of the layout.
    sources: Vec<Watched>,
}

/// The pages of a source.
#[derive(Debug)]
struct Watched {
    /// The chunks of the source, in [`Releases::chunks`].
    chunks: Range<usize>,
    /// A page of the source that is missing, or was until a moment ago; [`ANY`] or [`NONE`].
    page: AtomicUsize,
}

impl Releases {
    /// Makes memory of a layout releasable. `None` if it has none.
    pub(crate) fn new(layout: &mut Layout, which: Releasables, page: PageSize) -> Option<Self> {
        let releasable = layout.make_releasable(which);
        let of = |chunk: &u32| layout.source_of(*chunk as usize);
        let mut chunks: Vec<u32> =
            (0..layout.chunks() as u32).filter(|chunk| releasable[of(chunk)]).collect();
        // Stable: the chunks of a source stay in order.
        chunks.sort_by_key(of);
        let mut first = 0;
        let sources = (0..releasable.len()).map(|source| {
            let own = chunks[first..].partition_point(|chunk| of(chunk) == source);
            let range = first..first + own;
            first = range.end;
            let watched = chunks[range.clone()].first();
            let watched =
                watched.map_or(NONE, |&chunk| page.page_at(layout.offsets_of(chunk as usize).start).0);
            Watched { chunks: range, page: AtomicUsize::new(watched) }
        });
        let sources = sources.collect();
        (!chunks.is_empty()).then_some(Self { page, chunks, sources })
    }

    /// Releases the sources with bytes in `span` whose pages are all present. Called by each thread
    /// that has filled pages, after it has left their sources. Returns the number of released bytes.
    ///
    /// Destructors of sources run here, so the caller holds no claim.
    pub(crate) fn look_at(&self, layout: &Layout, pages: &PageTable, span: Span) -> u64 {
        let mut released = 0;
        for chunk in layout.chunks_in(&self.page.offsets(span)) {
            let source = layout.source_of(chunk);
            let watched = &self.sources[source].page;
            let page = watched.load(Ordering::SeqCst);
            if page == ANY || span.contains(Page(page)) {
                released += self.look_on(layout, pages, source);
            }
        }
        released
    }

    /// Watches the next missing page of a source, or releases the source.
    #[inline(never)]
    fn look_on(&self, layout: &Layout, pages: &PageTable, source: usize) -> u64 {
        let Watched { chunks, page: watched } = &self.sources[source];
        let chunks = &self.chunks[chunks.clone()];
        let missing = |from| self.first_missing(layout, pages, chunks, from);
        let mut from = Page(watched.load(Ordering::SeqCst));
        while let Some(page) = missing(from).or_else(|| missing(Page(0))) {
            watched.store(page.0, Ordering::SeqCst);
            // The thread that fills the page may have looked before the store.
            if pages.first_missing(page.span()).is_some() {
                return 0;
            }
            from = page;
        }
        // Before the attempt: a thread that is inside now sees it after it has left.
        watched.store(ANY, Ordering::SeqCst);
        let released = layout.memory_of(source).map_or(Released::No, Memory::release);
        if released != Released::Busy {
            watched.store(NONE, Ordering::SeqCst);
        }
        match released {
            Released::Bytes(bytes) => bytes,
            Released::Busy | Released::No => 0,
        }
    }

    /// The first page from `from` on that has bytes of one of these chunks and is not present.
    fn first_missing(&self, layout: &Layout, pages: &PageTable, chunks: &[u32], from: Page) -> Option<Page> {
        let span = |chunk: &u32| self.page.covering(&layout.offsets_of(*chunk as usize));
        let next = chunks.partition_point(|chunk| span(chunk).end() <= from);
        chunks[next..].iter().find_map(|chunk| {
            let span = span(chunk);
            pages.first_missing(span.without_prefix(from.0.saturating_sub(span.first.0)))
        })
    }
}

/// Watches any page, because all are present and a thread was inside the source: no page has this
/// number.
const ANY: usize = usize::MAX;
/// Watches no page: the source is released, or never will be.
const NONE: usize = usize::MAX - 1;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::space::page_table::PageState;
    use crate::{Pool, Region};

    /// A page that is swapped out looks like a discarded page, until the kernel is asked to fill it.
    #[test]
    fn a_page_that_looks_discarded_after_the_release_is_found_in_the_region() {
        let pages = PageSize::system().bytes() * 3;
        let builder = Region::builder().chunk(vec![7u8; pages]);
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        region.populate(..).unwrap();
        assert_eq!(region.kept_source_bytes(), 0);
        let table = &region.served().pages;
        table.mark_absent(Page(1));
        region.populate(..).unwrap();
        assert_eq!((table.state(Page(1)), region.failures().len()), (PageState::Present, 0));
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
    }
}

#[cfg(all(test, shuttle))]
mod models {
    use super::*;
    use crate::space::page_table::{PageState, Wake};
    use crate::space::{Chunk, LayoutBuilder};
    use pagestitch_kernel::sync::model::explore;
    use shuttle::thread;
    use std::num::NonZeroUsize;
    use std::sync::Arc;

    /// A region with one source.
    struct Region {
        layout: Layout,
        pages: PageTable,
        releases: Releases,
    }

    impl Wake for Region {
        fn wake(&self, _: Span) {}
    }

    impl Region {
        fn new(pages: usize) -> Arc<Self> {
            let mut layout = LayoutBuilder::default();
            layout.push(Chunk::from(vec![7; pages * PAGE.bytes()])).unwrap();
            let mut layout = layout.finish(false).unwrap();
            let releases = Releases::new(&mut layout, Releasables::Buffers, PAGE).unwrap();
            let pages = PageTable::new(NonZeroUsize::new(pages).unwrap()).unwrap();
            Arc::new(Self { layout, pages, releases })
        }

        fn memory(&self) -> &Memory {
            self.layout.memory_of(0).unwrap()
        }

        /// As a journey: the thread is still in the source when it settles the page.
        fn fill(&self, page: usize) {
            let Ok(mut claim) = self.pages.claim(Page(page), self) else { return };
            if let Some(bytes) = self.memory().bytes_if_any() {
                assert_eq!(bytes[page * PAGE.bytes()], 7);
                claim.settle(1, PageState::Present);
            }
            drop(claim);
            self.releases.look_at(&self.layout, &self.pages, Page(page).span());
        }

        /// Fills what is missing: a source with all of its pages present is released.
        fn check(&self, pages: usize) {
            let all = Span { first: Page(0), pages };
            while !self.memory().is_released() {
                let page = self.pages.first_missing(all).expect("a complete source is kept");
                self.fill(page.0);
            }
            assert_eq!(self.layout.kept_bytes(), 0);
        }
    }

    /// Runs the threads of a model with the region.
    fn run(pages: usize, threads: &[fn(&Region)]) {
        let region = Region::new(pages);
        let start = |thread: &fn(&Region)| {
            let (region, run) = (Arc::clone(&region), *thread);
            thread::spawn(move || run(&region))
        };
        let threads: Vec<_> = threads.iter().map(start).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        region.check(pages);
    }

    #[test]
    fn a_source_is_released_by_the_threads_that_fill_it() {
        explore("a source that three threads fill", || {
            run(3, &[|region| region.fill(0), |region| region.fill(1), |region| region.fill(2)]);
        });
    }

    #[test]
    fn a_source_is_released_while_its_pages_are_discarded() {
        explore("a source whose pages are discarded", || {
            let discard = |region: &Region| {
                region.pages.invalidate(Page(0).span());
                region.fill(0);
                region.fill(1);
            };
            run(2, &[|region| region.fill(0), |region| region.fill(1), discard]);
        });
    }

    const PAGE: PageSize = PageSize::new(4096).unwrap();
}
