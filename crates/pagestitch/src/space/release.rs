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
use super::deferred_free::{DeferredFree, Member};
use super::page_table::PageTable;
use crate::guard::discard;
use crate::source::{Releasables, Released};
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::{Page, PageSize, Span};
use std::ops::Range;
use std::sync::Arc;

/// The sources of a region that are released.
#[derive(Debug)]
pub(crate) struct Releases {
    page: PageSize,
    /// The chunks of each source, ascending, source by source. `None` if the layout has them in this order.
    chunks: Option<Vec<u32>>,
    /// An entry for each source of the layout.
    sources: Vec<Watched>,
    /// `None`: the thread that has filled the last page frees the source.
    waiting: Option<Member>,
}

/// The pages of a source.
#[derive(Debug)]
struct Watched {
    /// The indices of its chunks, for [`Releases::chunk`].
    chunks: Range<usize>,
    /// A page of the source that is missing, or was until a moment ago; [`ANY`] or [`NONE`].
    page: AtomicUsize,
}

impl Releases {
    /// Makes memory of a layout releasable.
    pub(crate) fn new(
        layout: &mut Layout,
        which: Releasables,
        page: PageSize,
        frees: Option<&Arc<DeferredFree>>,
    ) -> Self {
        let releasable = layout.make_releasable(which);
        let memory = |(source, &releases)| if releases { layout.memory_of(source).cloned() } else { None };
        let waiting = frees.map(|frees| frees.add(releasable.iter().enumerate().map(memory)));
        let (counts, chunks) = by_source(layout, releasable.len());
        let sources = Vec::with_capacity(releasable.len());
        let mut releases = Self { page, chunks, sources, waiting };
        let mut first = 0;
        for (count, releases_source) in counts.into_iter().zip(releasable) {
            let chunks = first..first + count;
            first = chunks.end;
            let watched = if releases_source && count > 0 {
                page.page_at(layout.offsets_of(releases.chunk(chunks.start)).start).0
            } else {
                NONE
            };
            releases.sources.push(Watched { chunks, page: AtomicUsize::new(watched) });
        }
        releases
    }

    /// The chunk at an index of a [source's](Watched::chunks).
    fn chunk(&self, index: usize) -> usize {
        self.chunks.as_ref().map_or(index, |chunks| chunks[index] as usize)
    }

    /// Releases the sources with bytes in `span` whose pages are all present. Called by each thread
    /// that has filled pages, after it has left their sources. Returns the number of released bytes.
    ///
    /// Destructors of sources may run here, so the caller holds no claim.
    pub(crate) fn look_at(&self, layout: &Layout, pages: &PageTable, span: Span) -> u64 {
        let mut released = 0;
        for chunk in layout.few_chunks_in(&self.page.offsets(span)) {
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
        let missing = |from| self.first_missing(layout, pages, chunks.clone(), from);
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
        let Some(memory) = layout.memory_of(source) else { return 0 };
        let released = memory.release();
        if released != Released::Busy {
            watched.store(NONE, Ordering::Relaxed);
        }
        let Released::Bytes(bytes) = released else { return 0 };
        match &self.waiting {
            Some(waiting) => waiting.push(source, bytes),
            None => memory.take_released().into_iter().for_each(discard),
        }
        bytes
    }

    /// Frees the released sources that wait, in this thread.
    pub(crate) fn free_waiting(&self) {
        self.waiting.iter().for_each(Member::free_waiting);
    }

    /// The first page from `from` on that has bytes of one of a source's chunks and is not present.
    fn first_missing(
        &self,
        layout: &Layout,
        pages: &PageTable,
        chunks: Range<usize>,
        from: Page,
    ) -> Option<Page> {
        let span = |index| self.page.covering(&layout.offsets_of(self.chunk(index)));
        let next = first_index(chunks.clone(), |index| span(index).end() > from);
        (next..chunks.end).find_map(|index| {
            let span = span(index);
            pages.first_missing(span.without_prefix(from.0.saturating_sub(span.first.0)))
        })
    }
}

/// The number of chunks of each source; and all chunks, source by source, if their order in the layout
/// differs.
fn by_source(layout: &Layout, sources: usize) -> (Vec<usize>, Option<Vec<u32>>) {
    // One memory cut into millions of parts.
    if sources == 1 {
        return (vec![layout.chunks()], None);
    }
    let (mut counts, mut last, mut in_order) = (vec![0; sources], 0, true);
    for source in (0..layout.chunks()).map(|chunk| layout.source_of(chunk)) {
        counts[source] += 1;
        (in_order, last) = (in_order && last <= source, source);
    }
    let sorted = || {
        let mut chunks: Vec<u32> = (0..layout.chunks() as u32).collect();
        // Stable: the chunks of a source stay in order.
        chunks.sort_by_key(|&chunk| layout.source_of(chunk as usize));
        chunks
    };
    (counts, (!in_order).then(sorted))
}

/// The first index for which a predicate holds, if it holds for all indices after one for which it does.
fn first_index(Range { mut start, mut end }: Range<usize>, holds: impl Fn(usize) -> bool) -> usize {
    while start < end {
        let middle = start.midpoint(end);
        (start, end) = if holds(middle) { (start, middle) } else { (middle + 1, end) };
    }
    start
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
    use crate::source::Memory;
    use crate::space::page_table::{PageState, Wake};
    use crate::space::{Chunk, LayoutBuilder};
    use pagestitch_kernel::sync::model::explore;
    use shuttle::thread;
    use std::num::NonZeroUsize;

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
            let releases = Releases::new(&mut layout, Releasables::Owned, PAGE, None);
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
