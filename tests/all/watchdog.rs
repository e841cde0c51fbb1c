//! Faults that take too long: reported once, and timed out where that is declared.

use crate::{PAGE, SIGBUS, SetOnDrop, comes_true, touch, until};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pagestitch::source::{FailureReason, Fetch, Memory, Reply};
use pagestitch::{Builder, Chunk, Pool, PoolBuilder, Readahead, Region};
use pagestitch_kernel::Features;
use pagestitch_kernel::Uffd;
use pagestitch_kernel::uffd::FaultMode;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::memory::discard;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

fn hanging() -> Arc<Scripted> {
    Arc::new(Scripted::new(10 * PAGE as u64).holding(3 * PAGE as u64..4 * PAGE as u64))
}

#[test]
fn an_overdue_fault_is_counted_once() {
    let pool = Pool::builder().warn_after(Duration::from_millis(20)).start().unwrap();
    let source = Arc::new(Scripted::new(10 * PAGE as u64).holding(3 * PAGE as u64..5 * PAGE as u64));
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
    let region = builder.build(&pool).unwrap();
    let meter = region.meter();
    scope(|scope| {
        let first = scope.spawn(|| region.as_slice()[3 * PAGE]);
        until(|| meter.faults_overdue() == 1);
        // When a second fault is overdue, the watchdog has looked at the first one again.
        let second = scope.spawn(|| region.as_slice()[4 * PAGE]);
        until(|| meter.faults_overdue() >= 2);
        source.release();
        assert_eq!(first.join().unwrap(), byte_at(3 * PAGE as u64));
        assert_eq!(second.join().unwrap(), byte_at(4 * PAGE as u64));
    });
    assert_eq!(region.as_slice()[0], byte_at(0));
    drop(region);
    assert_eq!(pool.stop().unwrap().workers, Pool::new().unwrap().workers(), "the watchdog is no worker");
    assert_eq!((meter.faults_overdue(), meter.faults_timed_out()), (2, 0), "each fault once");
}

#[test]
fn a_timed_out_fault_is_a_signal_to_the_waiting_thread() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().fault_timeout(Duration::from_millis(30)).start().unwrap();
        let region = Region::builder().chunk(Chunk::source(hanging())).build(&pool).unwrap();
        println!("read a byte: {}", region.as_slice()[3 * PAGE]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}

/// The kernel waits in the page: it gets an error where a thread gets a signal. The source answers
/// later.
#[test]
fn a_late_answer_of_a_source_fills_the_timed_out_page() {
    if !waits_in_the_kernel() {
        return;
    }
    let source = hanging();
    let pool = Pool::builder().fault_timeout(Duration::from_millis(30)).start().unwrap();
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&pool).unwrap();
    let address = region.as_ptr().expose_provenance().get() + 3 * PAGE;
    let asked = thread::spawn(move || read_through_the_kernel(address));
    until(|| region.meter().faults_timed_out() == 1);
    let failed = region.failures();
    assert_eq!((failed.len(), failed[0].0), (1, 3 * PAGE as u64));
    assert_eq!(failed[0].1.reason(), FailureReason::TimedOut, "{}", failed[0].1);
    assert!(asked.join().unwrap().is_err());
    source.release();
    until(|| region.failures().is_empty());
    assert_eq!(touch(address), byte_at(3 * PAGE as u64));
    assert_eq!(region.close().faults_timed_out, 1);
}

/// The bytes of a region whose source hangs.
struct Lower(Arc<Region>);

impl AsRef<[u8]> for Lower {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// The worker of the adopted region hangs in a copy whose source page is missing, and blocks the
/// events of that region meanwhile. The watchdog must not wait for this worker.
#[test]
fn a_fault_times_out_beside_memory_that_cannot_be_read() {
    if !waits_in_the_kernel() {
        return;
    }
    let (slow, others) = (hanging(), hanging());
    let lower = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).readahead(Readahead::None);
    let lower = Arc::new(lower.build(&Pool::new().unwrap()).unwrap());
    let guest = Guest::new(&[10 * PAGE], false).unwrap();
    let start = guest.ranges()[0].0;
    // The kernel reports both faults in this order, and the only worker reads both.
    let waiting = |threads: usize| {
        let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", guest.uffd().as_raw_fd())).unwrap();
        about.lines().any(|line| line.strip_prefix("total:").is_some_and(|n| n.trim() == threads.to_string()))
    };
    let asked = [(3, 1), (6, 2)].map(|(page, threads)| {
        let asked = thread::spawn(move || read_through_the_kernel(start + page * PAGE));
        until(|| waiting(threads));
        asked
    });
    let pool = Pool::builder().workers(1).max_workers(1).fault_timeout(Duration::from_millis(50));
    let pool = pool.start().unwrap();
    let builder = Region::builder().chunk(Memory::new(Lower(Arc::clone(&lower)))).readahead(Readahead::None);
    let upper = builder.build_adopted(crate::guests::adopt(&guest), &pool).unwrap();
    let other = Region::builder().chunk(Chunk::source(Arc::clone(&others))).build(&pool).unwrap();
    let timed_out = all_time_out(&other, 1);
    let both = comes_true(|| upper.metrics().faults_timed_out == 2);
    [slow, others].iter().for_each(|source| source.release());
    assert!(timed_out && both, "{:?}", upper.metrics());
    assert!(asked.into_iter().all(|thread| thread.join().unwrap().is_err()));
}

/// True if a page can time out without a signal: a system call waits in the page and gets an error.
pub(crate) fn waits_in_the_kernel() -> bool {
    let mode = Uffd::open(Features::NONE).unwrap().mode();
    let waits = crate::signal_of_lost_page() == SIGBUS && mode == FaultMode::All;
    if !waits {
        println!(
            "SKIPPED: no poison markers (Linux 6.6), or an ordinary user, whose system calls do not wait for pages"
        );
    }
    waits
}

/// Reads a byte through the kernel, which waits in a missing page and gets an error where a thread
/// gets a signal.
pub(crate) fn read_through_the_kernel(address: usize) -> Result<usize, Errno> {
    let (mut byte, from) = ([0], [RemoteIoVec { base: address, len: 1 }]);
    process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut byte)], &from)
}

/// Reads a byte of each of the first pages through the kernel, a thread for each page. Waits until
/// all faults have timed out. True if each read fails.
fn all_time_out(region: &Region, pages: usize) -> bool {
    let start = region.as_ptr().expose_provenance().get();
    let small = || thread::Builder::new().stack_size(64 << 10);
    let ask =
        |page: usize| small().spawn(move || read_through_the_kernel(start + page * PAGE).is_err()).unwrap();
    let threads: Vec<_> = (0..pages).map(ask).collect();
    let given_up = || region.metrics().faults_timed_out as usize;
    comes_true(|| given_up() >= pages);
    assert_eq!(given_up(), pages);
    threads.into_iter().all(|thread| thread.join().unwrap())
}

/// Five faults of a source that hangs time out.
fn five_hang(pool: PoolBuilder, is_short: bool, builder: impl FnOnce(Builder) -> Builder) {
    if !waits_in_the_kernel() {
        return;
    }
    let pool = pool.fault_timeout(Duration::from_millis(60)).start().unwrap();
    let source = Arc::new(Scripted::new(10 * PAGE as u64).holding(0..10 * PAGE as u64));
    let chunk = Chunk::source(Arc::clone(&source));
    let region = builder(Region::builder().chunk(chunk).readahead(Readahead::None)).build(&pool).unwrap();
    let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| all_time_out(&region, 5)));
    source.release();
    assert!(all.expect("five faults time out"), "each waiting read fails");
    let shortages = pool.metrics().shortages;
    assert_eq!(shortages > 0, is_short, "{:?}", pool.metrics());
    // Pages that no worker had begun stay poisoned until a retry.
    until(|| {
        region.retry_failed(..).unwrap();
        region.failures().is_empty() && region.meter().in_flight() == 0
    });
    assert!((0..10).all(|page| region.as_slice()[page * PAGE] == byte_at((page * PAGE) as u64)));
}

#[test]
fn more_faults_than_workers_time_out() {
    five_hang(Pool::builder().workers(2), false, |builder| builder);
}

/// Faults that no worker has begun: queued, or not even read.
#[test]
fn faults_without_a_free_worker_time_out() {
    five_hang(Pool::builder().workers(2).max_workers(2), true, |builder| builder);
    five_hang(Pool::builder().workers(1).max_workers(1), true, |builder| builder);
}

#[test]
fn faults_that_wait_for_the_limit_of_their_region_time_out() {
    five_hang(Pool::builder().workers(3), false, |builder| builder.max_in_flight(1));
}

/// More faults wait than the queue holds, and the thread that reads them cannot make room.
#[test]
fn more_faults_of_an_inherited_region_than_the_queue_holds_time_out() {
    if !waits_in_the_kernel() {
        return;
    }
    let pool = Pool::builder().workers(1).max_workers(1).fault_timeout(Duration::from_millis(500));
    let pool = pool.start().unwrap();
    let source = Arc::new(Scripted::new(1100 * PAGE as u64).holding(0..u64::MAX));
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
    let region = match builder.inherit_on_fork().build(&pool) {
        Ok(region) => region,
        Err(error) => return println!("SKIPPED: {error}"),
    };
    let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| all_time_out(&region, 1100)));
    source.release();
    assert!(all.expect("all faults time out"), "each waiting read fails");
}

/// A source that keeps its replies and answers none.
struct Keeps(Mutex<Vec<Reply>>);

impl Fetch for Keeps {
    fn size(&self) -> u64 {
        200 * PAGE as u64
    }

    fn fetch(&self, _: u64, reply: Reply) {
        self.0.lock().unwrap().push(reply);
    }
}

#[test]
fn more_fetches_than_the_first_table_holds_time_out() {
    if !waits_in_the_kernel() {
        return;
    }
    let pool = Pool::builder().workers(2).fault_timeout(Duration::from_millis(60)).start().unwrap();
    let source = Arc::new(Keeps(Mutex::default()));
    let chunk = Chunk::fetch(Arc::clone(&source));
    let region = Region::builder().chunk(chunk).readahead(Readahead::None).build(&pool).unwrap();
    let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| all_time_out(&region, 100)));
    source.0.lock().unwrap().clear();
    assert!(all.expect("a hundred faults time out"), "each waiting read fails");
}

/// Time counts only while the watchdog itself runs, so that a stopped process times no fault out.
/// Time is the subject, so a clock measures it.
#[test]
fn no_fault_times_out_because_its_process_was_stopped() {
    let end = child::run(this_test!(), || {
        let limit = Duration::from_secs(1);
        let pool = Pool::builder().warn_after(limit).fault_timeout(limit).start().unwrap();
        let source = hanging();
        let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&pool).unwrap();
        scope(|scope| {
            let reader = scope.spawn(|| region.as_slice()[3 * PAGE]);
            source.wait_until_held(1);
            be_stopped_for(limit * 3);
            // The watchdog runs again at the same moment as this thread, and gets time to look at
            // the fault.
            thread::sleep(limit / 10);
            source.release();
            assert_eq!(reader.join().unwrap(), byte_at(3 * PAGE as u64));
        });
        let metrics = region.metrics();
        assert_eq!((metrics.faults_overdue, metrics.faults_timed_out), (0, 0));
    });
    end.expect_pass();
}

/// Stops this process. A child continues it.
fn be_stopped_for(time: Duration) {
    let parent = Pid::this();
    let wakes = ForkedChild::start(|| {
        let stopped = || {
            let stat = fs::read_to_string(format!("/proc/{parent}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().trim_start().starts_with('T')
        };
        until(stopped);
        thread::sleep(time);
        i32::from(kill(parent, Signal::SIGCONT).is_err())
    });
    kill(parent, Signal::SIGSTOP).unwrap();
    assert!(wakes.succeeds());
}

/// Three threads touch pages all the time, so that each worker has work in each second.
#[test]
fn a_worker_that_replaced_another_ends_while_the_pool_is_busy() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let held = hanging();
    let builder = Region::builder().readahead(Readahead::None).keep_sources();
    let (hanging, busy) = (builder.chunk(Chunk::source(Arc::clone(&held))), Region::builder());
    let busy = busy.chunk(vec![7; 3 * PAGE]).readahead(Readahead::None).keep_sources().build(&pool).unwrap();
    let hanging = hanging.build(&pool).unwrap();
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        let _is_over = SetOnDrop(&is_over);
        for page in 0..3 {
            let (busy, is_over) = (&busy, &is_over);
            scope.spawn(move || {
                while !is_over.load(Ordering::SeqCst) {
                    discard(busy, page * PAGE..(page + 1) * PAGE);
                    assert_eq!(busy.as_slice()[page * PAGE], 7);
                }
            });
        }
        scope.spawn(|| assert_eq!(hanging.as_slice()[3 * PAGE], byte_at(3 * PAGE as u64)));
        held.wait_until_held(1);
        until(|| pool.metrics().working > 1);
        held.release();
        until(|| pool.metrics().working == 1);
    });
}
