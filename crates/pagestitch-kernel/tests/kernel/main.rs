//! Each operation of the kernel crate against the running kernel, with one test for each answer.

mod arena;
mod messages;
mod names;
mod page_scan;
mod sync;
mod uffd;
mod view;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pagestitch_kernel::Features;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Batch, Page, PageSize, Reservation, Span, StableView, Support, Uffd, View};
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::Arc;

fn reserve(pages: usize, access: Access) -> (Arc<Reservation>, StableView, Uffd) {
    let (reservation, view, uffd) = raw(pages, access);
    (reservation, view.into_stable().unwrap(), uffd)
}

fn raw(pages: usize, access: Access) -> (Arc<Reservation>, View, Uffd) {
    let pages = NonZeroUsize::new(pages).unwrap();
    let (reservation, view) = View::reserve(pages, PageSize::system(), access).unwrap();
    let uffd = Uffd::open(Features::EVENT_REMOVE | Features::THREAD_ID | Features::WRITE_PROTECT).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING).unwrap();
    (reservation, view, uffd)
}

fn page(index: usize) -> Span {
    Page(index).span()
}

fn has(test: &str, features: Features) -> bool {
    let support = Support::current();
    let here = support.has(features);
    if !here {
        // A single write past the test runner's capture, so that CI can count skips.
        let line = format!("SKIPPED {test}: Linux {} lacks {features:?}\n", support.kernel());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    here
}

/// Waits until the uffd has a message, and reads it.
fn wait(uffd: &Uffd) -> Batch {
    let mut batch = Batch::with_capacity(16);
    while batch.faults().is_empty() {
        poll(&mut [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        batch.read(uffd, PageSize::system()).unwrap();
    }
    batch
}
