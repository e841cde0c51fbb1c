//! A source that fails, panics or shrinks: never zeros, never a hang, and an error for the caller
//! of `read_at` and `populate`.

use crate::machine::rounds;
use crate::{SIGBUS, reason};
use pagestitch::source::{FailureReason, FileSource};
use pagestitch::{Chunk, ErrorKind, Pool, Readahead, Region};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::io::{ErrorKind as IoErrorKind, Write};
use std::sync::Arc;
use std::thread;

const PAGE: u64 = 4096;

/// Ten pages, of which page 4 fails.
fn broken(source: Scripted) -> (Arc<Scripted>, Region) {
    let source = Arc::new(source);
    let region = Region::builder().name("broken").chunk(Chunk::source(Arc::clone(&source)));
    let region = region.build(&Pool::builder().workers(2).start().unwrap()).unwrap();
    (source, region)
}

fn failing() -> (Arc<Scripted>, Region) {
    broken(Scripted::new(10 * PAGE).failing(4 * PAGE + 100..4 * PAGE + 101))
}

#[test]
fn touching_a_page_whose_source_fails_is_sigbus() {
    let end = child::run(this_test!(), || {
        let (_, region) = failing();
        println!("read a byte: {}", region.as_slice()[4 * PAGE as usize]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

#[test]
fn a_poisoned_page_is_sigbus_on_each_touch_of_each_thread() {
    let end = child::run(this_test!(), || {
        let (_, region) = failing();
        region.read_at(4 * PAGE, &mut [0]).unwrap_err();
        scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| println!("read a byte: {}", region.as_slice()[4 * PAGE as usize]));
            }
        });
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

#[test]
fn a_system_call_on_a_failing_page_is_efault_and_not_zeros() {
    let (_, region) = failing();
    if !region.serves_system_calls() {
        return; // A system call of an ordinary user does not wait for a page.
    }
    let mut file = tempfile::tempfile().unwrap();
    let error = file.write(&region.as_slice()[4 * PAGE as usize..][..10]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EFAULT as i32), "{error}");
    assert_eq!(file.write(&region.as_slice()[..10]).unwrap(), 10);
}

#[test]
fn read_at_and_populate_return_the_error_of_the_source() {
    let (_, region) = failing();
    for error in [
        region.read_at(4 * PAGE, &mut [0; 10]).unwrap_err(),
        region.populate(..).unwrap_err(),
        region.read_at(4 * PAGE + 4000, &mut [0; 200]).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::SourceFailed);
        assert_eq!(error.io_error().map(std::io::Error::kind), Some(IoErrorKind::ConnectionReset));
        let failure = error.failure().unwrap();
        assert_eq!(
            (failure.chunk(), failure.source_name(), failure.source_offset()),
            (0, "scripted", 4 * PAGE)
        );
    }
    assert_eq!(region.metrics().pages_poisoned, 1);
}

#[test]
fn a_failing_page_poisons_no_other_page() {
    let (_, region) = failing();
    region.populate(..).unwrap_err();
    region.populate(5 * PAGE..).unwrap();
    for page in (0..10).filter(|&page| page != 4) {
        assert_eq!(region.as_slice()[(page * PAGE) as usize], byte_at(page * PAGE));
    }
}

#[test]
fn a_panic_in_a_source_is_an_error_of_its_page() {
    let (_, region) = broken(Scripted::new(10 * PAGE).panicking(4 * PAGE..4 * PAGE + 1));
    let error = region.read_at(4 * PAGE, &mut [0; 10]).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Panicked, "{error}");
    assert_eq!(region.as_slice()[0], byte_at(0));
    let end = child::run(this_test!(), || {
        println!("read a byte: {}", region.as_slice()[4 * PAGE as usize]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
}

#[test]
fn a_failure_in_a_gathered_page_names_its_chunk() {
    let broken = Arc::new(Scripted::new(100).failing(50..51));
    let region = Region::builder().chunk(vec![1u8; 100]).chunk(Chunk::source(broken)).chunk(vec![3u8; 100]);
    let error = region.build(&Pool::new().unwrap()).unwrap().populate(..).unwrap_err();
    assert_eq!(error.chunk(), Some(1), "{error}");
}

#[test]
fn a_file_that_shrinks_after_the_region_was_built_is_an_error() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![7; 3 * PAGE as usize]).unwrap();
    let chunk = Chunk::from(FileSource::open(file.path()).unwrap());
    let region = Region::builder().chunk(chunk).build(&Pool::new().unwrap()).unwrap();
    file.as_file().set_len(PAGE + 10).unwrap();
    assert_eq!(region.as_slice()[0], 7);
    let error = region.populate(..).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Truncated, "{error}");
    assert_eq!(error.failure().unwrap().source_name(), file.path().display().to_string());
}

#[test]
fn memory_whose_scope_has_ended_is_an_error_and_not_a_dangling_read() {
    let pool = Pool::new().unwrap();
    let bytes = vec![7u8; 3 * PAGE as usize];
    let mut escaped = Region::builder().chunk(vec![1u8]).build(&pool).unwrap();
    pagestitch::scope(|scope| {
        let mut region = scope.region().borrow(&bytes).build(&pool).unwrap();
        assert_eq!(region.as_slice()[0], 7);
        std::mem::swap(&mut *region, &mut escaped);
    });
    drop(bytes);
    assert_eq!(escaped.as_slice()[1], 7, "a filled page stays");
    let error = escaped.populate(..).unwrap_err();
    assert_eq!(reason(&error), FailureReason::ScopeEnded, "{error}");
}

#[test]
fn a_failed_page_is_filled_by_a_retry() {
    let (source, region) = failing();
    region.read_at(4 * PAGE, &mut [0]).unwrap_err();
    let failures = region.failures();
    assert_eq!(failures.len(), 1);
    let (offset, failure) = &failures[0];
    assert_eq!((*offset, failure.chunk(), failure.source_name()), (4 * PAGE, 0, "scripted"));
    assert_eq!(failure.source_offset(), 4 * PAGE);

    let recovers = pagestitch::Support::current().has(pagestitch_kernel::Features::POISON);
    let error = region.retry_failed(..).unwrap_err();
    let kind = if recovers { ErrorKind::SourceFailed } else { ErrorKind::Unsupported };
    assert_eq!(error.kind(), kind, "the retry fails: {error}");
    source.repair();
    region.retry_failed(..4 * PAGE).unwrap();
    assert_eq!(region.failures().len(), 1, "another range");
    if !recovers {
        println!("SKIPPED in part {}: no poison markers", this_test!());
        let error = region.retry_failed(..).unwrap_err();
        assert_eq!((error.kind(), reason(&error)), (ErrorKind::Unsupported, FailureReason::Irrecoverable));
        return;
    }
    region.retry_failed(..).unwrap();
    assert!(region.failures().is_empty());
    assert_eq!(region.as_slice()[4 * PAGE as usize], byte_at(4 * PAGE));
    let mut bytes = [0; 8];
    region.read_at(4 * PAGE + 100, &mut bytes).unwrap();
    assert_eq!(bytes[0], byte_at(4 * PAGE + 100));
    assert_eq!(region.metrics().pages_recovered, 1);
}

#[test]
fn a_page_whose_retry_fails_stays_poisoned() {
    let end = child::run(this_test!(), || {
        let (_, region) = failing();
        region.read_at(4 * PAGE, &mut [0]).unwrap_err();
        region.retry_failed(..).unwrap_err();
        println!("read a byte: {}", region.as_slice()[4 * PAGE as usize]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

/// A source whose first reads fail, at any offset.
struct Flaky {
    left: std::sync::atomic::AtomicU32,
    asked: std::sync::atomic::AtomicU32,
}

impl Flaky {
    fn failing(times: u32) -> Arc<Self> {
        Arc::new(Self { left: times.into(), asked: 0.into() })
    }
}

impl pagestitch::Source for Flaky {
    fn size(&self) -> u64 {
        10_000
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> std::io::Result<()> {
        use std::sync::atomic::Ordering;
        self.asked.fetch_add(1, Ordering::SeqCst);
        into.fill(7);
        let fails =
            self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if fails { Err(std::io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

fn quickly(times: u32) -> pagestitch::OnFailure {
    use std::time::Duration;
    pagestitch::OnFailure::Retry(
        pagestitch::Retry::times(times).pause(Duration::from_micros(100), Duration::from_millis(1)),
    )
}

#[test]
fn a_source_is_retried_as_often_as_declared() {
    let pool = Pool::new().unwrap();
    let patient = Flaky::failing(3);
    let region = Region::builder().chunk(Chunk::source(patient).on_failure(quickly(3))).build(&pool).unwrap();
    assert_eq!(region.as_slice()[5], 7, "the fourth read succeeds");
    let metrics = region.close();
    assert_eq!((metrics.source_retries, metrics.pages_poisoned), (3, 0));

    let hopeless = Flaky::failing(u32::MAX);
    let chunk = Chunk::source(Arc::clone(&hopeless)).on_failure(quickly(4));
    let region = Region::builder().chunk(chunk).build(&pool).unwrap();
    let error = region.read_at(5000, &mut [0]).unwrap_err();
    assert_eq!(error.failure().unwrap().attempts(), 5, "{error}");
    assert_eq!(region.failures()[0].1.attempts(), 5);
    assert_eq!(region.metrics().pages_poisoned, 1);
}

/// The only worker serves another region while a source is left alone for a second or more.
#[test]
fn a_worker_serves_other_faults_between_two_reads_of_a_failing_source() {
    use std::time::Duration;
    const BYTES: usize = 64 * 4096;
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let pause = Duration::from_secs(2);
    let retry = pagestitch::OnFailure::Retry(pagestitch::Retry::times(3).pause(pause, pause));
    let flaky = Flaky::failing(2);
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&flaky)).on_failure(retry)).build(&pool).unwrap();
    let other = Region::builder().chunk(vec![8; BYTES]).readahead(Readahead::None).build(&pool).unwrap();
    scope(|scope| {
        let waits = scope.spawn(|| region.as_slice()[5]);
        let asked = || flaky.asked.load(std::sync::atomic::Ordering::SeqCst);
        for (round, first) in [(1, 0), (2, BYTES / 2)] {
            crate::until(|| asked() == round);
            assert!((0..BYTES / 2).step_by(4096).all(|at| other.as_slice()[first + at] == 8));
            assert_eq!(asked(), round, "the source is asked again before the other region is served");
            assert!(!waits.is_finished());
        }
        assert_eq!(waits.join().unwrap(), 7);
    });
    let metrics = region.close();
    assert_eq!((metrics.source_retries, metrics.pages_poisoned), (2, 0));
    crate::assert_faults(&metrics, 1);
}

/// The queue of retries has no limit for memory of this process: the only worker stays free, and
/// each fault has its pause.
#[test]
#[cfg_attr(sanitized, ignore = "a sanitizer needs much memory for a thousand threads")]
fn a_page_is_retried_while_a_thousand_other_faults_wait_for_their_retries() {
    use std::time::Duration;
    const WAITING: u64 = 1024;
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
        let never =
            pagestitch::Retry::times(1).pause(Duration::from_secs(36_000), Duration::from_secs(36_000));
        let hopeless = Arc::new(Scripted::new(WAITING * PAGE).failing(0..WAITING * PAGE));
        let region = Region::builder()
            .chunk(Chunk::source(hopeless).on_failure(pagestitch::OnFailure::Retry(never)))
            .chunk(Chunk::source(Flaky::failing(2)).on_failure(quickly(2)))
            .readahead(Readahead::None)
            .build(&pool)
            .unwrap();
        let region: &Region = Box::leak(Box::new(region));
        let touch = |page: u64| {
            let thread = thread::Builder::new().stack_size(64 << 10);
            thread.spawn(move || region.as_slice()[(page * PAGE) as usize]).unwrap()
        };
        (0..WAITING).for_each(|page| drop(touch(page)));
        // The kernel may report the fault of a waiting thread again.
        crate::until(|| region.metrics().source_retries >= WAITING);
        assert_eq!(touch(WAITING).join().unwrap(), 7);
        assert!(region.metrics().source_retries >= WAITING + 2);
        println!("the page is filled");
        // The other threads still wait.
        std::process::exit(0);
    });
    assert!(end.output().contains("the page is filled"), "{}", end.output());
}

/// Zeros cover the chunk that declares them, and no other byte of the same page.
#[test]
fn on_failure_zeros_covers_its_own_chunk_only() {
    let pool = Pool::new().unwrap();
    let hopeless = || Chunk::source(Flaky::failing(u32::MAX));
    let region = Region::builder()
        .chunk(vec![1; 1000])
        .chunk(hopeless().on_failure(pagestitch::OnFailure::Zeros))
        .chunk(vec![2; 5000])
        .build(&pool)
        .unwrap();
    let expected = [vec![1; 1000], vec![0; 10_000], vec![2; 5000]].concat();
    assert!(region.as_slice() == expected);
    let metrics = region.close();
    assert_eq!((metrics.pages_zeroed_on_failure, metrics.pages_poisoned), (3, 0));
    // Beside a chunk that declares no zeros: the page that both chunks share fails.
    let region = Region::builder()
        .chunk(hopeless().on_failure(pagestitch::OnFailure::Zeros))
        .chunk(hopeless())
        .build(&pool)
        .unwrap();
    region.populate(0..8192).unwrap();
    let error = region.read_at(9000, &mut [0]).unwrap_err();
    assert_eq!(error.chunk(), Some(1), "{error}");
}

#[test]
fn the_failure_callback_hears_of_each_failure_and_may_panic() {
    let reports = Arc::new(std::sync::Mutex::new(Vec::new()));
    let reporting = Arc::clone(&reports);
    let source = Arc::new(Scripted::new(100_000).failing(50_000..50_001));
    let region = Region::builder()
        .chunk(Chunk::source(source))
        .on_page_failure(move |offset, failure| {
            reporting.lock().unwrap().push((offset, failure.chunk(), failure.source_name().to_owned()));
            panic!("a defect of the application");
        })
        .build(&Pool::new().unwrap())
        .unwrap();
    region.populate(..).unwrap_err();
    let reports = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert_eq!(*reports, [(49_152, 0, String::from("scripted"))]);
}

/// A caller that finds a page poisoned finds the reason too, also while the page is discarded and
/// fails again. Otherwise the caller would look for the reason forever.
#[test]
fn a_page_that_fails_while_it_is_discarded_is_an_error_each_time() {
    for reports in crate::REPORTS {
        let source = Arc::new(Scripted::new(16 * 4096).failing(0..16 * 4096));
        let region = Region::builder()
            .chunk(Chunk::source(source))
            .report_discards(reports)
            .build(&Pool::new().unwrap())
            .unwrap();
        let start = region.as_ptr().expose_provenance().get();
        let done = std::sync::atomic::AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| {
                for page in 0..rounds(2500) {
                    region.populate(page % 16 * 4096..page % 16 * 4096 + 1).unwrap_err();
                }
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                crate::discard(start, 16 * 4096);
                // With a pause, because no page can be poisoned during a discard.
                thread::sleep(std::time::Duration::from_micros(50));
            }
        });
    }
}

#[test]
fn a_descriptor_that_cannot_be_read_at_any_offset_is_refused_with_the_remedy() {
    use nix::fcntl::OFlag;
    use pagestitch::Access;
    use pagestitch::source::SharedFile;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [7; 10_000]).unwrap();
    let opened = |flags: OFlag| {
        let mut options = OpenOptions::new();
        let write = flags.contains(OFlag::O_WRONLY);
        options.read(!write).write(write).custom_flags((flags & !OFlag::O_ACCMODE).bits());
        options.open(file.path())
    };
    for flags in [OFlag::O_WRONLY, OFlag::O_PATH, OFlag::O_DIRECT] {
        let (Ok(first), Ok(second)) = (opened(flags), opened(flags)) else {
            println!("SKIPPED in part: this file system has no {flags:?}");
            continue;
        };
        let error = FileSource::from_file(first, file.path()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (ErrorKind::UnusableFile, Some(file.path())));
        let error = SharedFile::try_from(std::os::fd::OwnedFd::from(second)).unwrap_err();
        assert_eq!((error.kind(), error.raw_os_error()), (IoErrorKind::InvalidInput, None), "{error}");
    }
    assert!(SharedFile::open(file.path(), Access::ReadOnly).is_ok());
}
