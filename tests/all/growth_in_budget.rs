//! Regions that grow and have a budget: appended pages leave and come back, and a page that has left has the bytes
//! that are appended to it meanwhile.

use crate::bounded_writes::{BUDGET, PAGES, pool};
use crate::growth::append_beside_readers;
use crate::inline_files::file_of;
use crate::machine::rounds;
use crate::{PAGE, SetOnDrop, discard, handle, pattern, touch};
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigHandler, Signal};
use pagestitch::source::ImmutableFile;
use pagestitch::{Budget, BuildOption, Chunk, ErrorKind, Inline, OnFailure, Region, Server, SharedRegion};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const CAPACITY: u64 = 1 << 36;

fn servers() -> [Server; 2] {
    [(&pool(2)).into(), Inline.into()]
}

fn log(budget: &Budget, server: &Server) -> Region {
    Region::builder().name("log").budget(budget).capacity(CAPACITY).build(server.clone()).unwrap()
}

#[test]
fn readers_of_a_log_longer_than_its_budget_see_each_byte_right() {
    let bytes = pattern(1, PAGES * PAGE);
    for server in servers() {
        let budget = Budget::bytes(BUDGET).unwrap();
        append_beside_readers(&log(&budget, &server), &bytes, |part| (part * 7 % (50 * PAGE + 7)).max(1));
        assert!(budget.evictions() > 1_000 && budget.resident_bytes() <= BUDGET, "{:?}", budget.metrics());
    }
}

/// The last page is in memory, on the standby list, or gone, by the number of other pages that have come since.
#[test]
fn the_last_page_has_appended_bytes_wherever_it_is() {
    for server in servers() {
        let budget = Budget::bytes(BUDGET).unwrap();
        let log = log(&budget, &server);
        log.append(vec![1; PAGES * PAGE]).unwrap();
        let mut next = 0;
        for others in (0..2_000).step_by(50) {
            let tail = log.append(vec![2; 30]).unwrap().start / PAGE * PAGE;
            assert!(log.as_slice()[tail.max(PAGES * PAGE)..].iter().all(|&byte| byte == 2));
            for _ in 0..others {
                assert_eq!(log.as_slice()[next % PAGES * PAGE], 1);
                next += 1;
            }
            log.append(vec![2; 30]).unwrap();
            let last = &log.as_slice()[tail.max(PAGES * PAGE)..];
            assert!(last.iter().all(|&byte| byte == 2), "after {others} pages: {last:?}");
        }
        assert!(budget.evictions() > 1_000, "{:?}", budget.metrics());
    }
}

#[test]
fn a_discarded_last_page_has_appended_bytes() {
    for server in servers() {
        let budget = Budget::bytes(BUDGET).unwrap();
        let log = log(&budget, &server);
        let mut expected = vec![3; 5 * PAGE + 100];
        log.append(expected.clone()).unwrap();
        for round in 0..5 {
            assert!(log.as_slice() == expected);
            discard(log.as_ptr().addr().get() + 5 * PAGE, PAGE);
            log.append(vec![round; 50]).unwrap();
            expected.extend([round; 50]);
        }
        assert!(log.as_slice() == expected);
        assert_eq!(budget.resident_bytes(), 6 * PAGE as u64);
    }
}

/// The page that the next append shares with the bytes before it.
static SHARED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn touch_shared(_signal: i32) {
    match SHARED.load(Ordering::SeqCst) {
        0 => {}
        page => _ = touch(page),
    }
}

/// The handler touches the page in which a chunk is appended, in the middle of the append.
#[test]
#[cfg_attr(sanitized = "thread", ignore = "handlers run with all signals blocked, SIGBUS too")]
fn a_signal_handler_that_touches_the_last_page_takes_no_appended_byte_away() {
    let end = child::run(this_test!(), || {
        handle(Signal::SIGUSR1, SigHandler::Handler(touch_shared), SaFlags::SA_RESTART);
        for server in servers() {
            let budget = Budget::bytes(BUDGET).unwrap();
            let builder = || Region::builder().capacity(CAPACITY);
            for builder in [builder(), builder().budget(&budget)] {
                let log = builder.build(server.clone()).unwrap();
                let (appending, done) = (pthread_self(), AtomicBool::new(false));
                scope(|scope| {
                    let _done = SetOnDrop(&done);
                    scope.spawn(|| {
                        while !done.load(Ordering::Relaxed) {
                            pthread_kill(appending, Signal::SIGUSR1).unwrap();
                            (0..200).for_each(|_| std::hint::spin_loop());
                        }
                    });
                    for _ in 0..rounds(4_000) {
                        let end = log.append(vec![1; PAGE + PAGE / 2 + 2]).unwrap().end;
                        if end % PAGE == 0 {
                            // There is no such page.
                            continue;
                        }
                        // No thread has touched it.
                        SHARED.store(log.as_ptr().addr().get() + end / PAGE * PAGE, Ordering::SeqCst);
                        let place = log.append(vec![1; PAGE]).unwrap();
                        SHARED.store(0, Ordering::SeqCst);
                        assert!(log.as_slice()[place].iter().all(|&byte| byte == 1));
                    }
                });
            }
            assert!(budget.resident_bytes() <= BUDGET, "{:?}", budget.metrics());
        }
    });
    end.expect_pass();
}

#[test]
fn appended_bytes_that_may_change_are_for_a_region_without_slices() {
    let (budget, pool) = (Budget::bytes(BUDGET).unwrap(), pool(1));
    let bytes = pattern(3, 2 * PAGE + 10);
    let log = log(&budget, &(&pool).into());
    let refused = log.append(file_of(&bytes)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidChunk);
    let refused = log.append(Chunk::from("a").on_failure(OnFailure::Zeros)).unwrap_err();
    assert_eq!((refused.kind(), refused.option()), (ErrorKind::OptionConflict, Some(BuildOption::Budget)));
    assert!(log.is_empty());

    let builder = SharedRegion::builder().budget(&budget).capacity(CAPACITY);
    let shared = builder.build_shared(&pool).unwrap();
    shared.append(file_of(&bytes)).unwrap();
    shared.append(Chunk::from(file_of(&bytes)).on_failure(OnFailure::Zeros)).unwrap();
    let mut seen = vec![0; 2 * bytes.len()];
    for _ in 0..2 {
        shared.read_at(0, &mut seen).unwrap();
        assert!(seen == [&bytes[..], &bytes[..]].concat());
        assert!(shared.evict(..).unwrap() > 0);
    }
}

/// A hash is kept of the page in which the file ends.
#[test]
fn a_page_whose_source_may_change_takes_no_further_bytes() {
    let (budget, bytes) = (Budget::bytes(BUDGET).unwrap(), pattern(4, 2 * PAGE + 10));
    let builder = Region::builder().chunk(file_of(&bytes)).budget(&budget).capacity(CAPACITY);
    let log = builder.build(&pool(1)).unwrap();
    for _ in 0..2 {
        assert!(log.as_slice() == bytes);
        let refused = log.append("behind it").unwrap_err();
        assert_eq!((refused.kind(), refused.chunk()), (ErrorKind::InvalidChunk, Some(1)));
        log.evict(..).unwrap();
    }
    let place = log.append(Chunk::from(vec![5; PAGE]).align(PAGE as u64)).unwrap();
    assert_eq!(place, 3 * PAGE..4 * PAGE);
    for _ in 0..2 {
        assert!(log.as_slice() == [&bytes[..], &[0; PAGE - 10][..], &[5; PAGE]].concat());
        log.evict(..).unwrap();
    }
}

#[test]
fn a_page_of_an_immutable_file_takes_further_bytes() {
    let (budget, bytes) = (Budget::bytes(BUDGET).unwrap(), pattern(5, 2 * PAGE + 10));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    let immutable: Arc<ImmutableFile> = Arc::new(crate::immutable::open(file.path()).unwrap());
    for server in servers() {
        let log = log(&budget, &server);
        let chunk = Chunk::from((*immutable).clone());
        log.append(chunk).unwrap();
        let mut expected = bytes.clone();
        for round in 0..4 {
            assert!(log.as_slice() == expected, "round {round}");
            log.evict(..).unwrap();
            log.append(vec![round; 20]).unwrap();
            expected.extend([round; 20]);
        }
        assert!(log.as_slice() == expected);
    }
}
