//! The handler that restores guests from snapshots: bytes, balloons, malformed handshakes at its
//! socket, and the end of either side.

use crate::guests::assert_shows;
use crate::handler::{Refusal, RunningHandler, Seen, has_ended, has_ended_whole, is_restored};
use crate::{HANG, HugePages, PAGE, SIGKILL, own_memory, pattern, signal_of_lost_page, until};
use pagestitch::{FillRate, OnUnavailable};
use pagestitch_firecracker::{Error, Handler, Holes, OnStop, Snapshot, UnknownHoles};
use pagestitch_kernel::fd_passing;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const RANGES: [usize; 2] = [600 * PAGE, 1400 * PAGE];
pub(crate) const PAGES: usize = 2000;
const TOTAL: usize = PAGES * PAGE;

/// Runs a handler of [`snapshot_in`].
pub(crate) fn start() -> RunningHandler {
    start_with(OnUnavailable::Poison, OnStop::Finish)
}

pub(crate) fn start_with(loss: OnUnavailable, on_stop: OnStop) -> RunningHandler {
    // On a loaded machine, a guest may take seconds between its connection and its handshake.
    start_within(HANG, loss, on_stop)
}

/// A handler that refuses a peer after half a second without a complete handshake.
pub(crate) fn start_impatient(loss: OnUnavailable) -> RunningHandler {
    start_within(Duration::from_millis(500), loss, OnStop::Finish)
}

fn start_within(handshake: Duration, loss: OnUnavailable, on_stop: OnStop) -> RunningHandler {
    let folder = tempfile::tempdir().unwrap();
    let builder = describe(&snapshot_in(folder.path())).on_unavailable(loss).on_stop(on_stop);
    RunningHandler::start(folder, builder.handshake_timeout(handshake))
}

pub(crate) fn describe(files: &[PathBuf]) -> pagestitch_firecracker::Builder {
    Handler::builder(Snapshot::open_with(files, Holes::Unchanged).unwrap()).own_memory(own_memory())
}

/// A handler that is bound to the path `socket` and does not run yet.
pub(crate) fn bound(folder: &Path, files: &[PathBuf], loss: OnUnavailable, on_stop: OnStop) -> Handler {
    describe(files).on_unavailable(loss).on_stop(on_stop).bind(folder.join("socket")).unwrap()
}

/// A base with a hole, and a diff over it.
pub(crate) fn snapshot_in(folder: &Path) -> [PathBuf; 2] {
    let expected = expected();
    let (base, diff) = (folder.join("base"), folder.join("diff"));
    let write = |path: &Path, pages: &[usize], bytes: &[u8]| {
        let file = File::create(path).unwrap();
        file.set_len(TOTAL as u64).unwrap();
        for &page in pages {
            file.write_all_at(&bytes[page * PAGE..(page + 1) * PAGE], (page * PAGE) as u64).unwrap();
        }
    };
    let stale = pattern(77, TOTAL);
    let in_base: Vec<_> = (0..PAGES).filter(|page| !(1000..1200).contains(page)).collect();
    let in_diff: Vec<_> = (0..PAGES).filter(|page| page % 50 == 7 && !(1000..1200).contains(page)).collect();
    let mut old = expected.clone();
    for &page in &in_diff {
        old[page * PAGE..(page + 1) * PAGE].copy_from_slice(&stale[..PAGE]);
    }
    write(&base, &in_base, &old);
    write(&diff, &in_diff, &expected);
    [base, diff]
}

/// The bytes that a guest must read.
pub(crate) fn expected() -> Vec<u8> {
    let mut bytes = pattern(31, TOTAL);
    bytes[1000 * PAGE..1200 * PAGE].fill(0);
    bytes
}

pub(crate) fn connect(path: &str) -> (Guest, UnixStream) {
    connect_with(path, &RANGES)
}

fn connect_with(path: &str, ranges: &[usize]) -> (Guest, UnixStream) {
    let guest = Guest::new(ranges, false).unwrap();
    let stream = guest.hand_over(path.as_ref()).unwrap();
    (guest, stream)
}

fn wait_for_nothing() -> ! {
    loop {
        thread::park();
    }
}

#[test]
fn guests_read_the_snapshot_in_their_memory() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let expected = expected();
        scope(|scope| {
            for cpu in 0..4 {
                let (guest, expected) = (&guest, &expected);
                scope.spawn(move || {
                    for step in 0..PAGES {
                        let at = (step * 7919 + cpu * 500) % PAGES * PAGE + step % PAGE;
                        assert_eq!(guest.read(at), expected[at], "byte {at}");
                    }
                });
            }
        });
        guest.balloon(700 * PAGE, 300 * PAGE).unwrap();
        assert!((700..1000).all(|page| guest.read(page * PAGE) == 0));
    });
    let mut running = start();
    let path = running.socket();
    let guests: Vec<_> = (0..3).map(|_| body.spawn(&path)).collect();
    guests.into_iter().for_each(|guest| guest.wait().expect_pass());
    until(|| running.reported(has_ended_whole) == 3);
    running.stop();
    assert!(!path.exists());
}

/// A handler that is told to stop fills the missing pages. The guest goes on without it, balloons
/// included.
#[test]
fn a_guest_outlives_a_stopped_handler() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let expected = expected();
        assert_eq!(guest.read(5), expected[5]);
        guest.balloon(20 * PAGE, PAGE).unwrap();
        println!("ready");
        // The guest reads until the handler has gone.
        let mut at = 0;
        while fs::exists(path).unwrap() || at < 10 * TOTAL {
            at += 12_345;
            let at = at % TOTAL;
            let here = if at / PAGE == 20 { 0 } else { expected[at] };
            assert_eq!(guest.read(at), here, "byte {at}");
        }
        guest.balloon(30 * PAGE, PAGE).unwrap();
        assert_eq!((guest.read(20 * PAGE), guest.read(30 * PAGE)), (0, 0));
        assert_shows(&guest, &expected, &[20, 30]);
    });
    let mut running = start();
    let guest = body.spawn(running.socket());
    running.until_reported(is_restored);
    running.stop();
    running.until_reported(|seen| *seen == Seen::Detached);
    guest.wait().expect_pass();
}

/// The guest reads most pages after the handler has gone.
#[test]
fn a_guest_that_is_filled_in_the_background_needs_no_handler() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let expected = expected();
        guest.balloon(20 * PAGE, PAGE).unwrap();
        assert_eq!(guest.read(5), expected[5]);
        until(|| !fs::exists(path).unwrap());
        guest.balloon(30 * PAGE, PAGE).unwrap();
        assert_eq!((guest.read(20 * PAGE), guest.read(30 * PAGE)), (0, 0));
        assert_shows(&guest, &expected, &[20, 30]);
    });
    let rate = FillRate::BytesPerSecond(NonZeroU64::new(64 << 20).unwrap());
    for rate in [FillRate::Unlimited, rate] {
        let folder = tempfile::tempdir().unwrap();
        let builder = describe(&snapshot_in(folder.path())).background(rate).handshake_timeout(HANG);
        let mut running = RunningHandler::start(folder, builder);
        let guests = [0, 1].map(|_| body.spawn(running.socket()));
        until(|| running.reported(|seen| *seen == Seen::Detached) == 2);
        assert_eq!(running.reported(|seen| matches!(seen, Seen::Filled { pages_missing: 0, .. })), 2);
        running.stop();
        guests.into_iter().for_each(|guest| guest.wait().expect_pass());
        assert_eq!(running.reported(|seen| *seen == Seen::Detached), 2, "each is detached once");
    }
}

#[test]
fn a_guest_with_pages_that_cannot_be_filled_keeps_its_handler() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        println!("ready");
        until(|| fs::exists(format!("{path}.filled")).unwrap());
        assert_eq!(guest.read(PAGE), expected()[PAGE]);
        println!("{}", guest.read((PAGES - 1) * PAGE));
    });
    let folder = tempfile::tempdir().unwrap();
    let builder = describe(&snapshot_in(folder.path())).background(FillRate::Unlimited);
    let base = File::options().write(true).open(folder.path().join("base")).unwrap();
    base.set_len((TOTAL / 2) as u64).unwrap();
    let running = RunningHandler::start(folder, builder.handshake_timeout(HANG));
    let guest = body.spawn(running.socket());
    running.until_reported(|seen| matches!(seen, Seen::Filled { pages: 900.., pages_missing: 1.. }));
    fs::write(format!("{}.filled", running.socket().display()), "").unwrap();
    let end = guest.wait();
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
    running.until_reported(has_ended);
    assert_eq!(running.reported(|seen| *seen == Seen::Detached), 0);
}

#[test]
fn an_abandoned_guest_gets_a_signal_and_no_zeros() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        assert_eq!(guest.read(0), expected()[0]);
        until(|| !fs::exists(path).unwrap());
        (0..PAGES).rev().for_each(|page| assert_ne!(guest.read(page * PAGE), 0, "page {page}"));
    });
    for (loss, signal) in [(OnUnavailable::Poison, signal_of_lost_page()), (OnUnavailable::Kill, SIGKILL)] {
        let mut running = start_with(loss, OnStop::Abandon);
        let guest = body.spawn(running.socket());
        running.until_reported(is_restored);
        running.stop();
        let end = guest.wait();
        assert_eq!(end.signal(), Some(signal), "{}", end.output());
    }
}

/// The memory file is truncated while guests are restored from it.
#[test]
fn a_memory_file_that_shrinks_is_a_signal_to_its_guest_and_the_handler_lives() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let far = (PAGES - 1) * PAGE;
        assert_eq!(guest.read(0), expected()[0]);
        println!("{}", guest.read(far));
    });
    let running = start();
    let base = File::options().write(true).open(running.folder.path().join("base")).unwrap();
    base.set_len((TOTAL / 2) as u64).unwrap();
    let end = body.spawn(running.socket()).wait();
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
    running.until_reported(|seen| matches!(seen, Seen::Ended { pages_lost: 1.. }));
    base.set_len(TOTAL as u64).unwrap();
    // The handler holds the removed file open.
    fs::remove_file(running.folder.path().join("base")).unwrap();
    let end = body.spawn(running.socket()).wait();
    end.expect_pass();
}

#[test]
fn a_guest_of_another_snapshot_is_refused_and_gets_a_signal() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect_with(path, &[100 * PAGE]);
        println!("read a byte: {}", guest.read(0));
    });
    let running = start();
    let end = body.spawn(running.socket()).wait();
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
    running.until_refused(|reason| *reason == Refusal::Size { guest: 409_600, file: 8_192_000 });
}

#[test]
fn a_hugetlb_guest_is_restored() {
    const HUGE: usize = 2 << 20;
    let body = child::body(this_test!(), |path| {
        let guest = Guest::new(&[HUGE, 2 * HUGE], true).unwrap();
        let _stream = guest.hand_over(path.as_ref()).unwrap();
        let expected = pattern(5, 3 * HUGE);
        (0..3 * HUGE).step_by(4001).for_each(|at| assert_eq!(guest.read(at), expected[at], "byte {at}"));
        guest.balloon(HUGE, HUGE).unwrap();
        assert_eq!(guest.read(HUGE + 5), 0);
    });
    let Some(_reserved) = HugePages::or_skip(this_test!(), 8) else { return };
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("memory"), pattern(5, 3 * HUGE)).unwrap();
    let builder = describe(&[folder.path().join("memory")]);
    let mut running = RunningHandler::start(folder, builder);
    body.spawn(running.socket()).wait().expect_pass();
    running.stop();
}

#[test]
fn a_guest_killed_while_it_waits_leaves_the_handler_serving() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        scope(|scope| {
            for cpu in 0..4 {
                let guest = &guest;
                scope.spawn(move || {
                    (cpu * 400..PAGES)
                        .for_each(|page| assert_eq!(guest.read(page * PAGE), guest.read(page * PAGE)))
                });
            }
        });
        wait_for_nothing();
    });
    let mut running = start();
    for _ in 0..5 {
        let reported = || running.events().len();
        let before = reported();
        let mut guest = body.spawn(running.socket());
        until(|| reported() > before);
        guest.kill();
        assert_eq!(guest.wait().signal(), Some(SIGKILL));
        until(|| reported() > before + 1);
    }
    running.stop();
    assert!(running.reported(has_ended) > 0);
}

/// A guest is served after each malformed handshake.
#[test]
fn malformed_handshakes_are_named_and_harm_no_guest() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        let expected = expected();
        (0..PAGES).for_each(|page| assert_eq!(guest.read(page * PAGE), expected[page * PAGE]));
    });
    let running = start();
    let path = running.socket();
    let say = |message: &[u8]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        // The handler may hang up before the whole message is sent.
        let _ = stream.write_all(message);
        stream
    };
    let null = File::open("/dev/null").unwrap();
    let list = |size: usize| format!(r#"[{{"base_host_virt_addr":4096,"size":{size},"offset":0}}]"#);
    let hand = |message: &str, fds: usize| {
        let stream = UnixStream::connect(&path).unwrap();
        fd_passing::send(&stream, message.as_bytes(), &vec![null.as_fd(); fds]).unwrap();
        stream
    };
    let _silent = say(b"");
    drop(say(b""));
    running.until_refused(|reason| *reason == Refusal::Closed { bytes: 0, fds: 0 });
    drop(say(b"[{\"size\":"));
    running.until_refused(|reason| *reason == Refusal::Closed { bytes: 9, fds: 0 });
    let _garbage = say(b"GET / HTTP/1.1\r\n\r\n");
    running.until_refused(|reason| *reason == Refusal::Garbage);
    let _two = hand(&list(TOTAL), 2);
    running.until_refused(|reason| *reason == Refusal::Descriptors(2));
    let _none = say(list(TOTAL).as_bytes());
    let _wrong = hand(&list(TOTAL), 1);
    running.until_refused(|reason| *reason == Refusal::NotUserfaultfd(String::from("/dev/null")));
    let _many = hand(&list(TOTAL), 100);
    running.until_refused(|reason| *reason == Refusal::Descriptors(100));
    let _endless = say(&vec![b' '; 2 << 20]);
    running.until_refused(|reason| *reason == Refusal::TooLong);
    // More memory than the address space holds: the handler must not look at each page of it.
    let huge = Guest::new(&[PAGE], false).unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    fd_passing::send(&stream, list(1 << 46).as_bytes(), &[huge.uffd()]).unwrap();
    running.until_refused(|reason| matches!(reason, Refusal::Size { guest: 0x4000_0000_0000, .. }));
    body.spawn(&path).wait().expect_pass();
}

#[test]
fn a_peer_without_a_complete_handshake_has_a_limited_time() {
    let running = start_impatient(OnUnavailable::Poison);
    let connected = || UnixStream::connect(running.socket()).unwrap();
    let timed_out = |bytes| Refusal::TimedOut { after: Duration::from_millis(500), bytes, fds: 0 };
    let mut silent = connected();
    running.until_refused(|reason| *reason == timed_out(0));
    assert_eq!(silent.read(&mut [0; 10]).unwrap(), 0, "hung up");
    // A peer that sends a byte now and then has no more time than other peers.
    let mut trickling = connected();
    until(|| trickling.write_all(b" ").is_err());
    // On a loaded machine, the time may be over before the peer sends its bytes.
    until(|| {
        let mut partial = connected();
        let _ = partial.write_all(b"[  ");
        let _ = partial.read(&mut [0]);
        let is = |seen: &Seen| matches!(seen, Seen::Refused { reason, .. } if *reason == timed_out(3));
        running.reported(is) > 0
    });
}

#[test]
fn a_hundred_guests_at_once_are_served() {
    let body = child::body(this_test!(), |path| {
        // A hundred guests in one process, because a hundred processes are too many for a small
        // machine. Their memory is just as separate.
        let guests: Vec<_> = (0..100).map(|_| connect(path)).collect();
        let expected = expected();
        scope(|scope| {
            for (number, (guest, _)) in guests.iter().enumerate() {
                let expected = &expected;
                scope.spawn(move || {
                    for step in 0..20 {
                        let at = (step * 7919 + number * 31) % PAGES * PAGE + 9;
                        assert_eq!(guest.read(at), expected[at]);
                    }
                });
            }
        });
    });
    let mut running = start();
    body.spawn(running.socket()).wait().expect_pass();
    until(|| running.reported(has_ended_whole) == 100);
    assert_eq!(running.reported(|seen| matches!(seen, Seen::Restored { bytes } if bytes >> 20 == 7)), 100);
    running.stop();
}

#[test]
fn a_socket_that_is_in_use_is_refused_and_one_left_behind_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = || Snapshot::open_with(snapshot_in(folder.path()), Holes::Unchanged).unwrap();
    let path = folder.path().join("socket");
    let handler = Handler::builder(snapshot()).bind(&path).unwrap();
    let error = Handler::builder(snapshot()).bind(&path).unwrap_err();
    assert!(matches!(error, Error::InUse(_)), "{error}");
    drop(handler);
    assert!(path.exists(), "as after a SIGKILL");
    drop(Handler::builder(snapshot()).bind(&path).unwrap());
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = Handler::builder(snapshot()).bind(&path).unwrap_err();
    assert!(matches!(error, Error::NotASocket(_)), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let error = Handler::builder(snapshot()).bind(folder.path().join("no/such/folder")).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }), "{error}");
}

/// A tmpfs of huge pages reports a hole inside a huge page as data: zeros would silently hide the
/// base.
#[test]
fn holes_of_a_diff_on_a_file_system_of_large_blocks_are_refused() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let folder = tempfile::tempdir().unwrap();
    let options = Some("huge=always,size=64m");
    if let Err(errno) = mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), options) {
        println!("SKIPPED: no tmpfs of huge pages can be mounted here: {errno}");
        return;
    }
    let files = snapshot_in(folder.path());
    let refused = Snapshot::open_with(&files, Holes::Unchanged).map(|_| ());
    umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    let is_right =
        |error: &Error| matches!(error, Error::UnknownHoles { reason: UnknownHoles::LargeBlocks, .. });
    assert!(refused.as_ref().is_err_and(is_right), "{refused:?}");
}
