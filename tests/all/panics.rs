//! Panics in code of the application that a worker calls: the worker serves on, and no other page
//! is lost.

use crate::{PAGE, SIGBUS, pattern, signal_of_lost_page, until};
use pagestitch::source::{Fetch, Reply};
use pagestitch::{Builder, Chunk, OnFailure, Pool, Readahead, Region, Source};
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::fmt;
use std::io;
use std::panic::panic_any;
use std::sync::Arc;
use std::time::Duration;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// An error that panics in Display and in Drop.
#[derive(Debug)]
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a destructor panics");
    }
}

impl fmt::Display for Bomb {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("a Display panics");
    }
}

impl std::error::Error for Bomb {}

/// The defect of a source, beside its name.
#[derive(Clone, Copy)]
enum Wrong {
    Fails,
    Panics,
}

struct Bad(Wrong);

impl Source for Bad {
    fn size(&self) -> u64 {
        10 * PAGE as u64
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        match self.0 {
            Wrong::Fails => Err(io::Error::other(Bomb)),
            Wrong::Panics => panic_any(Bomb),
        }
    }

    fn name(&self) -> String {
        panic!("a name panics")
    }
}

/// A fetch that panics.
struct BadFetch;

impl Fetch for BadFetch {
    fn size(&self) -> u64 {
        10 * PAGE as u64
    }

    fn fetch(&self, _: u64, _: Reply) {
        panic_any(Bomb)
    }

    fn name(&self) -> String {
        panic!("a name panics")
    }
}

/// A subscriber that formats the fields of each event.
struct Shows;

impl tracing::field::Visit for Shows {
    fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn fmt::Debug) {
        let _ = format!("{value:?}");
    }
}

impl Subscriber for Shows {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Self);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// A subscriber that panics at each event.
struct Panics;

impl Subscriber for Panics {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        // Some spans begin without a panic, so that their ends panic.
        assert_ne!(span.metadata().name().len() % 2, 0, "a span");
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        panic_any(Bomb)
    }

    fn enter(&self, _: &Id) {
        panic_any(Bomb)
    }

    fn exit(&self, _: &Id) {
        panic_any(Bomb)
    }
}

fn build(chunk: Chunk, more: impl FnOnce(Builder) -> Builder) -> Region {
    let builder = Region::builder().chunk(pattern(1, 10 * PAGE)).chunk(chunk).readahead(Readahead::None);
    more(builder).build(&Pool::builder().workers(2).start().unwrap()).unwrap()
}

/// In a process of its own: the page of a bad chunk is lost and its touch is a signal, and the
/// other pages are served.
fn is_lost(name: &str, subscriber: impl Subscriber + Send + Sync + 'static, chunk: impl FnOnce() -> Chunk) {
    let end = child::run(name, || {
        tracing::subscriber::set_global_default(subscriber).unwrap();
        let region = build(chunk(), |builder| builder.on_page_failure(|_, _| panic_any(Bomb)));
        assert!(region.as_slice()[..10 * PAGE] == pattern(1, 10 * PAGE));
        println!("served");
        println!("read a byte: {}", region.as_slice()[15 * PAGE]);
    });
    let lost = if signal_of_lost_page() == SIGBUS { SIGBUS } else { end.signal().unwrap_or(0) };
    assert_eq!(end.signal(), Some(lost), "{}", end.output());
    assert!(end.output().contains("served") && !end.output().contains("read a byte"), "{}", end.output());
}

#[test]
fn a_panic_in_the_name_or_the_error_of_a_source_poisons_the_failing_page_only() {
    let name = this_test!();
    is_lost(name, Shows, || Chunk::source(Arc::new(Bad(Wrong::Fails))));
}

#[test]
fn a_panic_in_the_drop_of_a_panic_payload_poisons_the_failing_page_only() {
    let name = this_test!();
    is_lost(name, Shows, || Chunk::source(Arc::new(Bad(Wrong::Panics))));
}

#[test]
fn a_panic_in_a_fetch_poisons_the_failing_page_only() {
    let name = this_test!();
    is_lost(name, Shows, || Chunk::fetch(Arc::new(BadFetch)));
}

#[test]
fn a_panic_in_a_tracing_subscriber_poisons_the_failing_page_only() {
    let name = this_test!();
    is_lost(name, Panics, || Chunk::source(Arc::new(Bad(Wrong::Fails))));
}

/// The worker drops the error and goes on.
#[test]
fn a_panic_in_the_drop_of_an_error_still_gives_declared_zeros() {
    let name = this_test!();
    let end = child::run(name, || {
        let chunk = Chunk::source(Arc::new(Bad(Wrong::Fails))).on_failure(OnFailure::Zeros);
        let region = build(chunk, |builder| builder);
        assert_eq!(region.as_slice()[15 * PAGE], 0);
        until(|| region.metrics().pages_zeroed_on_failure == 1);
        region.populate(..).unwrap();
        std::mem::forget(region);
    });
    end.expect_pass();
}

/// The watchdog reports a fault with the name of its source to a subscriber that panics, and times
/// the fault out.
#[test]
fn the_watchdog_survives_a_panic_in_a_subscriber_and_in_a_callback() {
    let name = this_test!();
    let end = child::run(name, || {
        tracing::subscriber::set_global_default(Panics).unwrap();
        let limit = Duration::from_millis(20);
        let pool = Pool::builder()
            .workers(2)
            .max_workers(2)
            .warn_after(limit)
            .fault_timeout(2 * limit)
            .start()
            .unwrap();
        let hanging = || Chunk::source(Arc::new(Scripted::new(10 * PAGE as u64).holding(0..u64::MAX)));
        let builder = Region::builder().chunk(hanging()).on_page_failure(|_, _| panic_any(Bomb));
        let region = builder.build(&pool).unwrap();
        println!("read a byte: {}", region.as_slice()[5 * PAGE]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}
