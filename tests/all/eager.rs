//! Regions without userfaultfd: the build fills them, and each promise of a region holds.

use crate::machine::become_ordinary_user;
use crate::zero_copy::memfd;
use crate::{PAGE, SIGBUS, SIGSEGV, discard, pattern, reason, touch};
use nix::sys::resource::{Resource, setrlimit};
use pagestitch::source::{Cached, FailureReason, Fetch, FileSource, Memory, Pages, Reply, SharedFile};
use pagestitch::{
    Access, Chunk, Eager, Error, ErrorKind, Limit, Method, OnFailure, PlanReason, Pool, Region, Retry,
    Source, best_server,
};
use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::deny_userfaultfd;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scripted::{Scripted, byte_at, fill};
use pagestitch_testkit::{child, this_test};
use proptest::prelude::*;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

fn scripted(pages: usize) -> Scripted {
    Scripted::new((pages * PAGE) as u64)
}

fn page(number: usize) -> std::ops::Range<u64> {
    (number * PAGE) as u64..((number + 1) * PAGE) as u64
}

/// The bytes of a scripted source.
fn bytes(pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE];
    fill(0, &mut bytes);
    bytes
}

/// A fetch that answers at once, with a pattern.
struct Prompt(Vec<u8>);

impl Fetch for Prompt {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        let bytes = &self.0[offset as usize..offset as usize + reply.len()];
        reply.answer(bytes);
    }

    fn name(&self) -> String {
        String::from("prompt")
    }
}

/// Chunks of all kinds that give slices, at odd offsets, with their bytes.
fn all_kinds() -> (Vec<Chunk>, Vec<u8>) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(2, 70_000)).unwrap();
    let mut donated = Pages::new(3 * PAGE).unwrap();
    donated.copy_from_slice(&pattern(5, 3 * PAGE));
    let parts: Vec<(Chunk, Vec<u8>)> = vec![
        (pattern(1, 100_000).into(), pattern(1, 100_000)),
        (
            Chunk::from(FileSource::open(file.path()).unwrap()).range(7..60_000),
            pattern(2, 70_000)[7..60_000].into(),
        ),
        (Chunk::hole(200_000), vec![0; 200_000]),
        (memfd(&pattern(3, 50_000)).into(), pattern(3, 50_000)),
        (Chunk::hole(5), vec![0; 5]),
        (Chunk::source(Arc::new(scripted(40))), bytes(40)),
        (donated.into(), pattern(5, 3 * PAGE)),
        (Chunk::fetch(Arc::new(Prompt(pattern(6, 3_000_000)))), pattern(6, 3_000_000)),
        (Chunk::source(Arc::new(Cached::new(scripted(20), 1 << 20).block(65_536))), bytes(20)),
        (Chunk::hole(3_000_001), vec![0; 3_000_001]),
    ];
    let (chunks, expected): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    (chunks, expected.concat())
}

#[test]
fn a_region_of_all_kinds_of_chunks_has_their_bytes() {
    let (chunks, expected) = all_kinds();
    let region = Region::builder().chunks(chunks).build(Eager).unwrap();
    assert!(region.as_slice() == expected);
    let mut part = vec![0; 300_000];
    region.read_at(40_001, &mut part).unwrap();
    assert!(part == expected[40_001..340_001]);
    region.populate(..).unwrap();
    let prefetch = region.prefetch(..).unwrap();
    assert!(prefetch.is_done() && prefetch.wait().pages_failed == 0);
    assert!(region.failures().is_empty() && region.serves_system_calls());
    let metrics = region.metrics();
    assert_eq!((metrics.faults, metrics.pages_poisoned), (0, 0));
    assert_eq!(metrics.pages_installed() + metrics.pages_in_place, expected.len().div_ceil(PAGE) as u64);
    let coverage = region.meter().coverage(7);
    assert!(coverage.iter().all(|part| part.present == part.pages), "{coverage:?}");
}

#[test]
fn whole_pages_of_a_memfd_are_mapped_and_the_rest_is_filled() {
    let sealed = memfd(&pattern(3, 10 * PAGE));
    let region =
        Region::builder().chunk(sealed.clone()).chunk(vec![1; 10]).chunk(sealed).build(Eager).unwrap();
    let metrics = region.metrics();
    assert_eq!((metrics.pages_in_place, metrics.pages_installed()), (10, 11));
    let methods: Vec<_> = region.plan().runs().iter().map(|run| run.method).collect();
    assert_eq!(methods, [Method::Map, Method::Copy, Method::Copy]);
    let (plan, shown) = (region.plan(), region.plan().to_string());
    assert!(plan.staged().is_err_and(|reason| shown.contains(reason)), "{shown}");
}

#[test]
fn a_shared_region_maps_files_and_fills_the_rest() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(2, 5 * PAGE)).unwrap();
    let shared = SharedFile::open(file.path(), Access::ReadOnly).unwrap();
    let region = Region::builder().chunk(shared).chunk(pattern(4, 3 * PAGE)).build_shared(Eager).unwrap();
    let mut seen = vec![0; 8 * PAGE];
    region.read_at(0, &mut seen).unwrap();
    assert!(seen == [pattern(2, 5 * PAGE), pattern(4, 3 * PAGE)].concat());
    assert_eq!(region.metrics().pages_in_place, 5);
}

#[test]
fn writes_stay_in_the_region() {
    let memory = Memory::from(pattern(1, 3 * PAGE));
    let mut region =
        Region::builder().chunk(memory.clone()).chunk(Chunk::hole(1 << 20)).writable().build(Eager).unwrap();
    region.as_mut_slice().unwrap()[..2 * PAGE].fill(9);
    region.as_mut_slice().unwrap()[3 * PAGE + 70_000] = 8;
    assert!(region.as_slice()[..2 * PAGE].iter().all(|&byte| byte == 9));
    assert_eq!(region.as_slice()[3 * PAGE + 70_000], 8);
    let again = Region::builder().chunk(memory).build(Eager).unwrap();
    assert!(again.as_slice() == pattern(1, 3 * PAGE));
}

#[test]
fn a_discarded_page_has_the_bytes_of_its_source_again() {
    for writable in [false, true] {
        let builder = Region::builder().chunk(pattern(1, 3 * PAGE)).chunk(Chunk::hole(1 << 20));
        let builder = if writable { builder.writable() } else { builder };
        let mut region = builder.build(Eager).unwrap();
        if let Some(bytes) = region.as_mut_slice() {
            bytes.fill(9);
        }
        discard(region.as_ptr().addr().get(), region.len());
        assert!(region.as_slice()[..3 * PAGE] == pattern(1, 3 * PAGE));
        assert!(region.as_slice()[3 * PAGE..].iter().all(|&byte| byte == 0));
    }
}

/// The resident memory of this process, in bytes.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "each read takes memory of the sanitizer")]
fn reads_of_a_huge_hole_take_no_memory() {
    let end = child::run(this_test!(), || {
        let (edge, hole) = (pattern(1, 5000), 1_u64 << 40);
        let region = Region::builder().chunk(edge.clone()).chunk(Chunk::hole(hole)).chunk(edge.clone());
        let region = region.build(Eager).unwrap();
        let before = resident();
        let first = 8192;
        assert!((0..1 << 16).all(|page| region.as_slice()[first + page * PAGE] == 0));
        assert!(resident() < before + (16 << 20), "{before} grew to {}", resident());
        assert!(region.as_slice()[region.len() - 5000..] == edge);
    });
    end.expect_pass();
}

/// The part of `/proc/self/maps` about a region.
fn maps(name: &str) -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(name)).count()
}

fn broken(source: Scripted) -> Result<Region, Error> {
    let chunks = [vec![1u8; 100].into(), Chunk::source(Arc::new(source))];
    Region::builder().name("half-built").chunks(chunks).build(Eager)
}

#[test]
fn a_source_that_fails_fails_the_build_which_leaves_nothing() {
    let end = child::run(this_test!(), || {
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        // The first build opens a descriptor that all regions without faults share.
        drop(broken(scripted(3000).failing(page(2500))));
        let before = descriptors();
        let error = broken(scripted(3000).failing(page(2500))).unwrap_err();
        assert_eq!((error.kind(), error.chunk()), (ErrorKind::SourceFailed, Some(1)), "{error}");
        let failure = error.failure().unwrap();
        // A page of the region begins 100 bytes earlier in the source.
        assert_eq!(failure.source_offset(), page(2500).start - 100);
        assert_eq!((descriptors(), maps("half-built")), (before, 0));
    });
    end.expect_pass();
}

#[test]
fn the_first_of_several_failures_is_the_error() {
    let sources = [900, 100, 2000].map(|bad| Arc::new(scripted(3000).failing(page(bad))));
    let error = Region::builder().chunks(sources.map(Chunk::source)).build(Eager).unwrap_err();
    assert_eq!(error.chunk(), Some(0), "{error}");
    assert_eq!(error.failure().unwrap().source_offset(), page(900).start);
}

#[test]
fn a_source_that_panics_fails_the_build() {
    let error = broken(scripted(100).panicking(page(50))).unwrap_err();
    assert_eq!(reason(&error), FailureReason::Panicked, "{error}");
}

#[test]
fn a_source_that_is_shorter_than_it_was_fails_the_build() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&pattern(2, 100 * PAGE)).unwrap();
    let source = FileSource::open(file.path()).unwrap();
    file.as_file().set_len(30 * PAGE as u64).unwrap();
    let error = Region::builder().chunk(source).build(Eager).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceFailed, "{error}");
    assert_eq!(error.failure().unwrap().source_offset(), page(30).start);
}

/// Fails its first reads.
struct Flaky(AtomicUsize);

impl Source for Flaky {
    fn size(&self) -> u64 {
        10 * PAGE as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        fill(offset, into);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("flaky")
    }
}

#[test]
fn retries_read_the_source_again_and_fail_the_build_at_their_end() {
    let policy = OnFailure::Retry(Retry::times(5).pause(Duration::from_millis(1), Duration::from_millis(1)));
    let build = |failures| {
        let chunk = Chunk::source(Arc::new(Flaky(AtomicUsize::new(failures)))).on_failure(policy);
        Region::builder().chunk(chunk).build(Eager)
    };
    let region = build(4).unwrap();
    assert!(region.as_slice() == bytes(10));
    assert!(region.metrics().source_retries >= 3, "{:?}", region.metrics());
    let error = build(1000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceFailed, "{error}");
    assert_eq!(error.failure().unwrap().attempts(), 6, "{error}");
}

#[test]
fn zeros_stand_for_the_failed_bytes_of_a_chunk_that_asks_for_them() {
    let source = Arc::new(scripted(10).failing(page(4)));
    let chunk = Chunk::source(source).on_failure(OnFailure::Zeros);
    let region = Region::builder().chunk(chunk).build(Eager).unwrap();
    let mut expected = bytes(10);
    expected[4 * PAGE..5 * PAGE].fill(0);
    assert!(region.as_slice() == expected);
    assert_eq!(region.metrics().pages_zeroed_on_failure, 1);
}

fn poisoned() -> (Region, Arc<Mutex<Vec<u64>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = Arc::clone(&told);
    let source = Arc::new(scripted(1000).failing(page(4).start..page(6).start));
    let region = Region::builder()
        .name("poisoned")
        .chunk(Chunk::source(source).on_failure(OnFailure::Poison))
        .on_page_failure(move |offset, _| tell.lock().unwrap().push(offset))
        .build(Eager);
    (region.unwrap(), told)
}

#[test]
fn a_page_that_is_poisoned_by_choice_is_sigbus_and_told() {
    let end = child::run(this_test!(), || {
        let (region, told) = poisoned();
        let offsets = [page(4).start, page(5).start];
        assert_eq!(*told.lock().unwrap(), offsets);
        assert_eq!(region.failures().iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), offsets);
        let error = region.read_at(page(4).start + 7, &mut [0; PAGE]).unwrap_err();
        assert_eq!((error.kind(), error.chunk()), (ErrorKind::SourceFailed, Some(0)), "{error}");
        region.populate(..page(4).start).unwrap();
        region.populate(page(6).start..).unwrap();
        region.populate(..).unwrap_err();
        let error = region.retry_failed(..).unwrap_err();
        assert_eq!(reason(&error), FailureReason::Irrecoverable);
        region.retry_failed(..page(4).start).unwrap();
        let coverage = region.meter().coverage(1)[0];
        assert_eq!((coverage.present, coverage.poisoned), (998, 2));
        let good = [0..4 * PAGE, 6 * PAGE..1000 * PAGE];
        assert!(good.into_iter().all(|part| region.as_slice()[part.clone()] == bytes(1000)[part]));
        // A discard gives no bytes either.
        discard(region.as_ptr().addr().get(), region.len());
        println!("read a byte: {}", region.as_slice()[5 * PAGE + 1]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(!end.output().contains("read a byte"));
}

#[test]
fn a_source_that_fails_everywhere_can_be_poisoned() {
    let source = Arc::new(scripted(70_000).failing(0..u64::MAX));
    let chunk = Chunk::source(source).on_failure(OnFailure::Poison);
    let region = Region::builder().chunk(chunk).chunk(vec![7u8; PAGE]).build(Eager).unwrap();
    assert_eq!(region.metrics().pages_poisoned, 70_000);
    assert_eq!(region.as_slice()[70_000 * PAGE], 7);
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "the sanitizer leaves fewer addresses than the region has")]
fn a_region_larger_than_the_memory_is_refused() {
    let huge = Arc::new(Scripted::new(1 << 44));
    let error = Region::builder().name("huge").chunk(Chunk::source(Arc::clone(&huge))).build(Eager);
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
    assert!(matches!(error.limit(), Some(Limit::AvailableMemory(_) | Limit::CgroupMemory(_))), "{error}");
    assert_eq!(huge.reads(), 0);
}

/// The memory cgroup of this process: its folder, and the names of its files.
fn own_cgroup() -> Option<(PathBuf, &'static str)> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path =
        |line: &str, tag: &str| line.split_once(tag).map(|(_, path)| path.trim_start_matches('/').to_owned());
    if let Some(path) = own.lines().find_map(|line| path(line, ":memory:")) {
        return Some((Path::new("/sys/fs/cgroup/memory").join(path), "memory.limit_in_bytes"));
    }
    let path = own.lines().find_map(|line| path(line, "0::"))?;
    Some((Path::new("/sys/fs/cgroup").join(path), "memory.max"))
}

/// A cgroup of 256 MiB with this process in a cgroup below it. `None` where none can be made.
fn limited_cgroup(limit: &str) -> Option<[PathBuf; 2]> {
    // Without a mounted cgroup, the files below would be made as ordinary files.
    let (own, file) = own_cgroup().filter(|(own, _)| own.join("cgroup.procs").exists())?;
    let outer = own.join(format!("pagestitch-{}", std::process::id()));
    let inner = outer.join("inner");
    fs::create_dir_all(&inner).ok()?;
    let entered =
        fs::write(outer.join(file), limit).and_then(|()| fs::write(inner.join("cgroup.procs"), "0"));
    if entered.is_err() {
        let _ = [&inner, &outer].map(fs::remove_dir);
        return None;
    }
    Some([inner, outer])
}

#[test]
fn a_region_larger_than_the_limit_of_an_outer_cgroup_is_refused() {
    let test = this_test!();
    let end = child::run(test, || {
        let Some(folders) = limited_cgroup("268435456") else {
            println!("SKIPPED {test}: no memory cgroup can be made here");
            return;
        };
        println!("folders: {} {}", folders[0].display(), folders[1].display());
        let build = |pages| Region::builder().chunk(Chunk::source(Arc::new(scripted(pages)))).build(Eager);
        assert_eq!(build(10_000).unwrap().as_slice()[9_999 * PAGE], byte_at(page(9_999).start));
        let error = build(100_000).unwrap_err();
        assert_eq!(error.limit(), Some(Limit::CgroupMemory(268_435_456)), "{error}");
    });
    // A cgroup can be removed when its last process has ended.
    let folders = end.output().lines().find_map(|line| line.strip_prefix("folders: ").map(str::to_owned));
    folders.iter().flat_map(|line| line.split(' ')).for_each(|folder| drop(fs::remove_dir(folder)));
    end.expect_pass();
    print!("{}", end.output().lines().find(|line| line.starts_with("SKIPPED")).unwrap_or_default());
}

#[test]
fn a_region_larger_than_the_limit_of_files_is_refused() {
    let end = child::run(this_test!(), || {
        setrlimit(Resource::RLIMIT_FSIZE, 1 << 20, 1 << 20).unwrap();
        let error = Region::builder().chunk(vec![1; 2 << 20]).build(Eager).unwrap_err();
        assert_eq!(error.limit(), Some(Limit::FileSize(1 << 20)), "{error}");
        let region = Region::builder().chunk(vec![1; 1 << 20]).chunk(Chunk::hole(1 << 30)).build(Eager);
        assert_eq!(region.unwrap().as_slice()[(1 << 20) - 1], 1);
    });
    end.expect_pass();
}

#[test]
fn forked_children_inherit_the_region_copy_on_write() {
    let (chunks, expected) = all_kinds();
    let mut region = Region::builder().chunks(chunks).writable().inherit_on_fork().build(Eager).unwrap();
    let child = ForkedChild::start(|| {
        let mut part = [0; 100];
        let reads = region.read_at(70_000, &mut part).is_ok() && part[..] == expected[70_000..70_100];
        let populates = region.populate(..).is_ok();
        i32::from(!(reads && populates && region.as_slice() == expected))
    });
    assert!(child.succeeds());
    let writes = ForkedChild::start(|| {
        let bytes = region.as_mut_slice().unwrap();
        bytes.fill(9);
        i32::from(bytes.iter().any(|&byte| byte != 9))
    });
    assert!(writes.succeeds());
    assert!(region.as_slice() == expected);
}

#[test]
fn a_poisoned_page_is_a_signal_in_a_forked_child_too() {
    let end = child::run(this_test!(), || {
        let (region, _) = poisoned();
        let address = region.as_ptr().addr().get() + 4 * PAGE;
        let child = ForkedChild::start(|| i32::from(touch(address)));
        assert!(!child.succeeds(), "the child has read a byte");
        assert!(region.read_at(0, &mut [0; PAGE]).is_ok());
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer may lie where the region was")]
fn a_touch_after_the_drop_is_no_read() {
    let end = child::run(this_test!(), || {
        let region = Region::builder().chunk(vec![7; 10 * PAGE]).build(Eager).unwrap();
        let address = region.as_ptr().addr().get();
        drop(region);
        println!("read a byte: {}", touch(address));
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
}

#[cfg(not(sanitized))]
#[test]
fn a_locked_region_keeps_its_bytes() {
    let (chunks, expected) = all_kinds();
    let region = Region::builder().chunks(chunks).build(Eager).unwrap();
    crate::lock_pages(&region.as_slice()[..30 * PAGE]);
    assert!(region.as_slice() == expected);
}

#[test]
fn donated_pages_are_copied_and_the_plan_says_why() {
    let build = || {
        let mut donated = Pages::new(4 * PAGE).unwrap();
        donated.fill(5);
        Region::builder().chunk(donated)
    };
    let region = build().build(Eager).unwrap();
    assert!(region.as_slice().iter().all(|&byte| byte == 5));
    assert_eq!(region.plan().runs()[0].reason, PlanReason::FilledByBuild);
    let error = build().require_zero_copy().build(Eager).unwrap_err();
    assert_eq!(
        (error.kind(), error.plan_reason()),
        (ErrorKind::NotZeroCopy, Some(PlanReason::FilledByBuild))
    );
    // They are not lost if the region is dropped, and a pool still moves them.
    let moved = build().require_zero_copy().build(&Pool::new().unwrap()).unwrap();
    assert!(moved.as_slice().iter().all(|&byte| byte == 5));
}

#[test]
fn a_memfd_that_is_filled_later_is_filled_by_the_build() {
    let bytes = pattern(7, 30 * PAGE);
    let region = Region::builder().chunk(crate::lazy::chunk_of(&bytes, false)).build_shared(Eager).unwrap();
    let mut seen = vec![0; bytes.len()];
    region.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert_eq!(region.plan().runs()[0].reason, PlanReason::FilledByBuild);
}

/// A chunk of some kind, with its bytes.
fn part(kind: u8, from: usize, len: usize) -> (Chunk, Vec<u8>) {
    let whole = pattern(u64::from(kind), from + len);
    let range = from as u64..(from + len) as u64;
    let cut = |chunk: Chunk| (chunk.range(range.clone()), whole[from..].to_vec());
    match kind {
        0 => (Chunk::hole(len as u64), vec![0; len]),
        1 => cut(memfd(&whole).into()),
        2 => cut(Chunk::fetch(Arc::new(Prompt(whole.clone())))),
        3 => cut(Chunk::source(Arc::new(Cached::new(Memory::from(whole.clone()), 1 << 20)))),
        _ => cut(Memory::from(whole.clone()).into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_region_of_any_chunks_has_their_bytes(
        parts in prop::collection::vec((0..5u8, 0..3 * PAGE, prop_oneof![1..10usize, 1..4 * PAGE, 60 * PAGE..90 * PAGE]), 1..20),
        aligned in any::<bool>(), writable in any::<bool>(),
    ) {
        let parts: Vec<_> = parts.into_iter().map(|(kind, from, len)| part(kind, from, len)).collect();
        let builder = if aligned { Region::builder().page_aligned() } else { Region::builder() };
        let builder = builder.chunks(parts.iter().map(|(chunk, _)| chunk.clone()));
        let region = if writable { builder.writable() } else { builder }.build(Eager).unwrap();
        for (number, (_, bytes)) in parts.iter().enumerate() {
            let start = region.offset_of(number).unwrap() as usize;
            prop_assert!(region.as_slice()[start..start + bytes.len()] == bytes[..], "chunk {}", number);
        }
    }
}

/// Bytes whose drop is seen.
struct Watched(Vec<u8>, Arc<AtomicUsize>);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn sources_that_are_copied_are_dropped_by_the_build_and_stay_in_the_plan() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let watched = |seed| Memory::new(Watched(pattern(seed, 5000), Arc::clone(&dropped)));
    let chunks = [watched(1).into(), Chunk::source(Arc::new(scripted(3))), watched(2).into()];
    let region = Region::builder().chunks(chunks).build(Eager).unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
    assert!(region.as_slice() == [pattern(1, 5000), bytes(3), pattern(2, 5000)].concat());
    let plan = region.plan();
    let runs: Vec<_> = plan.runs().iter().map(|run| (run.source.as_str(), run.method, run.reason)).collect();
    let memory = ("memory", Method::Copy, PlanReason::Memory);
    assert_eq!(runs, [memory, ("scripted", Method::Buffered, PlanReason::Read), memory]);
}

/// Waits in its reads until two threads are in one, or for a while.
#[derive(Default)]
struct Meeting {
    reads: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl Source for Meeting {
    fn size(&self) -> u64 {
        16 << 20
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        let mut reads = self.reads.lock().unwrap();
        reads.0 += 1;
        reads.1 = reads.1.max(reads.0);
        self.changed.notify_all();
        let limit = Duration::from_millis(20);
        let (mut reads, _) = self.changed.wait_timeout_while(reads, limit, |reads| reads.1 < 2).unwrap();
        reads.0 -= 1;
        into.fill(1);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("meeting")
    }
}

#[test]
fn threads_fill_a_region_together_up_to_the_limit() {
    let most = |limit: Option<usize>| {
        let source = Arc::new(Meeting::default());
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source)));
        let builder = limit.into_iter().fold(builder, pagestitch::Builder::max_in_flight);
        assert!(builder.build(Eager).unwrap().as_slice().iter().all(|&byte| byte == 1));
        source.reads.lock().unwrap().1
    };
    assert_eq!(most(Some(1)), 1);
    let threads = std::thread::available_parallelism().unwrap().get();
    assert_eq!(most(None), threads.min(2));
}

#[test]
fn memory_of_another_region_can_be_a_chunk() {
    let below = Arc::new(Region::builder().chunk(pattern(1, 5 * PAGE)).build(Eager).unwrap());
    struct Bytes(Arc<Region>);
    impl AsRef<[u8]> for Bytes {
        fn as_ref(&self) -> &[u8] {
            self.0.as_slice()
        }
    }
    let over = |server: pagestitch::Server| {
        Region::builder().chunk(Memory::new(Bytes(Arc::clone(&below)))).build(server).unwrap()
    };
    for server in [Eager.into(), (&Pool::new().unwrap()).into()] {
        assert!(over(server).as_slice() == pattern(1, 5 * PAGE));
    }
}

#[test]
fn the_best_server_is_a_pool_where_userfaultfd_is_allowed() {
    let server = best_server().unwrap();
    assert!(server.pool().is_some() && server.refusal().is_none(), "{server}");
    let region = Region::builder().chunk(vec![7; 10 * PAGE]).build(&server).unwrap();
    assert_eq!(region.metrics().pages_installed(), 0);
    assert_eq!(region.as_slice()[5 * PAGE], 7);
}

#[test]
fn without_userfaultfd_the_best_server_is_eager_and_says_why() {
    let test = this_test!();
    for (errno, user) in [("EPERM", "root"), ("EPERM", "ordinary"), ("ENOSYS", "root")] {
        child::spawn(test, &format!("{errno} {user}"), best_without_userfaultfd).wait().expect_pass();
    }
}

fn best_without_userfaultfd(case: &str) {
    let (errno, user) = case.split_once(' ').unwrap();
    let (chunks, expected) = all_kinds();
    if user == "ordinary" {
        become_ordinary_user();
    }
    let denied = if errno == "EPERM" { Errno::EPERM } else { Errno::ENOSYS };
    deny_userfaultfd(denied);
    let server = best_server().unwrap();
    let refusal = server.refusal().expect("a reason");
    assert_eq!((refusal.kind(), refusal.raw_os_error()), (ErrorKind::NoUserfaultfd, Some(denied.raw())));
    assert!(server.pool().is_none());
    let region = Region::builder().chunks(chunks).build(&server).unwrap();
    assert!(region.as_slice() == expected);
    let mut region =
        Region::builder().chunk(expected.clone()).writable().record_latency().build(&server).unwrap();
    region.as_mut_slice().unwrap()[0] = 3;
    assert!(region.meter().latency().is_some());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&region.as_slice()[1..]).unwrap();
    let error = Region::builder().chunk(vec![1]).build(&Pool::new().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoUserfaultfd, "{error}");
}
