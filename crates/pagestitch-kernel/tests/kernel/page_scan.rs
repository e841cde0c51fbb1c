//! Written pages: the kernel's record of writes, and its scans.

use crate::{has, page};
use pagestitch_kernel::page_scan::PageScan;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Access, Features, Outcome, PageSize, Reservation, Span, Uffd, View};
use std::num::NonZeroUsize;
use std::sync::Arc;

/// A range whose writes are recorded; `None` before Linux 6.7.
fn recorded(test: &str, pages: usize) -> Option<(Arc<Reservation>, View, Uffd)> {
    let wanted = Features::WRITE_PROTECT | Features::WRITE_PROTECT_ASYNC | Features::POISON;
    if !has(test, wanted) {
        return None;
    }
    let uffd = Uffd::open(wanted).unwrap();
    let pages = NonZeroUsize::new(pages).unwrap();
    let (reservation, view) = View::reserve(pages, PageSize::system(), Access::Writable).unwrap();
    uffd.register(&reservation, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT).unwrap();
    Some((reservation, view, uffd))
}

fn written(scan: &PageScan, reservation: &Reservation) -> Vec<(Span, bool)> {
    let mut runs = Vec::new();
    scan.take_written(reservation.range(), |run, in_memory| runs.push((span(reservation, run), in_memory)))
        .unwrap();
    runs
}

fn span(reservation: &Reservation, range: pagestitch_kernel::AddressRange) -> Span {
    let first = reservation.page_at(range.start()).unwrap();
    Span { first, pages: range.bytes() / PageSize::system().bytes() }
}

#[test]
fn a_scan_returns_written_pages_and_arms_them_again() {
    let Some((reservation, view, uffd)) = recorded("a_scan_returns_written_pages_and_arms_them_again", 600)
    else {
        return;
    };
    let (scan, size) = (PageScan::open().unwrap(), PageSize::system().bytes());
    let filled = Span { first: page(10).first, pages: 100 };
    let bytes = vec![7; 100 * size];
    assert_eq!(uffd.copy_protected(reservation.addresses(filled), &bytes), Outcome::Done);
    assert_eq!(written(&scan, &reservation), [], "neither armed nor absent pages are written");
    view.write_at((20 * size) as u64, b"a").unwrap();
    view.write_at((21 * size) as u64, b"b").unwrap();
    let run = Span { first: page(20).first, pages: 2 };
    assert_eq!(written(&scan, &reservation), [(run, true)]);
    assert_eq!(written(&scan, &reservation), []);
    // A page that arrives without protection counts as written.
    assert_eq!(uffd.copy(reservation.addresses(page(5)), &bytes[..size]), Outcome::Done);
    assert_eq!(written(&scan, &reservation), [(page(5), true)]);
    let mut absent = Vec::new();
    scan.absent(reservation.range(), |run| absent.push(span(&reservation, run))).unwrap();
    let between = |first, end| Span { first: page(first).first, pages: end - first };
    assert_eq!(absent, [between(0, 5), between(6, 10), between(110, 600)]);
}

#[test]
fn an_absent_page_gets_no_marker_by_a_scan() {
    let Some((reservation, _view, uffd)) = recorded("an_absent_page_gets_no_marker_by_a_scan", 4) else {
        return;
    };
    let (scan, size) = (PageScan::open().unwrap(), PageSize::system().bytes());
    assert_eq!(uffd.copy(reservation.addresses(page(0)), &vec![1; size]), Outcome::Done);
    assert_eq!(written(&scan, &reservation), [(page(0), true)]);
    // A marker would refuse poison.
    assert_eq!(uffd.poison(reservation.addresses(page(1))), Outcome::Done);
    assert_eq!(written(&scan, &reservation), [(page(1), false)], "a poison marker counts as written once");
    assert_eq!(uffd.copy_protected(reservation.addresses(page(1)), &vec![1; size]), Outcome::Done);
    assert_eq!(written(&scan, &reservation), []);
}

#[test]
fn a_scan_goes_on_after_as_many_runs_as_one_call_returns() {
    const PAGES: usize = 2500;
    let Some((reservation, view, uffd)) =
        recorded("a_scan_goes_on_after_as_many_runs_as_one_call_returns", PAGES)
    else {
        return;
    };
    let (scan, size) = (PageScan::open().unwrap(), PageSize::system().bytes());
    assert_eq!(uffd.copy_protected(reservation.range(), &vec![1; PAGES * size]), Outcome::Done);
    (0..PAGES).step_by(2).for_each(|page| view.write_at((page * size) as u64, b"w").unwrap());
    let runs = written(&scan, &reservation);
    assert!(runs.iter().map(|run| run.0).eq((0..PAGES).step_by(2).map(page)));
    assert_eq!(written(&scan, &reservation), []);
}

#[test]
fn a_range_without_a_record_is_refused() {
    let (reservation, _view, _uffd) = crate::reserve(1, Access::Writable);
    let refused = PageScan::open().unwrap().take_written(reservation.range(), |_, _| {});
    assert!(refused.is_err());
}
