//! Regions of several shards: each shard has a userfaultfd, and calls that cross their borders work as
//! in a region of one shard.

use crate::application::free;
use crate::donated::pages_of;
use crate::lazy::chunk_of;
use crate::machine::{MAPPINGS_MAX, allows_too_many_mappings, rounds};
use crate::{PAGE, SIGBUS, SIGSEGV, discard, lacks_poison, pattern, touch, until};
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use pagestitch::source::{Donated, FileSource};
use pagestitch::{
    BuildOption, Chunk, ErrorKind, Limit, Manual, Placement, Pool, Readahead, Region, SharedRegion,
};
use pagestitch_kernel::memfd::UnsealedMemfd;
use pagestitch_kernel::{Access, Page, PageSize, View};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: usize = 2 << 20;
const SHARDS: usize = 4;
/// Pages of each kind. The borders of the shards are at other pages.
const PAGES: usize = 345;

fn pool() -> Pool {
    Pool::builder().workers(SHARDS).start().unwrap()
}

fn ranges(region: &Region) -> Vec<Range<u64>> {
    region.shards().into_iter().map(|shard| shard.range).collect()
}

/// The addresses of the first bytes of the shards.
fn starts(region: &Region) -> Vec<usize> {
    let start = region.as_ptr().expose_provenance().get();
    ranges(region).iter().map(|range| start + range.start as usize).collect()
}

/// Chunks of each kind of page that the kernel installs, and their bytes.
fn kinds() -> Vec<(Vec<Chunk>, Vec<u8>)> {
    let bytes = |seed| pattern(seed, PAGES * PAGE);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes(1)).unwrap();
    let donated = Donated::from(pages_of(&bytes(2)));
    let pieces = bytes(3).chunks(777).map(|piece| piece.to_vec().into()).collect();
    vec![
        (vec![FileSource::open(file.path()).unwrap().into()], bytes(1)),
        (vec![Arc::new(donated).into()], bytes(2)),
        (pieces, bytes(3)),
        (vec![Chunk::hole((PAGES * PAGE) as u64)], vec![0; PAGES * PAGE]),
        (vec![bytes(4).into()], bytes(4)),
        (vec![chunk_of(&bytes(5), true)], bytes(5)),
    ]
}

/// A region with a different kind of page at the borders for each rotation, and its bytes.
fn mixed(rotation: usize, readahead: Readahead, pool: &Pool) -> (SharedRegion, Vec<u8>) {
    let mut kinds = kinds();
    kinds.rotate_left(rotation);
    let (chunks, bytes): (Vec<_>, Vec<_>) = kinds.into_iter().unzip();
    let builder = Region::builder().chunks(chunks.into_iter().flatten()).shards(SHARDS).readahead(readahead);
    let region = builder.build_shared(pool).unwrap();
    assert_eq!(region.shards().len(), SHARDS);
    (region, bytes.concat())
}

/// Reads all bytes, from each page in another order for each thread.
fn read_by_all(region: &SharedRegion, expected: &[u8]) {
    let pages = expected.len() / PAGE;
    scope(|scope| {
        for thread in 0..SHARDS {
            scope.spawn(move || {
                let start = region.as_ptr().addr().get();
                for turn in 0..pages {
                    let page = (turn * (2 * thread + 1) + thread * pages / SHARDS) % pages;
                    assert_eq!(touch(start + page * PAGE), expected[page * PAGE], "page {page}");
                }
            });
        }
    });
    let start = region.as_ptr().addr().get();
    assert!((0..expected.len()).step_by(97).all(|at| touch(start + at) == expected[at]));
    assert!(region.failures().is_empty(), "{:?}", region.failures());
}

#[test]
fn pages_of_every_kind_are_filled_in_all_shards() {
    let pool = pool();
    for rotation in 0..kinds().len() {
        // Each kind lies at the borders in several rotations.
        let readahead = if rotation % 2 == 0 { Readahead::None } else { Readahead::Adaptive };
        let (region, expected) = mixed(rotation, readahead, &pool);
        region.as_ptr().expose_provenance();
        read_by_all(&region, &expected);
    }
}

#[test]
fn a_populate_crosses_the_borders_of_shards() {
    let pool = pool();
    for rotation in 0..kinds().len() {
        let (region, expected) = mixed(rotation, Readahead::Adaptive, &pool);
        region.as_ptr().expose_provenance();
        region.populate(..).unwrap();
        assert_eq!(region.metrics().faults, 0);
        read_by_all(&region, &expected);
    }
}

/// The child touches the first page of a shard, whose source fails.
#[test]
fn a_failed_page_is_a_signal_in_each_shard() {
    let test = this_test!();
    for shard in ["0", "1", "2", "3"] {
        let end = child::spawn(test, shard, |shard| {
            let source = Scripted::new((SHARDS * BLOCK) as u64).failing(0..u64::MAX);
            let builder = Region::builder().chunk(Chunk::source(Arc::new(source))).shards(SHARDS);
            let region = builder.build(&pool()).unwrap();
            let start = starts(&region)[shard.parse::<usize>().unwrap()];
            println!("read a byte: {}", touch(start));
        });
        let end = end.wait();
        assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
        assert!(!end.output().contains("read a byte"), "{}", end.output());
    }
}

/// Threads touch pages of all shards while others are discarded, also across the borders.
#[test]
fn discards_across_borders_lose_no_byte_while_all_shards_fault() {
    for reports in crate::REPORTS {
        let bytes = pattern(1, SHARDS * BLOCK);
        let builder = Region::builder()
            .chunk(bytes.clone())
            .keep_sources()
            .shards(SHARDS)
            .report_discards(reports)
            .readahead(Readahead::None);
        let region = builder.build(&pool()).unwrap();
        let (starts, done) = (starts(&region), AtomicBool::new(false));
        let (start, bytes) = (starts[0], &bytes);
        scope(|scope| {
            for thread in 0..SHARDS {
                let done = &done;
                scope.spawn(move || {
                    for turn in (0..).take_while(|_| !done.load(Ordering::Relaxed)) {
                        let page = (turn * 7 + thread * 512) % (SHARDS * 512);
                        assert_eq!(touch(start + page * PAGE), bytes[page * PAGE], "page {page}");
                    }
                });
            }
            for turn in 0..rounds(40) as usize {
                let pages = 1 + turn * 5 % 600;
                starts[1..]
                    .iter()
                    .for_each(|border| discard(border - pages * PAGE / 2 / PAGE * PAGE, pages * PAGE));
                discard(start, if turn % 10 == 0 { SHARDS * BLOCK } else { PAGE });
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!((0..bytes.len()).step_by(PAGE).all(|at| touch(start + at) == bytes[at]));
    }
}

#[test]
fn mremap_moves_pages_of_one_shard_and_is_refused_across_a_border() {
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        let bytes = pattern(2, SHARDS * BLOCK);
        let builder =
            Region::builder().chunk(bytes.clone()).keep_sources().shards(SHARDS).readahead(Readahead::None);
        let region = builder.build(&pool()).unwrap();
        let starts = starts(&region);
        assert_eq!(touch(starts[2] + 4 * PAGE), bytes[2 * BLOCK + 4 * PAGE]);
        let across = try_moved(starts[1] - PAGE, 2 * PAGE);
        assert_eq!(across.unwrap_err(), nix::errno::Errno::EFAULT);
        let to = try_moved(starts[2] + 3 * PAGE, 4 * PAGE).unwrap();
        assert_eq!(touch(to + PAGE), bytes[2 * BLOCK + 4 * PAGE], "a filled page");
        assert_eq!(touch(starts[2]), bytes[2 * BLOCK], "the rest is served as before");
        println!("so far so good");
        println!("read a byte: {}", touch(to));
    });
    assert!(end.output().contains("so far so good"), "{}", end.output());
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
}

/// Moves pages to free addresses.
#[expect(unsafe_code, reason = "mremap(2) by the application is part of the test")]
fn try_moved(start: usize, bytes: usize) -> nix::Result<usize> {
    let start = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: pages of a region, of which no slice is used any more.
    let to =
        unsafe { libc::mremap(start, bytes, bytes, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, free(bytes)) };
    if to == libc::MAP_FAILED { Err(nix::errno::Errno::last()) } else { Ok(to.expose_provenance()) }
}

#[test]
fn a_region_is_dropped_while_all_shards_fault() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(3, SHARDS * BLOCK);
        let builder =
            Region::builder().chunk(bytes.clone()).keep_sources().shards(SHARDS).readahead(Readahead::None);
        let region = builder.build(&pool()).unwrap();
        let (starts, bytes) = (starts(&region), &bytes);
        scope(|scope| {
            for (shard, start) in starts.into_iter().enumerate() {
                scope.spawn(move || {
                    for page in (0..512).cycle() {
                        let byte = touch(start + page * PAGE);
                        if byte != bytes[shard * BLOCK + page * PAGE] {
                            println!("a wrong byte: {byte}");
                        }
                    }
                });
            }
            until(|| region.metrics().faults > 200);
            drop(region);
        });
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(!end.output().contains("a wrong byte"), "{}", end.output());
}

#[test]
fn a_source_that_hangs_holds_up_one_worker_and_no_shard() {
    let held = 5 * PAGE as u64..6 * PAGE as u64;
    let source = Arc::new(Scripted::new((SHARDS * BLOCK) as u64).holding(held));
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).shards(SHARDS);
    let builder = builder.readahead(Readahead::None);
    let region = builder.build(&Pool::builder().workers(2).start().unwrap()).unwrap();
    scope(|scope| {
        let hangs = scope.spawn(|| region.as_slice()[5 * PAGE]);
        source.wait_until_held(1);
        for block in 0..SHARDS {
            for page in 10..30 {
                let at = block * BLOCK + page * PAGE;
                assert_eq!(region.as_slice()[at], byte_at(at as u64), "block {block}");
            }
        }
        source.release();
        assert_eq!(hangs.join().unwrap(), byte_at(5 * PAGE as u64));
    });
}

#[test]
fn replacements_serve_all_shards_while_their_workers_hang() {
    // The last page of one shard, and the first of the other.
    let held = (BLOCK - PAGE) as u64..(BLOCK + PAGE) as u64;
    let source = Arc::new(Scripted::new(2 * BLOCK as u64).holding(held.clone()));
    let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).shards(2);
    let pool = Pool::builder().workers(2).start().unwrap();
    let region = builder.readahead(Readahead::None).build(&pool).unwrap();
    let read = |at: u64| assert_eq!(region.as_slice()[at as usize], byte_at(at), "byte {at}");
    scope(|scope| {
        let hangs = [held.start, held.end - 1].map(|at| scope.spawn(move || read(at)));
        source.wait_until_held(2);
        for page in 10..30 {
            read(page * PAGE as u64);
            read((BLOCK as u64) + page * PAGE as u64);
        }
        assert!(hangs.iter().all(|thread| !thread.is_finished()));
        assert!(pool.metrics().replacements > 0, "{:?}", pool.metrics());
        source.release();
        hangs.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// Three threads fault in one shard without a pause. The only worker serves the others, too.
#[test]
fn a_busy_shard_does_not_starve_the_others() {
    for reports in crate::REPORTS {
        let bytes = pattern(4, SHARDS * BLOCK);
        let builder = Region::builder()
            .chunk(bytes.clone())
            .keep_sources()
            .shards(SHARDS)
            .report_discards(reports)
            .readahead(Readahead::None);
        let region = builder.build(&Pool::builder().workers(1).start().unwrap()).unwrap();
        let (starts, done, bytes) = (starts(&region), AtomicBool::new(false), &bytes);
        scope(|scope| {
            for thread in 0..3 {
                let (start, done) = (starts[0] + thread * 100 * PAGE, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        discard(start, 100 * PAGE);
                        (0..100).for_each(|page| assert_ne!(touch(start + page * PAGE), 0));
                    }
                });
            }
            for (shard, start) in starts.iter().enumerate().skip(1) {
                assert!(
                    (0..100).all(|page| touch(start + page * PAGE) == bytes[shard * BLOCK + page * PAGE])
                );
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn shards_are_whole_blocks_and_no_more_than_blocks() {
    let pool = pool();
    let build = |pages: usize, shards: usize| {
        Region::builder().chunk(Chunk::hole((pages * PAGE) as u64)).shards(shards).build(&pool).unwrap()
    };
    let block = BLOCK as u64;
    assert_eq!(ranges(&build(1, 1_000)), vec![0..PAGE as u64; 1]);
    assert_eq!(ranges(&build(3 * 512 - 1, 1_000)), [0..block, block..3 * block - PAGE as u64]);
    assert_eq!(ranges(&build(5 * 512, 2)), [0..2 * block, 2 * block..5 * block]);
    let error = Region::builder().chunk(vec![1u8]).shards(0).build(&pool).unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Shards)));
}

#[test]
fn a_small_machine_or_region_has_one_shard_by_default() {
    let region = Region::builder().chunk(Chunk::hole(BLOCK as u64)).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.shards().len(), 1);
    let few = Pool::builder().workers(2).start().unwrap();
    let region = Region::builder().chunk(Chunk::hole(1 << 30)).build(&few).unwrap();
    assert!(region.shards().len() <= 2);
}

#[test]
fn more_shards_than_descriptors_are_refused_with_the_limit() {
    let end = child::run(this_test!(), || {
        let pool = pool();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let build =
            |shards| Region::builder().name("wide").chunk(Chunk::hole(1 << 30)).shards(shards).build(&pool);
        let error = build(100).unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::LimitReached, Some(BuildOption::Shards)));
        assert_eq!(error.limit(), Some(Limit::Descriptors(64)), "{error}");
        assert_eq!(build(8).unwrap().as_slice()[1 << 29], 0, "no descriptor has leaked");
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(sanitized, ignore = "the sanitizer maps memory of its own, which does not fit the limit")]
fn more_shards_than_mappings_are_refused_with_the_limit() {
    let test = this_test!();
    if allows_too_many_mappings(test) {
        return;
    }
    let end = child::run(test, || {
        let pool = pool();
        let build = |shards| Region::builder().chunk(Chunk::hole(1 << 30)).shards(shards).build(&pool);
        let memfd = UnsealedMemfd::create("every", PAGE as u64).unwrap().seal().unwrap();
        let pages = NonZeroUsize::new(2 * MAPPINGS_MAX).unwrap();
        let (reservation, mut view) = View::reserve(pages, PageSize::system(), Access::ReadOnly).unwrap();
        // Maps every other page of a large range, until the process has no mappings left.
        let all = (0..MAPPINGS_MAX).all(|i| view.map(Page(i * 2).span(), &memfd, 0).is_ok());
        assert!(!all, "a mapping is left");
        let error = build(100).unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::LimitReached, Some(BuildOption::Shards)));
        drop((view, reservation));
        assert_eq!(build(100).unwrap().shards().len(), 100);
    });
    end.expect_pass();
}

#[test]
fn the_worker_of_each_shard_has_its_cpu() {
    let pool = Pool::builder().placement(Placement::Cpus(vec![0])).workers(3).start();
    let Ok(pool) = pool else { return println!("SKIPPED: CPU 0 is not allowed here") };
    let builder = || Region::builder().chunk(Chunk::hole((SHARDS * BLOCK) as u64)).shards(SHARDS);
    let region = builder().build(&pool).unwrap();
    assert!(region.shards().iter().all(|shard| shard.cpu == Some(0)));
    let region = builder().build(&Manual::new().unwrap()).unwrap();
    assert!(region.shards().iter().all(|shard| shard.cpu.is_none()));
}

/// As when CPUs are taken offline, or out of the cpuset of the process: the kernel moves the threads, also
/// those that serve a fault.
#[test]
fn workers_whose_cpus_are_taken_away_serve_from_another_cpu() {
    let pool = Pool::builder().placement(Placement::PerCpu).name("moved").start().unwrap();
    let bytes = pattern(6, SHARDS * BLOCK);
    let builder =
        Region::builder().chunk(bytes.clone()).keep_sources().shards(SHARDS).readahead(Readahead::None);
    let region = builder.build(&pool).unwrap();
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut one = CpuSet::new();
    let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu) == Ok(true)).unwrap();
    one.set(first).unwrap();
    let workers = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let workers = workers
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("moved/")));
    let (start, done, bytes) = (starts(&region)[0], &AtomicBool::new(false), &bytes);
    scope(|scope| {
        let reader = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                discard(start, SHARDS * BLOCK);
                (0..bytes.len())
                    .step_by(29 * PAGE)
                    .for_each(|at| assert_eq!(touch(start + at), bytes[at], "byte {at}"));
            }
        });
        until(|| region.metrics().faults > 100);
        let mut moved = 0;
        for worker in workers {
            let thread = worker.file_name().unwrap().to_str().unwrap().parse().unwrap();
            sched_setaffinity(Pid::from_raw(thread), &one).unwrap();
            moved += 1;
        }
        // A further worker serves instead of one that a slow machine holds up.
        assert!(moved >= pool.workers());
        let before = region.metrics().faults;
        until(|| region.metrics().faults > before + 100);
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
    assert!(region.as_slice() == bytes);
}

#[test]
fn forks_lose_no_byte_while_all_shards_fault() {
    let bytes = pattern(8, SHARDS * BLOCK);
    let builder =
        Region::builder().chunk(bytes.clone()).keep_sources().shards(SHARDS).readahead(Readahead::None);
    let region = builder.build(&pool()).unwrap();
    let (starts, done, bytes) = (starts(&region), &AtomicBool::new(false), &bytes);
    scope(|scope| {
        for (shard, &start) in starts.iter().enumerate() {
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    // Across the border with the next shard, if there is one.
                    discard(start + 412 * PAGE, if shard + 1 < SHARDS { 200 } else { 100 } * PAGE);
                    for page in 412..512 {
                        let at = shard * BLOCK + page * PAGE;
                        assert_eq!(touch(start + page * PAGE), bytes[at], "byte {at}");
                    }
                }
            });
        }
        until(|| region.metrics().faults > 100);
        assert!((0..10).all(|_| ForkedChild::start(|| 0).succeeds()));
        done.store(true, Ordering::Relaxed);
    });
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_manual_serves_all_shards() {
    let mut manuals = Manual::group(2).unwrap();
    let bytes = pattern(5, SHARDS * BLOCK);
    let region = Region::builder().chunk(bytes.clone()).shards(SHARDS).build(&manuals[0]).unwrap();
    scope(|scope| {
        let reader = scope.spawn(|| region.as_slice() == bytes);
        while !reader.is_finished() {
            manuals.iter_mut().for_each(|manual| assert!(manual.serve_ready(64) < 1_000));
        }
        assert!(reader.join().unwrap());
    });
    drop(region);
}
