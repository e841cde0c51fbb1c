//! Sources that are released: the region is the only place of their bytes, and a page that is
//! discarded then is a signal or an error with the reason.

use crate::machine::rounds;
use crate::{PAGE, SIGBUS, SetOnDrop, cannot_inherit, discard, pattern, reason, touch, until};
use pagestitch::source::{FailureReason, Memory};
use pagestitch::{
    AnyRegion, Budget, BuildOption, Builder, Chunk, Eager, ErrorKind, Inline, Manual, OnFailure, Pool,
    Readahead, Region, Retry, SharedRegion,
};
use pagestitch_kernel::{Features, Support};
use pagestitch_testkit::scripted::Scripted;
use pagestitch_testkit::{child, this_test};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{fs, hint, thread};

/// An owner of bytes that counts its drop, and erases its bytes: a later read of them is seen.
struct Owner(Vec<u8>, Arc<AtomicUsize>);

impl Owner {
    fn chunk(bytes: &[u8], drops: &Arc<AtomicUsize>) -> Memory {
        Memory::new(Self(bytes.to_vec(), Arc::clone(drops)))
    }
}

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        hint::black_box(&mut self.0).fill(0);
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

fn builder() -> Builder {
    Region::builder().name("r").readahead(Readahead::None).release_sources()
}

fn pool() -> Pool {
    Pool::builder().workers(2).start().unwrap()
}

/// The private memory of this process.
fn anonymous_mib() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap() >> 10
}

// In processes of their own, because memory of other tests would be counted too.

#[test]
#[cfg_attr(sanitized, ignore = "memory of the sanitizer is counted")]
fn released_sources_leave_one_copy_of_the_bytes() {
    child::run(this_test!(), || {
        let before = anonymous_mib();
        let chunks = (0..64).map(|i| vec![i as u8 + 1; (1 << 20) + i * 100]);
        let builder = Region::builder().chunks(chunks);
        // The default since Linux 6.6.
        let has_poison = Support::current().has(Features::POISON);
        let builder = if has_poison { builder } else { builder.release_sources() };
        let region = builder.build(&pool()).unwrap();
        assert_eq!(region.kept_source_bytes(), region.len() as u64);
        let sources = anonymous_mib() - before;
        region.populate(..).unwrap();
        // A thread may still free the last ones.
        let mut populated = 0;
        until(|| {
            populated = anonymous_mib() - before;
            populated <= 64 + 12
        });
        println!("{sources} MiB of sources, {populated} MiB with the populated region");
        assert!(sources >= 64, "{sources} MiB became {populated} MiB");
        assert_eq!((region.kept_source_bytes(), region.metrics().bytes_released), (0, region.len() as u64));
        assert!((0..64).all(|i| region.as_slice()[region.offset_of(i).unwrap() as usize] == i as u8 + 1));
    })
    .expect_pass();
}

#[test]
#[cfg_attr(sanitized, ignore = "memory of the sanitizer is counted")]
fn sources_are_kept_on_demand_and_discarded_pages_filled_again() {
    child::run(this_test!(), || {
        let before = anonymous_mib();
        let builder = Region::builder().chunks((0..64).map(|_| vec![7u8; 1 << 20]));
        let region = builder.keep_sources().build(&pool()).unwrap();
        region.populate(..).unwrap();
        assert!(anonymous_mib() - before >= 128);
        assert_eq!(region.kept_source_bytes(), 64 << 20);
        discard(region.as_ptr().addr().get(), region.len());
        assert!(region.as_slice().iter().all(|&byte| byte == 7));
    })
    .expect_pass();
}

/// Two pages in each kind of owned memory.
fn all_owners(builder: Builder) -> Builder {
    builder
        .chunk(vec![7u8; PAGE])
        .chunk(vec![7u8; PAGE].into_boxed_slice())
        .chunk(Arc::<[u8]>::from(vec![7u8; PAGE]))
        .chunk("7".repeat(PAGE))
        .chunk([7u8; PAGE])
        .chunk(Memory::new(vec![7u8; PAGE]))
        .chunk(bytes::Bytes::from(vec![7u8; PAGE]))
}

#[test]
fn a_region_that_only_reads_releases_buffers_without_being_asked() {
    let all = 7 * PAGE as u64;
    // Without poison markers, a page that is swapped out may be taken for a lost one.
    let buffers = if Support::current().has(Features::POISON) { 5 * PAGE as u64 } else { 0 };
    let kept = |region: &AnyRegion| {
        region.populate(..).unwrap();
        (region.kept_source_bytes(), region.metrics().bytes_released)
    };
    let (server, manual) = (pool(), Manual::new().unwrap());
    let build = |builder: Builder| all_owners(builder).build(&server).unwrap();
    assert_eq!(kept(&build(Region::builder())), (all - buffers, buffers));
    let small = Region::builder().chunks([vec![7u8; PAGE - 1], vec![7u8; PAGE]]).build(&server).unwrap();
    assert_eq!(kept(&small), (2 * PAGE as u64 - 1 - buffers / 5, buffers / 5));
    let by_a_loop = all_owners(Region::builder()).build(&manual).unwrap();
    // The loop would wait for the allocator.
    assert_eq!(kept(&by_a_loop), (all, 0));
    assert_eq!(kept(&build(Region::builder().keep_sources().release_sources())), (0, all));
    // Where an application can have reasons to discard a page, it is filled again.
    assert_eq!(kept(&build(Region::builder().release_sources().keep_sources())), (all, 0));
    assert_eq!(kept(&build(Region::builder().writable())), (all, 0));
    for reports in crate::REPORTS {
        assert_eq!(kept(&build(Region::builder().report_discards(reports))), (all, 0));
    }
    assert_eq!(kept(&build(Region::builder().capacity(1 << 20))), (all, 0));
    let budget = Budget::bytes(64 << 20).unwrap();
    assert_eq!(kept(&build(Region::builder().budget(&budget))), (all, 0));
    let shared = all_owners(Region::builder()).build_shared(&server).unwrap();
    assert_eq!(kept(&shared), (all, 0));
    let inline = all_owners(Region::builder()).build(Inline).unwrap();
    assert_eq!(kept(&inline), (all, 0));
}

#[test]
fn bytes_are_replaced_while_sources_are_released() {
    let (drops, bytes) = (Arc::default(), pattern(12, 8 * PAGE));
    let chunks = [Owner::chunk(&bytes[..5 * PAGE], &drops), Owner::chunk(&bytes[5 * PAGE..], &drops)];
    let mut region = builder().chunks(chunks).build(&pool()).unwrap();
    let mut expected = bytes.clone();
    region.populate(..PAGE as u64).unwrap();
    // Before the release: the replaced pages count as missing until they have their new bytes.
    for (first, end) in [(1, 3), (4, 6)] {
        region.replace((first * PAGE) as u64..(end * PAGE) as u64, vec![9u8; (end - first) * PAGE]).unwrap();
        expected[first * PAGE..end * PAGE].fill(9);
    }
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    region.populate(..).unwrap();
    until(|| drops.load(Ordering::SeqCst) == 2);
    assert!(region.as_slice() == expected);
    // After it.
    region.replace(0..(2 * PAGE) as u64, vec![8u8; 2 * PAGE]).unwrap();
    region.discard((6 * PAGE) as u64..(7 * PAGE) as u64).unwrap();
    expected[..2 * PAGE].fill(8);
    expected[6 * PAGE..7 * PAGE].fill(0);
    assert!(region.as_slice() == expected);
    // A replacement is kept: its pages are filled again.
    discard(region.as_ptr().addr().get(), 2 * PAGE);
    assert!(region.as_slice() == expected);
    assert_eq!(region.failures().len(), 0);
}

/// The kernel drops the pages before a locked one, and those of a released source have no other bytes.
#[test]
#[cfg(not(sanitized))]
fn a_replacement_that_locked_pages_refuse_drops_no_page_of_a_released_source() {
    child::run(this_test!(), || {
        let bytes = pattern(13, 8 * PAGE);
        let mut region = builder().chunk(bytes.clone()).build(&pool()).unwrap();
        region.populate(..).unwrap();
        assert_eq!(region.kept_source_bytes(), 0);
        crate::lock_pages(&region[5 * PAGE..6 * PAGE]);
        let error = region.replace(..(8 * PAGE) as u64, vec![9u8; 8 * PAGE]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Kernel, "{error}");
        assert_eq!(region.discard(..).unwrap_err().kind(), ErrorKind::Kernel);
        assert!(region.as_slice() == bytes && region.failures().is_empty());
        region.replace(..(5 * PAGE) as u64, vec![9u8; 5 * PAGE]).unwrap();
        assert!(region[..5 * PAGE].iter().all(|&byte| byte == 9) && region[5 * PAGE..] == bytes[5 * PAGE..]);
    })
    .expect_pass();
}

#[test]
fn a_source_is_released_by_the_fault_of_its_last_page() {
    let (drops, bytes) = (Arc::default(), pattern(1, 40 * PAGE));
    let region = builder().chunk(Owner::chunk(&bytes, &drops)).build(&pool()).unwrap();
    // In an order in which the watched page is filled late, early and last.
    for page in (0..40).map(|i| (i * 17 + 3) % 40) {
        assert_eq!((drops.load(Ordering::SeqCst), region.kept_source_bytes()), (0, bytes.len() as u64));
        assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE]);
    }
    until(|| region.kept_source_bytes() == 0);
    // Few bytes wait for the next call, because to wake a thread for them costs as much as a fault.
    region.populate(..).unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    assert!(region.as_slice() == bytes);
    assert_eq!(region.close().bytes_released, bytes.len() as u64);
    assert_eq!(drops.load(Ordering::SeqCst), 1, "dropped once");
}

/// No call of the region or the pool comes after the touches.
#[test]
fn released_sources_are_freed_once_a_few_megabytes_wait() {
    let drops = Arc::default();
    let chunks = (0..16).map(|_| Owner::chunk(&[7; 1 << 20], &drops));
    let region = builder().chunks(chunks).build(&pool()).unwrap();
    assert!(region.as_slice().iter().step_by(PAGE).all(|&byte| byte == 7));
    until(|| drops.load(Ordering::SeqCst) >= 12);
    drop(region);
    // The thread may still free the last ones.
    until(|| drops.load(Ordering::SeqCst) == 16);
}

#[test]
fn many_small_sources_are_all_released_however_they_are_filled() {
    let (server, count) = (pool(), rounds(8_000));
    let fill: [fn(&Region); 4] = [
        |region| assert!(region.as_slice().iter().step_by(PAGE).all(|&byte| byte == 7)),
        |region| region.populate(..).unwrap(),
        |region| assert_eq!(region.prefetch(..).unwrap().wait().pages_failed, 0),
        |region| (0..region.len()).step_by(7 * PAGE).for_each(|at| assert_eq!(region[at], 7)),
    ];
    for fill in fill {
        let chunks = (0..count).map(|_| vec![7u8; PAGE]);
        let region = Region::builder().release_sources().chunks(chunks).build(&server).unwrap();
        fill(&region);
        region.populate(..).unwrap();
        until(|| region.metrics().bytes_released == count * PAGE as u64);
        assert_eq!(region.kept_source_bytes(), 0);
    }
}

#[test]
fn a_source_is_kept_until_the_pages_that_it_shares_are_present() {
    let drops = [const { AtomicUsize::new(0) }; 3].map(Arc::new);
    let bytes = pattern(2, 9000);
    let parts = [&bytes[..1000], &bytes[1000..8000], &bytes[8000..]];
    let chunks = parts.iter().zip(&drops).map(|(part, drops)| Owner::chunk(part, drops));
    let region = builder().chunks(chunks).build(&pool()).unwrap();
    let dropped = || drops.each_ref().map(|drops| drops.load(Ordering::SeqCst));
    region.populate(4096..4097).unwrap();
    assert_eq!(dropped(), [0, 0, 0]);
    region.populate(0..1).unwrap();
    // Pages 0 and 1 have all of their bytes.
    until(|| dropped() == [1, 1, 0]);
    region.populate(8192..8193).unwrap();
    until(|| dropped() == [1, 1, 1]);
    assert!(region.as_slice() == bytes);
}

#[test]
fn a_source_of_several_chunks_is_released_after_the_last_one() {
    let (drops, bytes) = (Arc::default(), pattern(3, 3 * PAGE));
    let memory = Owner::chunk(&bytes, &drops);
    let chunk = |pages: std::ops::Range<usize>| {
        Chunk::from(memory.clone()).range((pages.start * PAGE) as u64..(pages.end * PAGE) as u64)
    };
    let chunks = [chunk(2..3), Chunk::hole(PAGE as u64), chunk(0..1), chunk(2..3), chunk(0..2)];
    let region = builder().chunks(chunks).build(&pool()).unwrap();
    drop(memory);
    for page in [5, 0, 2, 4, 3] {
        assert_eq!(drops.load(Ordering::SeqCst), 0, "before page {page}");
        region.populate((page * PAGE) as u64..(page * PAGE + 1) as u64).unwrap();
    }
    // The hole does not count.
    until(|| drops.load(Ordering::SeqCst) == 1);
    let first = |page: usize| region.as_slice()[page * PAGE];
    assert_eq!(
        [0, 1, 2, 3, 4, 5].map(first),
        [2, 9, 0, 2, 0, 1].map(|page| *bytes.get(page * PAGE).unwrap_or(&0))
    );
}

#[test]
fn each_region_releases_its_own_share_of_a_source() {
    let shared: Arc<[u8]> = pattern(4, 5 * PAGE).into();
    let server = pool();
    let region = |builder: Builder| builder.chunk(Arc::clone(&shared)).build(&server).unwrap();
    let (first, second, keeping) =
        (region(builder()), region(builder()), region(Region::builder().keep_sources()));
    let owners = || Arc::strong_count(&shared);
    assert_eq!(owners(), 4);
    first.populate(..).unwrap();
    until(|| owners() == 3);
    assert_eq!(second.kept_source_bytes(), 5 * PAGE as u64);
    second.populate(..).unwrap();
    keeping.populate(..).unwrap();
    // One region keeps its sources.
    until(|| owners() == 2);
    for region in [&first, &second, &keeping] {
        assert!(*region.as_slice() == *shared);
    }
    discard(keeping.as_ptr().addr().get(), 5 * PAGE);
    assert!(*keeping.as_slice() == *shared);
}

#[test]
fn a_source_beside_a_failing_one_is_released_after_the_retry() {
    let (drops, bytes) = (Arc::default(), pattern(5, 6000));
    let failing = Arc::new(Scripted::new(3000).failing(0..1));
    let chunks = [Chunk::from(Owner::chunk(&bytes, &drops)), Chunk::source(Arc::clone(&failing))];
    let region = builder().chunks(chunks).build(&pool()).unwrap();
    region.populate(..).unwrap_err();
    assert_eq!((drops.load(Ordering::SeqCst), region.failures().len()), (0, 1));
    failing.repair();
    match region.retry_failed(..) {
        Ok(()) => until(|| drops.load(Ordering::SeqCst) == 1),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "before Linux 6.6: {error}"),
    }
}

#[test]
fn a_page_that_is_discarded_before_the_release_is_filled_again() {
    for reports in crate::REPORTS {
        let (drops, bytes) = (Arc::default(), pattern(6, 8 * PAGE));
        let region =
            builder().report_discards(reports).chunk(Owner::chunk(&bytes, &drops)).build(&pool()).unwrap();
        let start = region.as_ptr().addr().get();
        for _ in 0..5 {
            region.populate(..7 * PAGE as u64).unwrap();
            discard(start, 4 * PAGE);
            assert!(region.as_slice()[..7 * PAGE] == bytes[..7 * PAGE]);
        }
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        discard(start + PAGE, PAGE);
        // The event of the discard may not be in the table yet; the touch comes after it.
        assert_eq!(region.as_slice()[7 * PAGE], bytes[7 * PAGE]);
        until(|| {
            region.populate(..).ok();
            drops.load(Ordering::SeqCst) == 1
        });
    }
}

/// A region of six pages whose source is released, and of which page 2 is discarded.
fn discarded(chunk: impl FnOnce(Chunk) -> Chunk, bytes: &[u8], reports: bool) -> Region {
    let region =
        builder().report_discards(reports).chunk(chunk(Chunk::from(bytes.to_vec()))).build(&pool()).unwrap();
    region.populate(..).unwrap();
    assert_eq!(region.kept_source_bytes(), 0);
    discard(region.as_ptr().addr().get() + 2 * PAGE, PAGE);
    region
}

#[test]
fn a_page_that_is_discarded_after_the_release_is_an_error_with_the_reason() {
    for reports in crate::REPORTS {
        let bytes = pattern(7, 6 * PAGE);
        // No policy helps: another attempt finds the bytes no more, and zeros would be wrong.
        let policies = [OnFailure::Poison, OnFailure::Zeros, OnFailure::Retry(Retry::times(1000))];
        for policy in policies {
            let region = discarded(|chunk| chunk.on_failure(policy), &bytes, reports);
            let began = Instant::now();
            let error = region.read_at(0, &mut vec![0; bytes.len()]).unwrap_err();
            assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Released));
            assert!(began.elapsed() < Duration::from_secs(60), "retried");
            let error = region.retry_failed(..).unwrap_err();
            let unsupported = error.kind() == ErrorKind::Unsupported;
            assert!(unsupported || reason(&error) == FailureReason::Released, "{error}");
            until(|| region.retry_failed(..).is_err() && region.failures().len() == 1);
            let (offset, failure) = region.failures().remove(0);
            assert_eq!((offset, failure.chunk()), (2 * PAGE as u64, 0));
            for page in [0, 1, 3, 4, 5] {
                assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE]);
            }
        }
    }
}

#[test]
fn the_failure_names_the_chunk_whose_source_is_released() {
    for reports in crate::REPORTS {
        let drops = Arc::default();
        let chunks =
            [Chunk::hole(100), Chunk::from(Owner::chunk(&[7; 8000], &drops)).on_failure(OnFailure::Zeros)];
        let region = builder().report_discards(reports).chunks(chunks).build(&pool()).unwrap();
        region.populate(..).unwrap();
        discard(region.as_ptr().addr().get(), PAGE);
        let error = region.populate(..).unwrap_err();
        assert_eq!((error.chunk(), reason(&error)), (Some(1), FailureReason::Released), "{error}");
    }
}

#[test]
fn a_touch_of_a_page_that_is_discarded_after_the_release_is_sigbus() {
    let end = child::run(this_test!(), || {
        let region = discarded(|chunk| chunk, &pattern(8, 6 * PAGE), true);
        println!("read a byte: {}", touch(region.as_ptr().addr().get() + 2 * PAGE));
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

/// A page that is discarded is absent for readahead too, which must leave it to its first touch.
#[test]
fn readahead_of_a_lost_page_keeps_the_reason_for_its_touch() {
    for reports in crate::REPORTS {
        let bytes = pattern(9, 64 * PAGE);
        let region = Region::builder()
            .report_discards(reports)
            .chunk(bytes.clone())
            .release_sources()
            .build(&pool())
            .unwrap();
        region.populate(..).unwrap();
        discard(region.as_ptr().addr().get() + 20 * PAGE, PAGE);
        for page in (0..20).chain(21..64) {
            assert_eq!(region.as_slice()[page * PAGE], bytes[page * PAGE]);
        }
        until(|| region.populate(..).is_err_and(|error| reason(&error) == FailureReason::Released));
        assert_eq!(region.failures().len(), 1);
    }
}

#[test]
fn an_inline_region_releases_sources_when_it_is_populated() {
    let end = child::run(this_test!(), || {
        let (drops, bytes) = (Arc::default(), pattern(10, 20 * PAGE + 100));
        let builder = Region::builder().release_sources().chunk(Owner::chunk(&bytes, &drops));
        let region = builder.build(Inline).unwrap();
        assert!(region.as_slice() == bytes);
        assert_eq!(drops.load(Ordering::SeqCst), 0, "a signal handler frees nothing");
        region.populate(..).unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), region.kept_source_bytes()), (1, 0));
        discard(region.as_ptr().addr().get() + PAGE, PAGE);
        let error = region.populate(..).unwrap_err();
        assert_eq!(reason(&error), FailureReason::Released, "{error}");
        discard(region.as_ptr().addr().get() + 20 * PAGE, PAGE);
        println!("released");
        println!("read a byte: {}", touch(region.as_ptr().addr().get() + 20 * PAGE));
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(end.output().contains("released") && !end.output().contains("read a byte"), "{}", end.output());
}

/// A page that is discarded has its bytes from the memfd.
#[test]
fn an_eager_region_releases_all_sources_when_it_is_built() {
    let (drops, bytes) = (Arc::default(), pattern(11, 20 * PAGE + 100));
    let region =
        Region::builder().release_sources().chunk(Owner::chunk(&bytes, &drops)).build(Eager).unwrap();
    assert_eq!((drops.load(Ordering::SeqCst), region.kept_source_bytes()), (1, 0));
    assert_eq!(region.metrics().bytes_released, bytes.len() as u64);
    discard(region.as_ptr().addr().get(), 4 * PAGE);
    assert!(region.as_slice() == bytes);
}

#[test]
fn other_sources_are_kept() {
    static STATIC: [u8; 2 * PAGE] = [5; 2 * PAGE];
    let (server, lent) = (pool(), vec![6u8; 2 * PAGE]);
    let scripted = Arc::new(Scripted::new(2 * PAGE as u64));
    pagestitch::scope(|scope| {
        let region = scope
            .region()
            .borrow(&lent)
            .chunk(&STATIC[..])
            .chunk(Chunk::source(Arc::clone(&scripted)))
            .release_sources()
            .build(&server)
            .unwrap();
        assert_eq!(region.kept_source_bytes(), 0, "nothing is owned");
        region.populate(..).unwrap();
        discard(region.as_ptr().addr().get(), 6 * PAGE);
        region.populate(..).unwrap();
        assert_eq!((region.as_slice()[0], region.as_slice()[2 * PAGE]), (6, 5));
        assert_eq!(region.metrics().bytes_released, 0);
    });
    assert_eq!(Arc::strong_count(&scripted), 1);
}

#[test]
fn sources_of_forked_children_are_kept() {
    let children = Region::builder().chunk(vec![7u8; 5 * PAGE]).inherit_on_fork();
    let error = children.release_sources().build(&pool()).unwrap_err();
    assert_eq!(
        (error.kind(), error.option()),
        (ErrorKind::OptionConflict, Some(BuildOption::ReleaseSources))
    );
    let inherited = Region::builder().chunk(vec![7u8; 5 * PAGE]).inherit_on_fork().build(&pool());
    match inherited {
        Ok(region) => {
            region.populate(..).unwrap();
            assert_eq!(region.kept_source_bytes(), 5 * PAGE as u64);
        }
        Err(error) => assert!(cannot_inherit(&error), "{error}"),
    }
}

#[test]
fn a_panicking_destructor_of_a_released_source_ends_no_worker() {
    struct Bomb(Vec<u8>);
    impl AsRef<[u8]> for Bomb {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("a destructor");
        }
    }
    let region =
        builder().chunk(Memory::new(Bomb(vec![7; PAGE]))).chunk(vec![8u8; PAGE]).build(&pool()).unwrap();
    assert_eq!(region.as_slice()[0], 7);
    until(|| region.kept_source_bytes() == PAGE as u64);
    assert_eq!(region.as_slice()[PAGE], 8);
}

const SOURCES: usize = 12;
const PAGES: usize = 3;
const TOTAL: usize = SOURCES * PAGES * PAGE;

/// Pages are discarded while the last pages are filled: by callers, by workers for system calls, and
/// by both at once. A page has its bytes, or a source of it is released.
#[test]
fn pages_that_are_discarded_while_their_source_is_released_are_bytes_or_an_error() {
    let (server, mut all_lost) = (pool(), 0);
    for round in 0..24 {
        let bytes = pattern(round, TOTAL);
        let drops: Vec<Arc<AtomicUsize>> = (0..SOURCES).map(|_| Arc::default()).collect();
        let parts = bytes.chunks(PAGES * PAGE).zip(&drops);
        let chunks = parts.map(|(part, drops)| Chunk::from(Owner::chunk(part, drops)));
        // In every other region two sources meet in a page.
        let edge = round as usize % 2 * 100;
        let before = (edge > 0).then(|| Chunk::hole(edge as u64));
        let region = builder().chunks(before).chunks(chunks).build_shared(&server).unwrap();
        storm(&region, &bytes, edge);
        let lost = (0..TOTAL + edge).step_by(PAGE).filter(|&offset| is_lost(&region, offset)).count();
        // A lost page keeps the other source that it shares.
        until(|| edge > 0 && lost > 0 || region.kept_source_bytes() == 0);
        let dropped = || drops.iter().map(|drops| drops.load(Ordering::SeqCst)).sum::<usize>();
        let released = region.metrics().bytes_released as usize;
        until(|| dropped() * PAGES * PAGE == released);
        assert_eq!(released + region.kept_source_bytes() as usize, TOTAL);
        all_lost += lost;
    }
    println!("{all_lost} pages were discarded after their release");
}

/// Threads fill, read and discard pages for a moment.
fn storm(region: &SharedRegion, bytes: &[u8], edge: usize) {
    let (start, done) = (region.as_ptr().addr().get(), AtomicBool::new(false));
    thread::scope(|scope| {
        for seed in 1..4 {
            let (done, pages) = (&done, pattern(seed, 4096));
            scope.spawn(move || {
                for page in pages.iter().cycle().take_while(|_| !done.load(Ordering::SeqCst)) {
                    let at = usize::from(*page >> 1) * 97 % (TOTAL / PAGE) * PAGE;
                    let (offset, mut read) = ((edge + at) as u64, [0; 64]);
                    // A system call waits for a worker; `read_at` fills the page in this thread.
                    let is_read = match page % 8 {
                        1 | 3 => region.view().read_at(offset, &mut read).is_ok(),
                        _ => region.read_at(offset, &mut read).is_ok(),
                    };
                    assert!(!is_read || read == bytes[at..at + 64], "wrong bytes at {offset}");
                }
            });
        }
        let _done = SetOnDrop(&done);
        for page in pattern(bytes[0].into(), 40) {
            discard(start + usize::from(page >> 1) * 89 % (TOTAL / PAGE) * PAGE, PAGE);
            thread::yield_now();
        }
    });
}

/// True if a page was discarded after its release. Fills it otherwise.
fn is_lost(region: &SharedRegion, offset: usize) -> bool {
    let Err(error) = region.populate(offset as u64..offset as u64 + 1) else { return false };
    assert_eq!(reason(&error), FailureReason::Released, "{error}");
    true
}
