//! Teardown in each order of regions, pools, threads and children: right bytes, a signal or an
//! error, but never zeros and never a hang.

use crate::zero_copy::memfd;
use crate::{SIGSEGV, comes_true, discard, pattern, spawn_asleep, touch, until};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pagestitch::source::Pages;
use pagestitch::{Chunk, Error, ErrorKind, Inline, Method, Pool, Region};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

#[test]
fn a_waiting_thread_gets_a_signal_when_its_region_is_dropped() {
    let end = child::run(this_test!(), || {
        wait_in_dropped(
            |pool| Region::builder().chunk(pattern(1, 10_000)).build(pool).unwrap(),
            |region| region.as_ptr(),
        );
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}

/// A region whose addresses are mapped again right after its drop.
struct MappedAnew(Option<Region>);

impl Drop for MappedAnew {
    fn drop(&mut self) {
        let Some(region) = self.0.take() else { return };
        let (start, bytes) = (region.as_ptr().addr(), region.len());
        drop(region);
        map_zeros(Some(start), bytes);
    }
}

/// The waiting thread runs only after the drop, when another mapping could have its address.
#[test]
fn a_waiting_thread_of_a_dropped_region_does_not_read_the_next_mapping_there() {
    let test = this_test!();
    for _ in 0..if child::is_child(test) { 1 } else { 40 } {
        let end = child::run(test, || {
            const PAGES: usize = 20;
            wait_in_dropped(
                |pool| {
                    // Threads that start from here on share one CPU, so that the woken thread runs
                    // late.
                    let mut one = CpuSet::new();
                    one.set(0).unwrap();
                    let _ = sched_setaffinity(Pid::from_raw(0), &one);
                    MappedAnew(Region::builder().chunk(pattern(1, PAGES * 4096)).build(pool).ok())
                },
                |region| region.0.as_ref().unwrap().as_ptr(),
            );
        });
        assert!(!end.output().contains("read a byte"), "{}", end.output());
        assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    }
}

/// Maps zeros for good, at `start` if it is free, else at free addresses.
#[expect(unsafe_code, reason = "mmap(2) by the application is part of the test")]
fn map_zeros(start: Option<NonZeroUsize>, bytes: usize) {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let bytes = NonZeroUsize::new(bytes).unwrap();
    // SAFETY: a new mapping that replaces nothing, because the address is a hint.
    unsafe { mmap_anonymous(start, bytes, ProtFlags::PROT_READ, flags) }.unwrap();
}

/// A dropped region frees its addresses. Addresses that are kept closed for a moment are freed
/// where addresses are short.
#[test]
#[cfg_attr(sanitized, ignore = "the sanitizer maps memory of its own, which does not fit the limit")]
fn addresses_of_dropped_regions_are_free_again_where_they_are_short() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(1).start().unwrap();
        let hard = getrlimit(Resource::RLIMIT_AS).unwrap().1;
        setrlimit(Resource::RLIMIT_AS, 64 << 30, hard).unwrap();
        let chunks = || [Chunk::from(pattern(1, 10_000)), Chunk::hole(20 << 30)];
        let region = Region::builder().chunks(chunks()).build(&pool).unwrap();
        assert_eq!(region.as_slice()[..10_000], pattern(1, 10_000));
        drop(region);
        // No thread waited, so the addresses are free at once.
        map_zeros(None, 50 << 30);
        setrlimit(Resource::RLIMIT_AS, 114 << 30, hard).unwrap();
        for _ in 0..20 {
            let region = Region::builder().chunks(chunks()).build(Inline).unwrap();
            assert_eq!(region.as_slice()[..10_000], pattern(1, 10_000));
        }
    });
    end.expect_pass();
}

#[test]
fn a_thread_in_a_minor_fault_gets_a_signal_when_its_region_is_dropped() {
    wait_in_lazy(this_test!(), true);
}

#[test]
fn a_thread_in_a_missing_page_of_a_memfd_gets_a_signal_when_its_region_is_dropped() {
    wait_in_lazy(this_test!(), false);
}

fn wait_in_lazy(test: &str, filled: bool) {
    let end = child::run(test, || {
        let chunk = crate::lazy::chunk_of(&pattern(2, 12_288), filled);
        let build = |pool: &Pool| Region::builder().chunk(chunk).build_shared(pool).unwrap();
        wait_in_dropped(build, |region| region.as_ptr());
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
}

/// The only worker is held by another region, so that the fault is not even read when the region is
/// dropped.
fn wait_in_dropped<R>(build: impl FnOnce(&Pool) -> R, start: impl FnOnce(&R) -> NonNull<u8>) {
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let slow = Arc::new(Scripted::new(10).holding(0..1));
    let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
    let region = build(&pool);
    let start = start(&region).expose_provenance().get();
    scope(|scope| {
        scope.spawn(|| other.as_slice()[0]);
        slow.wait_until_held(1);
        spawn_asleep(scope, move || println!("read a byte: {}", touch(start + 5000)));
        drop(region);
        slow.release();
    });
}

/// The region is dropped while its source is read.
#[test]
fn a_drop_waits_for_the_source_that_is_being_read() {
    let source = Arc::new(Scripted::new(10).holding(0..1));
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
    scope(|scope| {
        let (send, populated) = mpsc::channel();
        let region = Arc::new(region);
        let reader = Arc::clone(&region);
        scope.spawn(move || send.send(reader.populate(..).map(|()| reader.as_slice()[0])).unwrap());
        source.wait_until_held(1);
        drop(region);
        source.release();
        assert_eq!(populated.recv().unwrap().unwrap(), byte_at(0));
    });
    assert_eq!(Arc::strong_count(&source), 1, "no thread holds the source any more");
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer may lie where the region was")]
fn touching_a_dropped_region_is_a_signal() {
    let end = child::run(this_test!(), || {
        let region = Region::builder().chunk(pattern(1, 8192)).build(&Pool::new().unwrap()).unwrap();
        let start = region.as_ptr().expose_provenance().get();
        drop(region);
        println!("read a byte: {}", touch(start));
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
}

#[test]
fn a_forked_child_gets_a_signal_and_not_zeros() {
    let end = child::run(this_test!(), || {
        let region = Region::builder().chunk(pattern(1, 8192)).build(&Pool::new().unwrap()).unwrap();
        let address = region.as_ptr().expose_provenance().get();
        let ended = ForkedChild::start(|| i32::from(touch(address + 4096))).wait();
        assert_eq!(ended.signal(), Some(Signal::SIGSEGV as i32), "{ended}");
        assert_ne!(region.as_slice()[4096], 0, "the parent is served as before");
    });
    end.expect_pass();
}

#[test]
fn a_forked_child_reads_its_parents_region_with_an_error_of_its_own() {
    let end = child::run(this_test!(), || {
        let builder = || Region::builder().chunk(pattern(1, 8192)).writable();
        for region in [builder().build_shared(&Pool::new().unwrap()), builder().build_shared(Inline)] {
            let region = region.unwrap();
            let refused =
                |result: Result<(), Error>| result.is_err_and(|error| error.kind() == ErrorKind::ForkedChild);
            let is_refused = ForkedChild::start(|| {
                let calls =
                    [region.populate(..), region.read_at(0, &mut [0; 10]), region.write_at(4096, &[0])];
                i32::from(!calls.into_iter().all(refused))
            });
            assert!(is_refused.succeeds());
        }
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "a child of fork(2) is ended when it drops a thread of its parent")]
fn a_forked_child_that_drops_a_region_leaves_the_parents_alone() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(5, 50_000);
        let pool = Pool::builder().workers(2).start().unwrap();
        let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
        assert_eq!(region.as_slice()[0], bytes[0]);
        let dropped = ForkedChild::start(|| {
            // SAFETY: the parent keeps its own values. These are the child's copies, dropped once.
            #[expect(unsafe_code, reason = "a child whose stack unwinds past the fork does this")]
            drop(unsafe { std::ptr::read(&raw const region) });
            // SAFETY: as above.
            #[expect(unsafe_code, reason = "a child whose stack unwinds past the fork does this")]
            drop(unsafe { std::ptr::read(&raw const pool) });
            0
        });
        assert!(dropped.succeeds());
        assert!(region.as_slice() == bytes, "the parent is served as before");
        assert!(pool.clone().stop().is_err(), "and its pool knows the region");
    });
    end.expect_pass();
}

/// The addresses of a region and of donated pages stay closed in a child, except for pages that are
/// shown in place.
#[test]
fn a_mapping_of_a_forked_child_never_lands_where_its_parents_region_is() {
    let end = child::run(this_test!(), || {
        const PAGES: usize = 20;
        let bytes = pattern(9, PAGES * 4096);
        let pool = Pool::builder().workers(1).start().unwrap();
        let copied = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
        let shown = || [Chunk::from(vec![7u8; 5 * 4096]), memfd(&bytes).into(), vec![7u8; 5 * 4096].into()];
        let partly = Region::builder().chunks(shown()).build(&pool).unwrap();
        let donated = Pages::new(PAGES * 4096).unwrap();
        let start = |bytes: &[u8]| bytes.as_ptr().expose_provenance();
        let (first, second, third) =
            (copied.as_ptr().addr().get(), partly.as_ptr().addr().get(), start(&donated));
        let in_place = second + 5 * 4096;
        assert_eq!(partly.plan().runs()[1].method, Method::Map);
        // 0 for a page that the child finds in place, a signal for the others.
        let after_mapping = |address: usize, expected: u8| {
            ForkedChild::start(move || {
                map_zeros(NonZeroUsize::new(address & !4095), 4096);
                (0..2000).for_each(|_| map_zeros(None, PAGES * 4096));
                i32::from(touch(address) != expected)
            })
        };
        for address in
            [first, first + (PAGES - 1) * 4096, second, in_place - 1, in_place + PAGES * 4096, third]
        {
            let ended = after_mapping(address, 0).wait();
            assert_eq!(ended.signal(), Some(Signal::SIGSEGV as i32), "{ended}");
        }
        for at in [0, 4096, (PAGES - 1) * 4096] {
            assert!(after_mapping(in_place + at, bytes[at]).succeeds(), "shown in place");
        }
        assert!(copied.as_slice() == bytes, "the parent is served as before");
    });
    end.expect_pass();
}

/// Parent and child are each pid 1 of a PID namespace, so that both have the same pid.
#[test]
#[cfg_attr(sanitized = "thread", ignore = "a child of fork(2) is ended when it drops a thread of its parent")]
fn a_child_with_the_number_of_its_parent_leaves_the_parents_region_alone() {
    let test = this_test!();
    let end = child::run(test, || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWPID) {
            println!("SKIPPED {test}: a PID namespace cannot be made here ({errno})");
            return;
        }
        let parent = ForkedChild::start(|| {
            let bytes = pattern(8, 50_000);
            let pool = Pool::builder().workers(1).start().unwrap();
            let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
            let inline = Region::builder().chunk(bytes.clone()).build(Inline).unwrap();
            unshare(CloneFlags::CLONE_NEWPID).unwrap();
            let number = std::process::id();
            let left_alone = ForkedChild::start(|| {
                drop(copy_of(&region));
                drop(copy_of(&inline));
                drop(copy_of(&pool));
                i32::from(std::process::id() != number)
            });
            // No panic, because it would unwind into the forked copy of the test.
            let right = left_alone.succeeds() && region.as_slice() == bytes && inline.as_slice() == bytes;
            i32::from(!right)
        });
        let id = Pid::from_raw(parent.id().cast_signed());
        assert_eq!(ended_in_time(id), WaitStatus::Exited(id, 0), "the parent is served as before");
    });
    end.expect_pass();
}

/// Waits for a child, and kills it if it hangs: pid 1 of a namespace cannot set an alarm for
/// itself.
fn ended_in_time(child: Pid) -> WaitStatus {
    let mut status = WaitStatus::StillAlive;
    let ended = comes_true(|| {
        status = waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap();
        status != WaitStatus::StillAlive
    });
    if ended {
        return status;
    }
    kill(child, Signal::SIGKILL).unwrap();
    waitpid(child, None).unwrap()
}

/// The child's own copy of a value of its parent.
#[expect(unsafe_code, reason = "a child whose stack unwinds past the fork does this")]
const fn copy_of<T>(value: &T) -> T {
    // SAFETY: the parent keeps its own value. This is the child's copy, dropped once.
    unsafe { std::ptr::read(&raw const *value) }
}

#[test]
fn a_forked_child_builds_an_inline_region_during_faults_of_its_parent() {
    let name = this_test!();
    let end = child::run(name, || {
        let bytes = pattern(6, 200 * 4096);
        let busy = Region::builder().chunk(bytes.clone()).build(Inline).unwrap();
        let done = AtomicBool::new(false);
        scope(|scope| {
            // A thread that is inside the signal handler at most forks.
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    assert!(busy.as_slice() == bytes);
                    discard(busy.as_ptr().addr().get(), 200 * 4096);
                }
            });
            for _ in 0..20 {
                let child = ForkedChild::start(|| {
                    let own = Region::builder().chunk(bytes.clone()).build(Inline).unwrap();
                    i32::from(own.as_slice() != bytes)
                });
                assert!(child.succeeds());
            }
            done.store(true, Ordering::SeqCst);
        });
    });
    end.expect_pass();
}

#[test]
fn a_region_outlives_the_handle_of_its_pool() {
    let bytes = pattern(2, 100_000);
    let pool = Pool::builder().workers(1).start().unwrap();
    let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
    drop(pool);
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_pool_with_regions_refuses_to_stop() {
    let pool = Pool::new().unwrap();
    let region = Region::builder().name("kept").chunk(vec![5u8; 10]).build(&pool).unwrap();
    let error = pool.clone().stop().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert_eq!(region.as_slice()[0], 5);
    drop(region);
    assert_eq!(pool.stop().unwrap().faults, 1);
}

#[test]
fn a_leaked_region_stays_served() {
    let bytes = pattern(3, 100_000);
    let region = Region::builder().chunk(bytes.clone()).build(&Pool::new().unwrap()).unwrap();
    let leaked: &'static Region = Box::leak(Box::new(region));
    assert!(leaked.as_slice() == bytes);
}

#[test]
#[cfg_attr(sanitized, ignore = "mappings of the sanitizer are counted")]
fn dropped_regions_leave_no_descriptors_threads_or_mappings() {
    let end = child::run(this_test!(), || {
        // On a loaded machine, replacements of workers take further arenas of the allocator.
        let few_workers = || Pool::builder().workers(3).max_workers(3).start().unwrap();
        let round = || {
            let pool = few_workers();
            let regions: Vec<_> = (0..20)
                .map(|seed| Region::builder().chunk(pattern(seed, 20_000)).build(&pool).unwrap())
                .collect();
            regions.iter().for_each(|region| assert_ne!(region.as_slice()[7000], 0));
        };
        let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let maps = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        (0..20).for_each(|_| round());
        until(|| count("task") <= 2);
        let before = (count("fd"), count("task"));
        (0..20).for_each(|_| round());
        assert_eq!(count("fd"), before.0, "descriptors");
        // A joined thread may be listed for a moment longer.
        until(|| count("task") <= before.1);
        // The allocator takes more arenas, and the C library keeps more stacks, when more threads meet.
        // Both have a limit. A leak of one mapping in each round has none.
        until(|| {
            let before = maps();
            (0..20).for_each(|_| round());
            maps() <= before + 4
        });
    });
    end.expect_pass();
}

#[test]
fn a_source_that_owns_the_last_region_of_another_pool_can_be_dropped() {
    struct Nested(Region);
    impl pagestitch::Source for Nested {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
            self.0.read_at(offset, into).map_err(std::io::Error::other)
        }
    }
    let bytes = pattern(4, 30_000);
    let below = Region::builder().chunk(bytes.clone()).build(&Pool::new().unwrap()).unwrap();
    let above =
        Region::builder().chunk(Chunk::source(Arc::new(Nested(below)))).build(&Pool::new().unwrap()).unwrap();
    assert!(above.as_slice() == bytes);
}

/// A fault of the region is queued for the only worker, which another source holds.
#[test]
fn a_dropped_region_leaves_no_source_alive_in_a_queue() {
    if !crate::watchdog::waits_in_the_kernel() {
        return;
    }
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let hanging = Arc::new(Scripted::new(4096).holding(0..1));
    let held = Region::builder().chunk(Chunk::source(Arc::clone(&hanging))).build(&pool).unwrap();
    let source = Arc::new(Scripted::new(10 * 4096));
    let alive = Arc::downgrade(&source);
    let region = Region::builder().chunk(Chunk::source(source)).build(&pool).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| held.as_slice()[0]);
        hanging.wait_until_held(1);
        let address = region.as_ptr().expose_provenance().get();
        let asks = scope.spawn(move || crate::watchdog::read_through_the_kernel(address));
        until(|| region.meter().in_flight() == 1);
        drop(region);
        let is_alive = alive.upgrade().is_some();
        let asked = asks.join().unwrap();
        hanging.release();
        assert_eq!(reader.join().unwrap(), byte_at(0));
        assert!(asked.is_err(), "the waiting system call fails");
        assert!(!is_alive, "the source went with its region");
    });
}

/// Sources that own the pool that serves them, while the watchdog looks at them.
#[test]
fn a_source_may_own_the_last_handle_of_its_own_pool() {
    let end = child::run(this_test!(), || {
        for _ in 0..30 {
            let pool = Pool::builder().workers(2).warn_after(Duration::ZERO).start().unwrap();
            let source = Arc::new(Owns(pool.clone()));
            let region = Region::builder().chunk(Chunk::source(source)).build(&pool).unwrap();
            drop(pool);
            assert_eq!(region.as_slice()[0], 7);
            drop(region);
        }
    });
    end.expect_pass();
}

struct Owns(Pool);

impl pagestitch::Source for Owns {
    fn size(&self) -> u64 {
        self.0.workers() as u64 * 4096
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(7);
        Ok(())
    }
}
