//! Adopted memory, which another process registers and hands over: its bytes, its balloons, the end
//! of its owner and the end of its region.

use crate::guests::{adopt, assert_shows, receive};
use crate::machine::rounds;
use crate::reads_at_once::{on_disk, one_worker};
use crate::wrappers::Noted;
use crate::{HANG, HugePages, PAGE, SIGKILL, pattern, reason, signal_of_lost_page, until};
use nix::sys::socket::{SockFlag, SockType};
use nix::unistd::gettid;
use pagestitch::source::{Cached, FailureReason};
use pagestitch::{
    AdoptedMemory, AdoptedRegion, BuildOption, Chunk, ErrorKind, Inline, OnUnavailable, Pool, Process,
    Readahead, Region, Source,
};
use pagestitch_kernel::fd_passing;
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at, fill};
use pagestitch_testkit::this_test;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;
use std::{fs, thread};

/// Two ranges with a gap between, as a guest has below and above 4 GiB.
const RANGES: [usize; 2] = [300 * PAGE, 700 * PAGE];
const TOTAL: usize = 1000 * PAGE;

/// A guest in another process, and the memory that it handed over. The process lives until the
/// stream is closed.
struct GuestProcess {
    process: ChildTest,
    stream: UnixStream,
    memory: AdoptedMemory,
}

/// Starts `test` again as a guest that runs `body`.
fn start_guest(test: &str, body: impl FnOnce(&Guest, UnixStream)) -> GuestProcess {
    start_guest_with(test, &RANGES, false, body)
}

fn start_guest_with(
    test: &str,
    ranges: &[usize],
    huge: bool,
    body: impl FnOnce(&Guest, UnixStream),
) -> GuestProcess {
    start_guest_of(test, || Guest::new(ranges, huge), body)
}

fn start_guest_of(
    test: &str,
    make: impl FnOnce() -> io::Result<Guest>,
    body: impl FnOnce(&Guest, UnixStream),
) -> GuestProcess {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let process = child::spawn(test, path.to_str().unwrap(), |path| {
        let guest = make().unwrap();
        until(|| fs::exists(path).unwrap());
        until(|| UnixStream::connect(path).is_ok());
        let stream = guest.hand_over(path.as_ref()).unwrap();
        body(&guest, stream);
    });
    let listener = UnixListener::bind(&path).unwrap();
    // The first connection only shows the guest that the socket listens.
    let _ = listener.accept().unwrap();
    let (stream, _) = listener.accept().unwrap();
    let memory = receive(&stream);
    GuestProcess { process, stream, memory }
}

/// Pieces of odd lengths that hold `pattern(9, TOTAL)`.
fn pieces() -> Vec<Vec<u8>> {
    let whole = pattern(9, TOTAL);
    let mut rest = &whole[..];
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(rest.len().min(70_001));
        pieces.push(piece.to_vec());
        rest = later;
    }
    pieces
}

fn build(memory: AdoptedMemory, pool: &Pool) -> AdoptedRegion {
    Region::builder().name("guest").chunks(pieces()).build_adopted(memory, pool).unwrap()
}

/// Tells the other side to go on.
fn resume(mut stream: &UnixStream) {
    stream.write_all(b"!").unwrap();
}

fn wait_for_peer(mut stream: &UnixStream) {
    stream.read_exact(&mut [0]).unwrap();
}

#[test]
fn the_owner_of_adopted_memory_reads_the_bytes_of_the_chunks() {
    let other = start_guest(this_test!(), |guest, _stream| {
        let expected = pattern(9, TOTAL);
        scope(|scope| {
            for cpu in 0..4 {
                let expected = &expected;
                scope.spawn(move || {
                    // Each thread has its own order, over both ranges.
                    for at in (0..TOTAL).step_by(997) {
                        let at = (at * 7919 + cpu * 104_729) % TOTAL;
                        assert_eq!(guest.read(at), expected[at], "byte {at}");
                    }
                    assert_shows(guest, expected, &[]);
                });
            }
        });
    });
    let region = build(other.memory, &Pool::new().unwrap());
    other.process.wait().expect_pass();
    let metrics = region.close();
    // A late fault finds its page filled, and the page is counted again.
    assert!((1000..1010).contains(&metrics.pages_installed()), "{metrics:?}");
}

#[test]
fn a_discarded_page_of_adopted_memory_stays_zeros() {
    let other = guest_with_a_balloon(this_test!(), 2);
    let region = build(other.memory, &Pool::builder().workers(3).start().unwrap());
    other.process.wait().expect_pass();
    assert!(region.close().pages_zeroed >= 334);
}

/// A page is discarded while its read is in flight.
#[test]
fn a_discarded_page_of_adopted_memory_stays_zeros_among_reads_in_flight() {
    let other = guest_with_a_balloon(this_test!(), 8);
    let Some(file) = on_disk(this_test!(), &pattern(9, TOTAL)) else {
        drop(other.stream);
        return;
    };
    let builder = Region::builder().chunk(file).readahead(Readahead::None);
    let region = builder.build_adopted(other.memory, &one_worker(1)).unwrap();
    other.process.wait().expect_pass();
    assert!(region.close().pages_zeroed >= 334);
}

/// The owner ends, or the region is dropped, while reads are in flight.
#[test]
fn reads_in_flight_end_with_adopted_memory() {
    for is_killed in [true, false] {
        let mut other = start_guest(this_test!(), |guest, stream| {
            scope(|scope| {
                for cpu in 0..8 {
                    scope.spawn(move || {
                        (cpu..TOTAL / PAGE).step_by(8).for_each(|page| _ = guest.read(page * PAGE))
                    });
                }
                resume(&stream);
            });
        });
        let Some(file) = on_disk(this_test!(), &pattern(9, TOTAL)) else { return };
        let pool = one_worker(1);
        let builder = Region::builder().chunk(file).readahead(Readahead::None);
        let region = builder.build_adopted(other.memory, &pool).unwrap();
        wait_for_peer(&other.stream);
        until(|| region.metrics().pages_installed() > 100);
        if is_killed {
            other.process.kill();
        }
        let metrics = region.close();
        assert!(metrics.pages_poisoned == 0 || !is_killed, "{metrics:?}");
        drop(pool);
    }
}

/// A guest that discards pages while `cpus` threads touch them. The bytes of the snapshot must never come
/// back.
fn guest_with_a_balloon(test: &str, cpus: usize) -> GuestProcess {
    start_guest(test, move |guest, _stream| {
        let (expected, stop) = (pattern(9, TOTAL), AtomicBool::new(false));
        scope(|scope| {
            for cpu in 0..cpus {
                let (expected, stop) = (&expected, &stop);
                scope.spawn(move || {
                    // A byte is the snapshot's or zero, and zero for good once it was zero.
                    let mut gone = vec![false; TOTAL / PAGE];
                    let mut at = cpu;
                    while !stop.load(Ordering::Relaxed) {
                        at = (at + 7919 * PAGE + 1) % TOTAL;
                        let byte = guest.read(at);
                        assert!(byte == expected[at] && !gone[at / PAGE] || byte == 0, "byte {at}: {byte}");
                        gone[at / PAGE] |= byte == 0;
                    }
                });
            }
            for page in (0..TOTAL / PAGE).filter(|page| page % 3 == 0) {
                guest.balloon(page * PAGE, PAGE).unwrap();
                assert_eq!(guest.read(page * PAGE), 0, "page {page}");
            }
            guest.balloon(0, 100 * PAGE).unwrap();
            assert!((0..100).all(|page| guest.read(page * PAGE + 5) == 0));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(
            (0..TOTAL / PAGE)
                .filter(|page| page % 3 == 1 && *page > 100)
                .all(|page| guest.read(page * PAGE) != 0)
        );
    })
}

/// A source that is read in units: a unit leaves out the pages that a balloon has taken, and ends
/// with the range of its page.
#[test]
fn a_unit_of_reads_has_no_discarded_page_and_ends_with_its_range() {
    let other = start_guest(this_test!(), |guest, _stream| {
        guest.balloon(5 * PAGE, PAGE).unwrap();
        for page in [3, 8, 299, 301] {
            assert_eq!(guest.read(page * PAGE), byte_at((page * PAGE) as u64), "page {page}");
        }
        assert_eq!(guest.read(5 * PAGE), 0);
    });
    let noted = Arc::new(Noted::new(TOTAL as u64, 16 * PAGE as u64));
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&noted))).readahead(Readahead::None);
    let region = builder.build_adopted(other.memory, &Pool::builder().workers(1).start().unwrap()).unwrap();
    other.process.wait().expect_pass();
    let reads = [(0, 5), (6, 10), (288, 12), (300, 4)];
    assert_eq!(noted.reads(), reads.map(|(first, pages)| ((first * PAGE) as u64, pages * PAGE)));
    assert_eq!(region.close().pages_zeroed, 1);
}

/// A touch of a discarded page has no unit: the pages that the owner keeps end before it.
#[test]
fn a_discarded_end_of_a_unit_is_zeros_and_the_server_goes_on() {
    let other = start_guest(this_test!(), |guest, _stream| {
        // The whole last unit, the last pages of the first range, and the last pages of a unit.
        for (page, pages) in [(992, 8), (298, 2), (12, 4)] {
            guest.balloon(page * PAGE, pages * PAGE).unwrap();
            assert_eq!(guest.read((page + pages - 1) * PAGE), 0, "page {page}");
        }
        assert_eq!(guest.read(297 * PAGE), byte_at(297 * PAGE as u64));
        assert_eq!(guest.read(991 * PAGE), byte_at(991 * PAGE as u64));
    });
    let noted = Arc::new(Noted::new(TOTAL as u64, 16 * PAGE as u64));
    let builder = Region::builder().chunk(Chunk::source(noted)).readahead(Readahead::None);
    let region = builder.build_adopted(other.memory, &Pool::builder().workers(1).start().unwrap()).unwrap();
    other.process.wait().expect_pass();
    assert_eq!(region.close().pages_zeroed, 3);
}

#[test]
fn guests_that_share_a_cached_source_read_each_block_once() {
    const BLOCK: usize = 64 << 10;
    let guest = || {
        start_guest(this_test!(), |guest, _stream| {
            for page in (0..TOTAL / PAGE).map(|page| page * 617 % (TOTAL / PAGE)) {
                assert_eq!(guest.read(page * PAGE + 9), byte_at((page * PAGE) as u64 + 9));
            }
        })
    };
    let guests = [guest(), guest()];
    let noted = Arc::new(Noted::new(TOTAL as u64, BLOCK as u64));
    let cached = Arc::new(Cached::new(Arc::clone(&noted), 2 * TOTAL as u64));
    let pool = Pool::new().unwrap();
    let served = guests.map(|guest| {
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&cached)));
        (builder.build_adopted(guest.memory, &pool).unwrap(), guest.process)
    });
    for (region, process) in served {
        process.wait().expect_pass();
        drop(region);
    }
    let blocks = (0..TOTAL).step_by(BLOCK).map(|start| (start as u64, BLOCK.min(TOTAL - start)));
    assert_eq!(noted.reads(), blocks.collect::<Vec<_>>());
}

#[test]
fn an_unfilled_page_of_a_dropped_adopted_region_is_a_signal_and_not_zeros() {
    let test = this_test!();
    let other = start_guest(test, |guest, stream| {
        let expected = pattern(9, TOTAL);
        assert_eq!(guest.read(500 * PAGE), expected[500 * PAGE]);
        guest.balloon(900 * PAGE, PAGE).unwrap();
        resume(&stream);
        wait_for_peer(&stream);
        assert_eq!(guest.read(500 * PAGE), expected[500 * PAGE], "a filled page stays");
        assert_eq!(guest.read(900 * PAGE), 0, "a ballooned page is zeros");
        println!("as expected");
        println!("read a byte: {}", guest.read(100 * PAGE));
    });
    let region = build(other.memory, &Pool::new().unwrap());
    wait_for_peer(&other.stream);
    drop(region);
    // Without poison markers, the drop kills the owner.
    let lives = signal_of_lost_page() != SIGKILL;
    if lives {
        resume(&other.stream);
    }
    let end = other.process.wait();
    assert_eq!(end.output().contains("as expected"), lives, "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
}

/// The kernel takes a protected missing page for a present one, and the end of a registration ends the protection.
#[test]
fn an_unfilled_page_that_its_owner_protects_is_a_signal_and_not_zeros() {
    let make = || Guest::protectable(&RANGES);
    let other = start_guest_of(this_test!(), make, |guest, stream| {
        assert_eq!(guest.read(500 * PAGE), pattern(9, TOTAL)[500 * PAGE]);
        guest.protect().unwrap();
        resume(&stream);
        wait_for_peer(&stream);
        println!("read a byte: {}", guest.read(100 * PAGE));
    });
    let region = build(other.memory, &Pool::new().unwrap());
    wait_for_peer(&other.stream);
    drop(region);
    // Without poison markers, the drop kills the owner.
    if signal_of_lost_page() != SIGKILL {
        resume(&other.stream);
    }
    let end = other.process.wait();
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
}

#[test]
fn a_waiting_thread_of_the_owner_gets_a_signal_when_the_region_is_dropped() {
    let other = start_guest(this_test!(), |guest, _stream| {
        println!("read a byte: {}", guest.read(0));
    });
    // A manual that does not serve: the thread waits.
    let manual = pagestitch::Manual::new().unwrap();
    let region = Region::builder().chunks(pieces()).build_adopted(other.memory, &manual).unwrap();
    until_a_thread_faults(other.process.id());
    drop(region);
    let end = other.process.wait();
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
}

/// Waits until a thread of a process waits in a page fault. `/proc` may hide the wait channel: then
/// all threads asleep are the sign.
fn until_a_thread_faults(process: u32) {
    let stat = format!("/proc/{process}/task");
    let waits = |stat: String| stat.contains(") S ");
    until(|| {
        let tasks = fs::read_dir(&stat).unwrap().filter_map(Result::ok);
        tasks
            .filter_map(|task| fs::read_to_string(task.path().join("wchan")).ok())
            .any(|at| at == "handle_userfault")
            || fs::read_dir(&stat)
                .unwrap()
                .filter_map(Result::ok)
                .all(|task| fs::read_to_string(task.path().join("stat")).is_ok_and(waits))
    });
}

#[test]
fn finish_leaves_the_owner_with_all_pages() {
    let other = start_guest(this_test!(), |guest, stream| {
        guest.balloon(10 * PAGE, PAGE).unwrap();
        resume(&stream);
        wait_for_peer(&stream);
        assert_shows(guest, &pattern(9, TOTAL), &[10]);
    });
    let region = build(other.memory, &Pool::new().unwrap());
    wait_for_peer(&other.stream);
    let metrics = region.finish().unwrap();
    // The ballooned page is left alone, or filled with zeros where the balloon and the fill meet.
    let with_bytes = metrics.pages_installed() - metrics.pages_zeroed;
    assert_eq!(with_bytes, 999, "a ballooned page gets no bytes: {metrics:?}");
    resume(&other.stream);
    other.process.wait().expect_pass();
}

/// A worker serves the faults that it reads as long as they are fast, and the other workers leave
/// the region to it. Some of several concurrent faults are read in one batch with the fault that
/// hangs.
#[test]
fn a_hanging_source_delays_no_other_page_of_adopted_memory() {
    const HANGS: usize = 300;
    let test = this_test!();
    let other = start_guest(test, |guest, stream| {
        let expect = |page: usize| assert_eq!(guest.read(page * PAGE), byte_at((page * PAGE) as u64));
        // Fast faults first, so that the region counts as fast.
        (0..100).for_each(expect);
        scope(|scope| {
            let at_once = (HANGS - 4..HANGS + 4).map(|page| (page, scope.spawn(move || expect(page))));
            for (page, thread) in at_once.collect::<Vec<_>>() {
                if page != HANGS {
                    thread.join().unwrap();
                }
            }
            (0..1000).filter(|page| *page != HANGS).for_each(expect);
            resume(&stream);
        });
    });
    let hangs = (HANGS * PAGE) as u64;
    let source = Arc::new(Scripted::new(TOTAL as u64).holding(hangs..hangs + 1));
    let region = Region::builder()
        .chunk(Chunk::source(Arc::clone(&source)))
        .readahead(Readahead::None)
        .build_adopted(other.memory, &Pool::builder().workers(4).start().unwrap())
        .unwrap();
    other.stream.set_read_timeout(Some(HANG)).unwrap();
    let served = (&other.stream).read_exact(&mut [0]);
    source.release();
    served.expect("all other pages are served");
    other.process.wait().expect_pass();
    drop(region);
}

/// A source that takes 2 ms for a page, and hangs in one page of each [`GROUP`] until it is opened.
#[derive(Default)]
struct Hanging {
    open: Mutex<bool>,
    opened: Condvar,
}

/// Threads that fault at once, each at a page of its own.
const GROUP: usize = 16;

impl Hanging {
    const fn hangs(page: usize) -> bool {
        page % GROUP == 5
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Source for Hanging {
    fn size(&self) -> u64 {
        TOTAL as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // The latency is the subject: from a millisecond on, a worker enters the source without its turn.
        thread::sleep(Duration::from_millis(2));
        if Self::hangs(offset as usize / PAGE) {
            drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
        }
        fill(offset, into);
        Ok(())
    }
}

/// A worker that reads several faults while others arrive keeps its turn to read on. It must not
/// enter the source before that.
#[test]
fn a_slow_source_that_hangs_for_some_pages_delays_no_other_page_of_adopted_memory() {
    for workers in [1, 2, 4] {
        let (guest, source) = (Guest::new(&RANGES, false).unwrap(), Arc::new(Hanging::default()));
        let pool = Pool::builder().workers(workers).start().unwrap();
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source)));
        let region = builder.readahead(Readahead::None).build_adopted(adopt(&guest), &pool).unwrap();
        let delayed = scope(|scope| {
            let (send, served) = mpsc::channel();
            let delayed = (0..rounds(40) as usize).find_map(|group| {
                for page in group * GROUP..(group + 1) * GROUP {
                    let (guest, send) = (&guest, send.clone());
                    scope.spawn(move || {
                        assert_eq!(guest.read(page * PAGE), byte_at((page * PAGE) as u64));
                        let _ = send.send(page);
                    });
                }
                let served = (1..GROUP).map_while(|_| served.recv_timeout(HANG).ok()).count();
                (served < GROUP - 1).then(|| format!("group {group}: {served} pages, {:?}", pool.metrics()))
            });
            source.open();
            delayed
        });
        assert_eq!(delayed, None, "{workers} workers");
        region.finish().unwrap();
    }
}

#[test]
fn a_failing_source_is_a_signal_to_the_touching_thread_or_kills_the_owner() {
    let test = this_test!();
    for (loss, signal) in [(OnUnavailable::Poison, signal_of_lost_page()), (OnUnavailable::Kill, SIGKILL)] {
        let other = start_guest(test, |guest, _stream| {
            assert_eq!(guest.read(0), byte_at(0));
            println!("read a byte: {}", guest.read(400 * PAGE));
        });
        let source = Arc::new(Scripted::new(TOTAL as u64).failing(400 * PAGE as u64..401 * PAGE as u64));
        let region = Region::builder()
            .chunk(Chunk::source(source))
            .build_adopted(other.memory.on_unavailable(loss), &Pool::new().unwrap())
            .unwrap();
        let end = other.process.wait();
        assert!(!end.output().contains("read a byte"), "{}", end.output());
        assert_eq!(end.signal(), Some(signal), "{loss:?}: {}", end.output());
        // The kill comes before the poison marker, and the list of failures after both.
        until(|| region.failures().len() == 1);
        assert_eq!(region.failures()[0].0, 400 * PAGE as u64);
    }
}

#[test]
fn populate_after_the_end_of_the_owner_is_an_error_and_a_drop_is_not() {
    let other = start_guest(this_test!(), |_, stream| {
        wait_for_peer(&stream);
    });
    let GuestProcess { mut process, memory, .. } = other;
    let region = build(memory, &Pool::new().unwrap());
    region.populate(0..PAGE as u64).unwrap();
    process.kill();
    process.wait();
    let error = region.populate(..).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MemoryGone);
    assert_eq!(reason(&error), FailureReason::OwnerEnded, "{error}");
    drop(region);
}

#[test]
fn a_write_protect_fault_of_the_owner_is_released_by_the_server_and_by_a_drop() {
    for served in [true, false] {
        let guest = Guest::protectable(&RANGES).unwrap();
        let (pool, manual) = (Pool::new().unwrap(), pagestitch::Manual::new().unwrap());
        let builder = Region::builder().chunks(pieces());
        let region = if served {
            builder.build_adopted(adopt(&guest), &pool)
        } else {
            builder.build_adopted(adopt(&guest), &manual)
        }
        .unwrap();
        region.populate(..).unwrap();
        guest.protect().unwrap();
        scope(|scope| {
            let (send, writer_id) = mpsc::channel();
            let guest = &guest;
            let writer = scope.spawn(move || {
                send.send(gettid().as_raw()).unwrap();
                guest.write(5 * PAGE, 77);
            });
            if served {
                writer.join().unwrap();
            } else {
                let task = format!("/proc/self/task/{}/stat", writer_id.recv().unwrap());
                until(|| fs::read_to_string(&task).unwrap().contains(") S "));
                assert!(!writer.is_finished());
                drop(region);
                writer.join().unwrap();
            }
        });
        let expected = pattern(9, TOTAL);
        assert_eq!((guest.read(5 * PAGE), guest.read(5 * PAGE + 1)), (77, expected[5 * PAGE + 1]));
        assert!((0..TOTAL).step_by(1001).all(|at| at == 5 * PAGE || guest.read(at) == expected[at]));
        guest.write(700 * PAGE, 78);
        assert_eq!(guest.read(700 * PAGE), 78);
    }
}

#[test]
fn adopted_memory_of_this_process_is_served() {
    let guest = Guest::new(&RANGES, false).unwrap();
    let region = build(adopt(&guest), &Pool::new().unwrap());
    let expected = pattern(9, TOTAL);
    assert!((0..TOTAL).step_by(1001).all(|at| guest.read(at) == expected[at]));
    guest.write(5, 77);
    assert_eq!(guest.read(5), 77);
    region.finish().unwrap();
    assert_eq!(guest.read(TOTAL - 1), expected[TOTAL - 1]);
}

/// The kernel gives each fault to one of two regions, so that threads of the other region would
/// wait forever.
#[test]
fn a_userfaultfd_is_served_by_one_region_at_a_time() {
    let (guest, pool) = (Guest::new(&RANGES, false).unwrap(), Pool::new().unwrap());
    let [(first, _), (second, _)] = guest.ranges()[..] else { panic!("two ranges") };
    let build = |name: &str, start: usize, bytes: usize| {
        let memory = guest.memory_without_ranges().unwrap().range(start, bytes);
        let memory = memory.owner(Process::open(std::process::id()).unwrap());
        Region::builder().name(name).chunk(pattern(9, bytes)).build_adopted(memory, &pool)
    };
    let region = build("low", first, RANGES[0]).unwrap();
    // The kernel may lack kcmp(2) (CONFIG_KCMP), or a container may forbid it.
    let (one, same) = (guest.uffd(), guest.uffd().try_clone_to_owned().unwrap());
    if !pagestitch_kernel::process::is_same_file(one, same.as_raw_fd()) {
        return println!("SKIPPED {}: no kcmp(2)", this_test!());
    }
    let error = build("high", second, RANGES[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert_eq!(guest.read(5), pattern(9, 6)[5]);
    // finish() and no drop: before Linux 6.6, without poison markers, a drop kills the owner, which
    // is this process.
    region.finish().unwrap();
    let region = build("high", second, RANGES[1]).unwrap();
    assert_eq!(guest.read(RANGES[0] + 5), pattern(9, 6)[5]);
    region.finish().unwrap();
}

#[test]
fn a_hugetlb_guest_is_filled_a_huge_page_at_a_time() {
    const HUGE: usize = 2 << 20;
    let Some(_reserved) = HugePages::or_skip(this_test!(), 8) else { return };
    let other = start_guest_with(this_test!(), &[HUGE, 3 * HUGE], true, |guest, _stream| {
        let expected = pattern(4, 3 * HUGE);
        for at in [5, HUGE, 2 * HUGE + 4097, 3 * HUGE - 1] {
            assert_eq!(guest.read(at), expected[at], "byte {at}");
        }
        assert_eq!(guest.read(3 * HUGE + 5), 0, "a hole");
        guest.balloon(HUGE, HUGE).unwrap();
        assert_eq!(guest.read(HUGE + 1), 0, "a balloon");
    });
    let memory = other.memory.page_size(HUGE).unwrap();
    let region = Region::builder()
        .chunk(pattern(4, 3 * HUGE))
        .chunk(Chunk::hole(HUGE as u64))
        .build_adopted(memory, &Pool::new().unwrap())
        .unwrap();
    other.process.wait().expect_pass();
    assert_eq!(region.close().pages_installed(), 5);
}

#[test]
fn a_waiting_thread_of_a_hugetlb_guest_gets_a_signal_when_the_region_is_dropped() {
    const HUGE: usize = 2 << 20;
    let Some(_reserved) = HugePages::or_skip(this_test!(), 4) else { return };
    let other = start_guest_with(this_test!(), &[2 * HUGE], true, |guest, stream| {
        wait_for_peer(&stream);
        assert_eq!(guest.read(HUGE - 1), 3, "a filled page");
        println!("read a byte: {}", guest.read(HUGE));
    });
    // A manual that does not serve: the thread waits.
    let manual = pagestitch::Manual::new().unwrap();
    let memory = other.memory.page_size(HUGE).unwrap();
    let region = Region::builder().chunk(vec![3u8; 2 * HUGE]).build_adopted(memory, &manual).unwrap();
    region.populate(..HUGE as u64).unwrap();
    resume(&other.stream);
    until_a_thread_faults(other.process.id());
    drop(region);
    let end = other.process.wait();
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    assert_eq!(end.signal(), Some(signal_of_lost_page()), "{}", end.output());
}

#[test]
fn memory_that_cannot_be_adopted_is_refused_with_the_reason() {
    let pool = Pool::new().unwrap();
    let no_uffd = OwnedFd::from(File::open("/proc/self/exe").unwrap());
    let error = AdoptedMemory::new(no_uffd).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotUserfaultfd);
    let (socket, _) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::empty(),
    )
    .unwrap();
    assert_eq!(AdoptedMemory::new(socket).unwrap_err().kind(), ErrorKind::NotUserfaultfd);

    let guest = Guest::new(&RANGES, false).unwrap();
    let [(first, _), (second, _)] = guest.ranges()[..] else { panic!("two ranges") };
    let memory = || guest.memory_without_ranges().unwrap();
    let owned = || memory().owner(Process::open(std::process::id()).unwrap());
    let refused = |memory: AdoptedMemory| {
        let error = Region::builder().chunks(pieces()).build_adopted(memory, &pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOption, "{error}");
        error.option().expect("the option is named")
    };
    assert_eq!(refused(owned()), BuildOption::Range);
    for (start, bytes, more) in [
        (first, RANGES[0], None),
        (first + 1, RANGES[0], Some((second, RANGES[1]))),
        (first, RANGES[0], Some((first + PAGE, RANGES[1]))),
        (usize::MAX - PAGE + 1, PAGE, None),
    ] {
        let memory = owned().range(start, bytes);
        let memory = if let Some((start, bytes)) = more { memory.range(start, bytes) } else { memory };
        assert_eq!(refused(memory), BuildOption::Range);
    }
    let unowned =
        memory().on_unavailable(OnUnavailable::Kill).range(first, RANGES[0]).range(second, RANGES[1]);
    assert_eq!(refused(unowned), BuildOption::Owner);
    for bytes in [3000, 1 << 30] {
        assert_eq!(memory().page_size(bytes).unwrap_err().option(), Some(BuildOption::PageSize));
    }
    let whole = owned().range(first, RANGES[0]).range(second, RANGES[1]);
    let error = Region::builder().chunks(pieces()).build_adopted(whole, Inline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsuitableServer);
}

/// A fill would write to memory behind the safe code that has registered it.
#[test]
fn memory_of_this_process_is_refused_without_an_own_memory_promise() {
    let guest = Guest::new(&RANGES, false).unwrap();
    // A descriptor that comes through a socket is refused too, because the kernel tells whose
    // memory it is.
    let (ours, theirs) = UnixStream::pair().unwrap();
    fd_passing::send(&theirs, b"memory", &[guest.uffd()]).unwrap();
    let (_, mut received) = fd_passing::receive(&ours, &mut [0; 10]).unwrap();
    for uffd in [guest.uffd().try_clone_to_owned().unwrap(), received.pop().unwrap()] {
        let error = AdoptedMemory::new(uffd).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OwnMemory);
    }
}
