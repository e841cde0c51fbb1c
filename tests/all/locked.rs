//! A process that locks its memory (`mlockall(2)`): sources fill the pages, and the kernel never
//! populates them.

use crate::donated::pages_of;
use crate::zero_copy::memfd;
use crate::{HugePages, PAGE, become_ordinary_user, lazy, lock_pages, pattern, serve_until};
use nix::libc;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;
use pagestitch::source::{FileSource, SharedFile};
use pagestitch::{
    Budget, Builder, Chunk, ErrorKind, Inline, Limit, Manual, Pool, Readahead, Region, Server, Source,
};
use pagestitch_kernel::Access;
use pagestitch_testkit::bytes::differing;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HUGE: usize = 2 << 20;

/// Locks future or current mappings. `MCL_ONFAULT` has no name in the wrapper.
fn lock(how: &str) {
    let flags = match how {
        "future" => MlockAllFlags::MCL_FUTURE,
        "future on fault" => MlockAllFlags::MCL_FUTURE | MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT),
        "current" => MlockAllFlags::MCL_CURRENT,
        _ => unreachable!("{how}"),
    };
    mlockall(flags).expect("memory can be locked");
}

/// True if this process may lock all of its memory.
fn may_lock(test: &str) -> bool {
    let may = geteuid().is_root();
    if !may {
        println!("SKIPPED {test}: an ordinary user may not lock all of its memory (RLIMIT_MEMLOCK)");
    }
    may
}

/// Runs `body` with each kind of server.
fn with_servers(body: impl Fn(&str, Server)) {
    body("pool", Server::from(&Pool::builder().workers(2).start().unwrap()));
    body("inline", Inline.into());
    let mut manual = Manual::new().unwrap();
    let done = AtomicBool::new(false);
    let server = Server::from(&manual);
    scope(|scope| {
        scope.spawn(|| {
            serve_until(&mut manual, 100, || done.load(Ordering::SeqCst));
        });
        body("manual", server);
        done.store(true, Ordering::SeqCst);
    });
}

/// Chunks of each kind that every server takes, and their bytes.
fn chunks() -> (Vec<Chunk>, Vec<u8>) {
    let (scattered, donated) = (pattern(1, 3 * HUGE + 777), pattern(2, HUGE));
    let (sealed, hole) = (pattern(3, 20 * PAGE), 100_000);
    let mut chunks = vec![Chunk::from(pages_of(&donated))];
    chunks.extend(scattered.chunks(70_001).map(|piece| Chunk::from(piece.to_vec())));
    chunks.extend([Chunk::from(memfd(&sealed)), Chunk::hole(hole as u64)]);
    (chunks, [donated, scattered, sealed, vec![0; hole]].concat())
}

type Set = fn(Builder) -> Builder;

const OPTIONS: [(&str, Set); 3] = [
    ("plain", |builder| builder),
    ("hardware_read_only", Builder::hardware_read_only),
    ("writable", Builder::writable),
];

/// Touches, `read_at` and `populate` show the sources' bytes.
fn every_way_to_the_bytes(how: &str) {
    lock(how);
    with_servers(|server, served| {
        for (option, set) in OPTIONS {
            let (chunks, expected) = chunks();
            let built = set(Region::builder().chunks(chunks)).build(served.clone());
            let region = built.unwrap();
            let here = format!("{server}, {option}, locked {how}");
            let mut read = vec![0; 3 * PAGE];
            region.read_at(PAGE as u64 + 5, &mut read).unwrap();
            assert_eq!(differing(&read, &expected[PAGE + 5..][..read.len()]), 0, "read_at: {here}");
            assert_eq!(region.as_slice()[9 * PAGE], expected[9 * PAGE], "touched: {here}");
            region.populate(..(2 * HUGE) as u64).unwrap();
            assert_eq!(differing(region.as_slice(), &expected), 0, "wrong bytes: {here}");
        }
    });
}

#[test]
fn a_region_under_mlockall_future_is_filled_by_its_sources() {
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    for how in ["future", "future on fault"] {
        child::spawn(test, how, every_way_to_the_bytes).wait().expect_pass();
    }
}

#[test]
fn files_and_memfds_under_mlockall_future_show_their_bytes() {
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    child::run(test, || {
        lock("future");
        let bytes = pattern(5, 64 * PAGE);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let shown = SharedFile::open(file.path(), Access::ReadOnly).unwrap();
        let region = Region::builder()
            .chunk(FileSource::open(file.path()).unwrap())
            .chunk(shown)
            .chunk(lazy::chunk_of(&bytes, false))
            .chunk(lazy::chunk_of(&bytes, true))
            .readahead(Readahead::None)
            .build_shared(&Pool::new().unwrap())
            .unwrap();
        let mut read = vec![0; region.len()];
        region.read_at(0, &mut read).unwrap();
        for (chunk, part) in read.chunks(bytes.len()).enumerate() {
            assert_eq!(differing(part, &bytes), 0, "chunk {chunk}");
        }
    })
    .expect_pass();
}

/// The region and the pool exist before the lock: the kernel touches each page of the region when
/// it locks it.
#[test]
fn a_region_under_mlockall_current_keeps_its_bytes_and_holes() {
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    child::run(test, || {
        with_servers(|server, served| {
            let (chunks, expected) = chunks();
            let early = Region::builder().chunks(chunks).build(served.clone()).unwrap();
            assert_eq!(early.as_slice()[0], expected[0]);
            lock("current");
            assert_eq!(differing(early.as_slice(), &expected), 0, "before: {server}");
            let late = Region::builder().chunks(self::chunks().0).build(served).unwrap();
            assert_eq!(differing(late.as_slice(), &expected), 0, "after: {server}");
        });
    })
    .expect_pass();
}

/// A source that locks the memory that it reads into, which is mostly a staging block.
struct Locking(Vec<u8>);

impl Source for Locking {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        lock_pages(into);
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

/// A staging block is reused: its holes must be zeros each time.
#[test]
fn holes_between_chunks_are_zeros_when_staging_is_locked() {
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    child::run(test, || {
        let source = Arc::new(Locking(pattern(1, 8000 * 1900)));
        let bytes = |i: usize| i * 1900..(i + 1) * 1900;
        let chunk = |i: usize| {
            let bytes = bytes(i).start as u64..bytes(i).end as u64;
            [Chunk::source(Arc::clone(&source)).range(bytes), Chunk::hole(100)]
        };
        let pool = Pool::builder().workers(1).start().unwrap();
        let region = Region::builder().chunks((0..8000).flat_map(chunk)).build(&pool).unwrap();
        region.populate(..).unwrap();
        for (found, i) in region.as_slice().chunks(2000).zip(0..) {
            assert_eq!(differing(&found[..1900], &source.0[bytes(i)]), 0, "chunk {i}");
            assert_eq!(differing(&found[1900..], &[0; 100]), 0, "the hole after chunk {i}");
        }
    })
    .expect_pass();
}

/// A worker fills huge pages of several guests in the same staging block.
#[test]
fn a_discarded_huge_page_of_one_guest_shows_zeros_and_not_another_guests_bytes() {
    if crate::lacks_poison(this_test!()) {
        return;
    }
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    let Some(_reserved) = HugePages::or_skip(test, 8) else { return };
    child::run(test, || {
        let pool = Pool::builder().workers(1).start().unwrap();
        lock("current");
        let adopt = |seed| {
            let guest = Guest::new(&[2 * HUGE], true).unwrap();
            let memory = guest.memory().unwrap().page_size(HUGE).unwrap();
            let region =
                Region::builder().chunk(pattern(seed, 2 * HUGE)).build_adopted(memory, &pool).unwrap();
            (guest, region)
        };
        let (first, second) = (adopt(1), adopt(2));
        assert_eq!(second.0.read(5), pattern(2, HUGE)[5]);
        assert_eq!(first.0.read(9), pattern(1, HUGE)[9]);
        second.0.balloon(0, HUGE).unwrap();
        assert!((0..HUGE).step_by(511).all(|at| second.0.read(at) == 0), "bytes of another guest");
    })
    .expect_pass();
}

/// A region past an ordinary user's limit on locked memory is refused with its name. A smaller
/// region shows its bytes.
#[test]
fn a_region_past_rlimit_memlock_is_refused_with_the_limit() {
    let test = this_test!();
    child::run(test, || {
        let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        setrlimit(Resource::RLIMIT_MEMLOCK, hard.min(1 << 30), hard.min(1 << 30)).unwrap();
        become_ordinary_user();
        let pool = Pool::builder().workers(1).start().unwrap();
        if mlockall(MlockAllFlags::MCL_FUTURE).is_err() {
            println!("SKIPPED {test}: this user may lock no memory (RLIMIT_MEMLOCK)");
            return;
        }
        let error = Region::builder().name("large").chunk(Chunk::hole(1 << 40)).build(&pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitReached);
        assert_eq!(error.limit(), Some(Limit::Locked(hard.min(1 << 30))), "{error}");
        let bytes = pattern(7, 300_000);
        let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
        assert_eq!(differing(region.as_slice(), &bytes), 0);
    })
    .expect_pass();
}

#[test]
fn a_region_with_a_budget_serves_its_pages_in_locked_memory_and_evicts_after_it_is_unlocked() {
    let test = this_test!();
    if !may_lock(test) {
        return;
    }
    child::run(test, || {
        let (bytes, budget) = (pattern(8, 6 << 20), Budget::bytes(5 << 20).unwrap());
        let pool = Pool::builder().workers(1).start().unwrap();
        let build =
            |bytes: &[u8]| Region::builder().chunk(bytes.to_vec()).budget(&budget).build(&pool).unwrap();
        let region = build(&bytes);
        let touch = || {
            for at in (0..bytes.len()).step_by(PAGE) {
                assert_eq!(region.as_slice()[at], bytes[at]);
            }
        };
        touch();
        // Slots of the standby list are full by now, and are locked, too.
        lock("current");
        (0..2).for_each(|_| touch());
        nix::sys::mman::munlockall().expect("memory can be unlocked");
        let before = budget.evictions();
        // All pages are there, above the limit, so only another region has faults.
        let other = build(&bytes);
        assert!(other.as_slice() == bytes);
        touch();
        assert!(budget.evictions() > before + 500, "{:?}", budget.metrics());
        assert!(budget.resident_bytes() <= budget.limit(), "{:?}", budget.metrics());
    })
    .expect_pass();
}
