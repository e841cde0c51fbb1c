//! The baseline: the handler of the manual page. One thread polls, reads and copies, one message at
//! a time: with the kernel crate, or, with the feature `userfaultfd`, with the crate of that name.

use crate::affinity::pin;
use handler::Handler;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Evictable, Features, Page, PageSize, StableView, Uffd, View};
use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// A region whose pages one plain thread fills from chunks of equal length.
pub(crate) struct ManualPage {
    view: StableView,
    stop: Arc<EventFd>,
    handler: Option<JoinHandle<()>>,
}

impl ManualPage {
    /// Takes chunks of one length, a whole number of pages each. The handler stays on `cpu`, if
    /// there is one.
    pub(crate) fn new(chunks: Vec<Arc<[u8]>>, cpu: Option<usize>) -> Self {
        Self::bounded(chunks, cpu, usize::MAX)
    }

    /// As [`new`](Self::new), with at most so many pages in memory: the handler drops the page that it
    /// has filled first, with a call for each.
    pub(crate) fn bounded(chunks: Vec<Arc<[u8]>>, cpu: Option<usize>, most: usize) -> Self {
        let page = PageSize::system();
        let pages = NonZeroUsize::new(chunks.len() * chunks[0].len() / page.bytes()).expect("some chunks");
        let (reservation, view) = View::reserve(pages, page, Access::ReadOnly).expect("addresses");
        // Opened by this program in either case, because the `userfaultfd` crate cannot open one for an
        // ordinary user where /dev/userfaultfd is closed to that user.
        let uffd = Uffd::open(Features::NONE).expect("a userfaultfd");
        uffd.register(&reservation, RegisterMode::MISSING).expect("registering");
        let base = reservation.range().start();
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd"));
        let stopped = Arc::clone(&stop);
        // SAFETY: the pages are filled from the same chunks again, and no code writes to them.
        #[expect(unsafe_code, reason = "the promise that Evictable asks for")]
        let evictable = unsafe { Evictable::new(reservation) };
        let handler = thread::spawn(move || {
            cpu.inspect(|&cpu| pin(cpu));
            let size = chunks[0].len();
            let page_at = |offset: usize| &chunks[offset / size][offset % size..offset % size + page.bytes()];
            let mut filled = VecDeque::new();
            handle(uffd, &stopped, base, &page_at, &mut |address| {
                if most < usize::MAX {
                    filled.push_back(Page((address - base) / page.bytes()));
                    let first = if filled.len() > most { filled.pop_front() } else { None };
                    first.iter().for_each(|first| evictable.discard(first.span()).expect("a page to drop"));
                }
            });
        });
        let view = view.into_stable().expect("the view has no mapped pages");
        Self { view, stop, handler: Some(handler) }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.view.as_slice()
    }
}

/// Serves memory of the process that owns this userfaultfd.
pub(crate) fn serve_plainly<'a>(
    fd: OwnedFd,
    stop: &EventFd,
    base: usize,
    page_at: &dyn Fn(usize) -> &'a [u8],
) {
    handle(Uffd::adopt(fd).expect("another process's userfaultfd"), stop, base, page_at, &mut |_| {});
}

/// Fills pages until it is stopped. Calls `filled` with the address of each.
fn handle<'a>(
    uffd: Uffd,
    stop: &EventFd,
    base: usize,
    page_at: &dyn Fn(usize) -> &'a [u8],
    filled: &mut dyn FnMut(usize),
) {
    let mut handler = Handler::from(uffd);
    loop {
        let mut ready =
            [PollFd::new(handler.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE).expect("poll");
        if ready[1].any().unwrap_or(false) {
            return;
        }
        handler.fill_one(|address| page_at(address - base)).into_iter().for_each(&mut *filled);
    }
}

impl Drop for ManualPage {
    fn drop(&mut self) {
        self.stop.write(1).expect("an eventfd takes a 1");
        self.handler.take().map(JoinHandle::join);
    }
}

#[cfg(not(feature = "userfaultfd"))]
mod handler {
    use pagestitch_kernel::{AddressRange, Batch, Outcome, PageSize, Uffd};
    use std::os::fd::{AsFd, BorrowedFd};

    /// A userfaultfd, read one message at a time.
    pub(super) struct Handler {
        uffd: Uffd,
        message: Batch,
    }

    impl From<Uffd> for Handler {
        fn from(uffd: Uffd) -> Self {
            Self { uffd, message: Batch::with_capacity(1) }
        }
    }

    impl AsFd for Handler {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.uffd.as_fd()
        }
    }

    impl Handler {
        /// Reads a fault, and fills its page with the bytes for its address. Returns the address.
        pub(super) fn fill_one<'a>(&mut self, page_at: impl Fn(usize) -> &'a [u8]) -> Option<usize> {
            let page = PageSize::system();
            self.message.read(&self.uffd, page).expect("an event");
            let fault = self.message.faults().first()?;
            let range = AddressRange::new(fault.address, page.bytes(), page).expect("a page");
            assert_eq!(self.uffd.copy(range, page_at(fault.address)), Outcome::Done, "a copy");
            Some(fault.address)
        }
    }
}

#[cfg(feature = "userfaultfd")]
mod handler {
    use pagestitch_kernel::PageSize;
    use std::os::fd::{AsFd, BorrowedFd};
    use userfaultfd::{Event, Uffd};

    /// A userfaultfd, read one message at a time.
    pub(super) struct Handler(Uffd);

    impl From<pagestitch_kernel::Uffd> for Handler {
        fn from(uffd: pagestitch_kernel::Uffd) -> Self {
            Self(uffd.into())
        }
    }

    impl AsFd for Handler {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl Handler {
        /// Reads a fault, and fills its page with the bytes for its address. Returns the address.
        pub(super) fn fill_one<'a>(&mut self, page_at: impl Fn(usize) -> &'a [u8]) -> Option<usize> {
            let page = PageSize::system().bytes();
            let Some(Event::Pagefault { addr, .. }) = self.0.read_event().expect("an event") else {
                return None;
            };
            let start = addr.addr() / page * page;
            let source = page_at(start).as_ptr();
            let target = std::ptr::with_exposed_provenance_mut(start);
            // SAFETY: the kernel reads a page of a chunk that is alive, and fills a missing page of the
            // registered range.
            #[expect(unsafe_code, reason = "the userfaultfd crate's copy is an unsafe fn")]
            unsafe { self.0.copy(source.cast(), target, page, true) }.expect("copy");
            Some(start)
        }
    }
}
