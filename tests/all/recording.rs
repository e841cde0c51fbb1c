//! Recordings: the pages that one run touches first are filled early in the next run.

use crate::donated::pages_of;
use crate::guests::adopt;
use crate::handler::{RunningHandler, Seen, has_ended, is_restored};
use crate::{PAGE, end_if_hung, pattern, serve_until, until};
use pagestitch::{BuildOption, Chunk, ErrorKind, Inline, Manual, Pool, Recording, Region};
use pagestitch_firecracker::{Error as HandlerError, Handler, Snapshot};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;

fn builder(source: &Arc<Scripted>) -> pagestitch::Builder {
    Region::builder().name("twice").chunk(Chunk::source(Arc::clone(source)))
}

/// Pages in an order without a stream for readahead.
fn touched() -> Vec<usize> {
    (0..300).map(|i| i * 7919 % 2000).collect()
}

fn recording(pool: &Pool) -> Recording {
    let source = Arc::new(Scripted::new(2000 * PAGE as u64));
    let region = builder(&source).record().build(pool).unwrap();
    for page in touched() {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    let recording = region.recording().unwrap();
    assert_eq!(region.close().pages_installed(), 300, "nothing is filled ahead");
    recording
}

#[test]
fn replayed_pages_are_filled_before_their_first_touch() {
    let pool = Pool::new().unwrap();
    let recorded = recording(&pool);
    let order: Vec<u64> = touched().into_iter().map(|page| (page * PAGE) as u64).collect();
    assert_eq!(recorded.offsets().collect::<Vec<_>>(), order);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("first.touches");
    recorded.write(&path).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 300 * 4, "compact");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    let read = Recording::read(&path).unwrap();
    assert_eq!(read, recorded);

    let source = Arc::new(Scripted::new(2000 * PAGE as u64));
    let region = builder(&source).replay(&read).build(&pool).unwrap();
    until(|| region.metrics().pages_installed() == 300);
    for page in touched() {
        assert_eq!(region.as_slice()[page * PAGE], byte_at((page * PAGE) as u64));
    }
    let metrics = region.close();
    assert_eq!((metrics.faults, metrics.pages_ahead), (0, 300));
}

#[test]
fn a_manual_replays_and_a_failing_source_poisons_no_page() {
    let mut manual = Manual::new().unwrap();
    let recorded = recording(&Pool::new().unwrap());
    let bad = 7919 % 2000 * PAGE as u64;
    let source = Arc::new(Scripted::new(2000 * PAGE as u64).failing(bad..bad + 1));
    let region = builder(&source).replay(&recorded).build(&manual).unwrap();
    serve_until(&mut manual, 1000, || region.metrics().pages_installed() == 299);
    assert_eq!(region.metrics().pages_installed(), 299);
    assert!(region.failures().is_empty(), "no thread has touched the failing page");
    source.repair();
    region.populate(..).unwrap();
}

#[test]
fn a_recording_of_another_region_is_refused_with_the_reason() {
    let pool = Pool::new().unwrap();
    let recorded = recording(&pool);
    let other = || Region::builder().name("other").chunk(vec![1; 5 * PAGE]).replay(&recorded);
    let error = other().build(&pool).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidRecording, Some(BuildOption::Replay)));
    let both = builder(&Arc::new(Scripted::new(2000 * PAGE as u64))).record().replay(&recorded);
    let error = both.build(&pool).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::OptionConflict, Some(BuildOption::Record)));
    let error = Region::builder().chunk(vec![1; 10]).record().build(Inline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsuitableServer);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let error = Recording::read(&path).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::Io, Some(path.as_path())));
    assert_eq!(error.io_error().unwrap().kind(), std::io::ErrorKind::NotFound);
    fs::write(&path, "something else").unwrap();
    assert_eq!(Recording::read(&path).unwrap_err().kind(), ErrorKind::InvalidRecording);
    recorded.write(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(Recording::read(&path).unwrap_err().kind(), ErrorKind::InvalidRecording);
    assert_eq!(recorded.write(folder.path().join("no/folder")).unwrap_err().kind(), ErrorKind::Io);
    assert!(Region::builder().chunk(vec![1; 10]).build(&pool).unwrap().recording().is_none());
}

#[test]
fn a_recording_of_larger_memory_is_refused_for_adopted_memory() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let pool = Pool::new().unwrap();
        let recorded = recording(&pool);
        let guest = Guest::new(&[5 * PAGE], false).unwrap();
        let builder = Region::builder().name("guest").chunk(vec![1; 5 * PAGE]).replay(&recorded);
        match builder.build_adopted(adopt(&guest), &pool) {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::InvalidRecording);
            }
            Ok(region) => {
                (0..5).for_each(|page| assert_eq!(guest.read(page * PAGE), 1));
                panic!("the region was built: {region:?}");
            }
        }
    });
    end.expect_pass();
}

#[test]
fn readahead_is_off_while_adopted_memory_is_recorded() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    let guest = Guest::new(&[400 * PAGE], false).unwrap();
    let source = Scripted::new(400 * PAGE as u64);
    let builder = Region::builder().chunk(Chunk::source(Arc::new(source))).record();
    let region = builder.build_adopted(adopt(&guest), &Pool::new().unwrap()).unwrap();
    for page in 0..300 {
        assert_eq!(guest.read(page * PAGE), byte_at((page * PAGE) as u64));
    }
    let recorded: Vec<u64> = region.recording().unwrap().offsets().collect();
    let metrics = region.close();
    assert_eq!(recorded, (0..300).map(|page| page * PAGE as u64).collect::<Vec<_>>(), "{metrics:?}");
    assert_eq!(metrics.pages_ahead, 0);
}

/// A handler for guests of 100 pages.
fn handler(folder: &Path) -> pagestitch_firecracker::Builder {
    let memory = folder.join("memory");
    fs::write(&memory, vec![7; 100 * PAGE]).unwrap();
    Handler::builder(Snapshot::open([memory]).unwrap())
}

/// A guest that touches some pages and lives until it is killed. The argument is `socket:pages`.
fn touching_guest(argument: &str) {
    let (socket, touches) = argument.rsplit_once(':').unwrap();
    // The parent kills the guest, unless the parent has failed.
    end_if_hung();
    let guest = Guest::new(&[100 * PAGE], false).unwrap();
    let _stream = guest.hand_over(socket.as_ref()).unwrap();
    let pages = touches.split(',').filter(|page| !page.is_empty()).map(|page| page.parse::<usize>().unwrap());
    pages.for_each(|page| assert_eq!(guest.read(page * PAGE), 7));
    fs::write(format!("{socket}.{touches}"), "").unwrap();
    loop {
        thread::park();
    }
}

#[test]
fn an_idle_guest_leaves_the_recording_to_the_next_guest() {
    let body = child::body(this_test!(), touching_guest);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("touches");
    let builder = handler(folder.path()).record(&path);
    let mut recorder = RunningHandler::start(folder, builder);
    let good = recording(&Pool::new().unwrap());
    good.write(&path).unwrap();
    let guest = |touches| body.spawn(format!("{}:{touches}", recorder.socket().display()));
    // A guest that ends and an idle guest come before the guest that is recorded.
    let mut first = guest("");
    until(|| recorder.reported(is_restored) == 1);
    first.kill();
    until(|| recorder.reported(has_ended) == 1);
    assert_eq!(Recording::read(&path).unwrap(), good, "an empty recording replaces none");
    assert_eq!(recorder.reported(|seen| *seen == Seen::Recorded { pages: Some(0) }), 1);
    let mut idle = guest("");
    until(|| recorder.reported(is_restored) == 2);
    let mut busy = guest("70,3,9,4");
    until(|| recorder.reported(is_restored) == 3);
    let has_touched = |touches| recorder.folder.path().join(format!("socket.{touches}")).exists();
    until(|| has_touched("70,3,9,4"));
    let mut late = guest("1");
    until(|| has_touched("1"));
    for (count, guest) in [&mut late, &mut busy, &mut idle].into_iter().enumerate() {
        guest.kill();
        until(|| recorder.reported(has_ended) == count + 2);
    }
    let recorded: Vec<u64> = Recording::read(&path).unwrap().offsets().collect();
    assert_eq!(recorded, [70, 3, 9, 4].map(|page| page * PAGE as u64));
    recorder.stop();
    let recorded = |seen: &Seen| *seen == Seen::Recorded { pages: Some(4) };
    assert_eq!(recorder.reported(recorded), 1, "{:?}", recorder.events());
    let left = fs::read_dir(recorder.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().ends_with(".part")));
}

#[test]
fn a_handler_refuses_a_recording_that_it_cannot_replay_or_write() {
    let folder = tempfile::tempdir().unwrap();
    let recorded = recording(&Pool::new().unwrap());
    let socket = folder.path().join("socket");
    let error = handler(folder.path()).replay(recorded).bind(&socket).unwrap_err();
    assert!(
        matches!(error, HandlerError::RecordingMismatch { recorded: 8_192_000, bytes: 409_600 }),
        "{error:?}"
    );
    for (bad, kind) in
        [(folder.path().join("no/where"), ErrorKind::Io), (folder.path().into(), ErrorKind::UnusableFile)]
    {
        let HandlerError::Memory(error) = handler(folder.path()).record(&bad).bind(&socket).unwrap_err()
        else {
            panic!("{}: another error", bad.display())
        };
        assert_eq!((error.kind(), error.path()), (kind, Some(bad.as_path())));
    }
    assert!(!socket.exists(), "nothing is left behind");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_recording_is_written_through_a_symlink_and_into_a_fifo() {
    let folder = tempfile::tempdir().unwrap();
    let recorded = recording(&Pool::new().unwrap());
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    std::os::unix::fs::symlink(&file, &link).unwrap();
    recorded.write(&link).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(Recording::read(&file).unwrap(), recorded);
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reading = thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    recorded.write(&pipe).unwrap();
    assert_eq!(reading.join().unwrap(), recorded.to_bytes());
}

#[test]
fn a_donated_huge_page_is_recorded_page_by_page() {
    let bytes = pattern(3, 4 << 20);
    let region = Region::builder().chunk(pages_of(&bytes)).record().build(&Pool::new().unwrap()).unwrap();
    // Pages that are moved in at build cause no faults to record.
    if region.metrics().pages_in_place > 0 {
        println!(
            "SKIPPED a_donated_huge_page_is_recorded_page_by_page: the kernel moves pages at build (Linux 6.8)"
        );
        return;
    }
    let touched = [700, 3, 900, 701].map(|page| page * PAGE);
    touched.into_iter().for_each(|at| assert_eq!(region.as_slice()[at], bytes[at]));
    let recorded: Vec<u64> = region.recording().unwrap().offsets().collect();
    assert_eq!(recorded, touched.map(|at| at as u64));
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_recorded_run_is_replayed_over_the_border_of_two_ranges() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    const RANGES: [usize; 2] = [300 * PAGE, 700 * PAGE];
    let pool = Pool::new().unwrap();
    let source = Arc::new(Scripted::new(1000 * PAGE as u64));
    let build =
        |guest: &Guest, builder: pagestitch::Builder| builder.build_adopted(adopt(guest), &pool).unwrap();
    let touched = [290..310, 0..2, 998..1000].map(Iterator::collect::<Vec<usize>>).concat();
    let first = Guest::new(&RANGES, false).unwrap();
    let region = build(&first, builder(&source).record());
    touched.iter().for_each(|page| assert_eq!(first.read(page * PAGE), byte_at((page * PAGE) as u64)));
    let recorded = region.recording().unwrap();
    assert_eq!(recorded.offsets().count(), touched.len());
    let second = Guest::new(&RANGES, false).unwrap();
    let region = build(&second, builder(&source).replay(&recorded));
    until(|| region.metrics().pages_installed() == touched.len() as u64);
    (0..1000)
        .for_each(|page| assert_eq!(second.read(page * PAGE), byte_at((page * PAGE) as u64), "page {page}"));
}
