//! `Manual`, a server in the caller's own loop: it serves on request, its descriptor reports
//! faults, and its last drop leaves no thread waiting.

use crate::{PAGE, is_readable, pattern, serve_until, spawn_asleep, touch, until};
use nix::poll::PollTimeout;
use pagestitch::source::{Memfd, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, Manual, Readahead, Region, Server};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

fn is_ready(manual: &Manual) -> bool {
    is_readable(manual, PollTimeout::ZERO)
}

#[test]
fn a_manual_serves_on_request_and_its_descriptor_reports_faults() {
    let bytes = pattern(1, 10 * PAGE);
    let mut manual = Manual::new().unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&manual).unwrap();
    assert!(!is_ready(&manual));
    assert_eq!(manual.serve_ready(100), 0);
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[5 * PAGE]);
        until(|| is_ready(&manual));
        assert_eq!(region.metrics().faults, 0);
        assert!(!reader.is_finished());
        assert_eq!(manual.serve_ready(100), 1);
        assert_eq!(reader.join().unwrap(), bytes[5 * PAGE]);
    });
    assert!(!is_ready(&manual));
}

#[test]
fn a_small_budget_keeps_the_descriptor_readable_until_all_is_served() {
    let bytes = pattern(2, 32 << 20);
    let mut manual = Manual::new().unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&manual).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice() == bytes);
        serve_until(&mut manual, 1, || reader.is_finished());
        assert!(reader.join().unwrap());
    });
    let ahead = region.metrics().pages_ahead;
    assert!(ahead > 500, "{ahead} pages were filled ahead");
    until(|| {
        manual.serve_ready(1);
        !is_ready(&manual)
    });
}

#[test]
fn a_call_serves_no_more_faults_than_its_budget() {
    let bytes = pattern(3, 20 * PAGE);
    let mut manual = Manual::new().unwrap();
    let builder = Region::builder().chunk(bytes.clone()).readahead(Readahead::None);
    let region = builder.build(&manual).unwrap();
    scope(|scope| {
        for page in 0..20 {
            let (region, bytes) = (&region, &bytes);
            spawn_asleep(scope, move || assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE]));
        }
        assert_eq!([5, 1, 100].map(|budget| manual.serve_ready(budget)), [5, 1, 14]);
    });
}

#[test]
fn a_slow_source_occupies_one_manual_of_a_group() {
    let source = Arc::new(Scripted::new(100 * PAGE as u64).holding(0..1));
    let members = Manual::group(2).unwrap();
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&members[0]).unwrap();
    let done = &AtomicBool::new(false);
    scope(|scope| {
        let readers = [0, 50].map(|page| {
            let region = &region;
            move || region.as_slice()[page * PAGE]
        });
        let [slow, quick] = readers;
        let slow = scope.spawn(slow);
        for mut member in members {
            scope.spawn(move || {
                serve_until(&mut member, 64, || done.load(Ordering::SeqCst));
                member
            });
        }
        source.wait_until_held(1);
        assert_eq!(scope.spawn(quick).join().unwrap(), byte_at(50 * PAGE as u64));
        assert!(!slow.is_finished());
        source.release();
        assert_eq!(slow.join().unwrap(), byte_at(0));
        done.store(true, Ordering::SeqCst);
    });
}

/// No watchdog watches a group of manuals: the second manual serves only regions that do not hang.
#[test]
fn a_hanging_region_occupies_one_manual_of_a_group_and_delays_no_other_region() {
    let hanging = Arc::new(Scripted::new(10 * PAGE as u64).holding(0..10 * PAGE as u64));
    let members = Manual::group(2).unwrap();
    let build = |source: &Arc<Scripted>| {
        Region::builder().chunk(Chunk::source(Arc::clone(source))).build(&members[0]).unwrap()
    };
    let (hangs, other) = (build(&hanging), build(&Arc::new(Scripted::new(100 * PAGE as u64))));
    let done = &AtomicBool::new(false);
    scope(|scope| {
        let waits: Vec<_> = [0, 5]
            .map(|page| {
                scope.spawn({
                    let hangs = &hangs;
                    move || hangs.as_slice()[page * PAGE]
                })
            })
            .into();
        for mut member in members {
            scope.spawn(move || {
                serve_until(&mut member, 64, || done.load(Ordering::SeqCst));
                // The manual lives on, because the last one of the group that is dropped closes the
                // regions.
                member
            });
        }
        hanging.wait_until_held(1);
        assert_eq!(scope.spawn(|| other.as_slice()[50 * PAGE]).join().unwrap(), byte_at(50 * PAGE as u64));
        hanging.release();
        waits.into_iter().for_each(|reader| assert!(reader.join().unwrap() > 0));
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_waiting_thread_gets_a_signal_when_the_last_manual_is_dropped() {
    let end = child::run(this_test!(), || {
        let manual = Manual::new().unwrap();
        let region = Region::builder().chunk(pattern(3, 10 * PAGE)).build(&manual).unwrap();
        let address = region.as_ptr().addr().get();
        let reader = thread::spawn(move || println!("read a byte: {}", touch(address)));
        until(|| is_ready(&manual));
        drop(manual);
        reader.join().unwrap();
    });
    assert_eq!(end.signal(), Some(nix::libc::SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

#[test]
fn regions_are_served_until_the_last_manual_of_a_group_is_dropped() {
    let bytes = pattern(4, 10 * PAGE);
    let mut members = Manual::group(2).unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&members[1]).unwrap();
    drop(members.pop());
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice() == bytes);
        serve_until(&mut members[0], 64, || reader.is_finished());
        assert!(reader.join().unwrap());
    });
    drop(members);
    drop(region);
    assert_eq!(Manual::group(0).unwrap_err().kind(), ErrorKind::InvalidOption);
}

#[test]
fn populate_needs_no_server() {
    let bytes = pattern(5, 100 * PAGE);
    let manual = Manual::new().unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&manual).unwrap();
    region.populate(..).unwrap();
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_region_whose_manual_was_dropped_is_read_with_an_error() {
    let memfd = UnsealedMemfd::create("in place", PAGE as u64).unwrap().seal().unwrap();
    let (manual, chunk) = (Manual::new().unwrap(), pattern(6, 10 * PAGE));
    let builder = Region::builder().chunk(Memfd::from(memfd)).chunk(chunk).writable();
    let region = builder.build_shared(&manual).unwrap();
    region.populate(..5 * PAGE as u64).unwrap();
    drop(manual);
    for page in [1_u64, 9] {
        let range = page * PAGE as u64..(page + 1) * PAGE as u64;
        assert_eq!(region.populate(range.clone()).unwrap_err().kind(), ErrorKind::ServerStopped);
        assert_eq!(region.read_at(range.start, &mut [0]).unwrap_err().kind(), ErrorKind::ServerStopped);
        assert_eq!(region.write_at(range.start, &[0]).unwrap_err().kind(), ErrorKind::ServerStopped);
    }
    region.read_at(0, &mut [0; PAGE]).unwrap();
}

#[test]
fn a_region_of_a_dropped_manual_is_refused() {
    let manual = Manual::new().unwrap();
    let server = Server::from(&manual);
    drop(manual);
    let error = Region::builder().name("late").chunk(vec![1u8]).build(server).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ServerStopped);
}
