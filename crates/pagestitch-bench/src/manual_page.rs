//! The baseline: the handler of the manual page. One thread polls, reads and copies, with the
//! `userfaultfd` crate.

use crate::affinity::pin;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch_kernel::Features;
use pagestitch_kernel::{Access, PageSize, StableView, View};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use userfaultfd::{Event, Uffd};

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
        let page = PageSize::system();
        let pages = NonZeroUsize::new(chunks.len() * chunks[0].len() / page.bytes()).expect("some chunks");
        let (reservation, view) = View::reserve(pages, page, Access::ReadOnly).expect("addresses");
        let opened = pagestitch_kernel::Uffd::open(Features::NONE).expect("a userfaultfd");
        let uffd = of_the_crate(opened.as_fd().try_clone_to_owned().expect("a descriptor"));
        let range = reservation.range();
        uffd.register(view.as_ptr().as_ptr().cast(), range.bytes()).expect("registering");
        reservation.open().expect("memory");
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd"));
        let stopped = Arc::clone(&stop);
        let handler = thread::spawn(move || {
            cpu.inspect(|&cpu| pin(cpu));
            let size = chunks[0].len();
            let page_at = |offset: usize| &chunks[offset / size][offset % size..offset % size + page.bytes()];
            handle(&uffd, &stopped, range.start(), &page_at);
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
    handle(&of_the_crate(fd), stop, base, page_at);
}

/// The descriptor is opened by this program, because the crate cannot open one for an ordinary
/// user. The rest is the crate's.
fn of_the_crate(fd: OwnedFd) -> Uffd {
    // SAFETY: the crate becomes the only owner of this descriptor. No memory is touched.
    #[expect(unsafe_code, reason = "the userfaultfd crate takes raw descriptors")]
    unsafe {
        Uffd::from_raw_fd(fd.into_raw_fd())
    }
}

fn handle<'a>(uffd: &Uffd, stop: &EventFd, base: usize, page_at: &dyn Fn(usize) -> &'a [u8]) {
    let page = PageSize::system().bytes();
    loop {
        let mut ready =
            [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE).expect("poll");
        if ready[1].any().unwrap_or(false) {
            return;
        }
        let Some(Event::Pagefault { addr, .. }) = uffd.read_event().expect("an event") else { continue };
        let offset = (addr.addr() - base) / page * page;
        let source = page_at(offset).as_ptr();
        let target = std::ptr::with_exposed_provenance_mut(base + offset);
        // SAFETY: the kernel reads a page of a chunk that is alive, and fills a missing page of the
        // registered range.
        #[expect(unsafe_code, reason = "the userfaultfd crate's copy is an unsafe fn")]
        unsafe { uffd.copy(source.cast(), target, page, true) }.expect("copy");
    }
}

impl Drop for ManualPage {
    fn drop(&mut self) {
        self.stop.write(1).expect("an eventfd takes a 1");
        self.handler.take().map(JoinHandle::join);
    }
}
