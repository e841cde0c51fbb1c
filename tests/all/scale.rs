//! The cost of a region grows with its used pages and its chunks, and not with its size.

use crate::zero_copy::memfd;
use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Region};
use pagestitch_testkit::{child, this_test};
use std::fs;

// Each test has a process of its own, because memory of other tests would be counted too.

#[test]
#[cfg_attr(sanitized, ignore = "memory of the sanitizer is counted")]
fn a_tebibyte_of_holes_is_reserved_served_and_dropped() {
    let end = child::run(this_test!(), || {
        let region = Region::builder()
            .chunk(vec![1u8; 100])
            .chunk(Chunk::hole(1 << 40))
            .chunk(vec![2u8; 100])
            .build(&Pool::builder().workers(1).start().unwrap())
            .unwrap();
        let bytes = region.as_slice();
        // After the first page, the worker has its stack and its heap.
        assert_eq!(bytes[0], 1);
        let before = resident_kib();
        assert_eq!((bytes[1 << 39], bytes[bytes.len() - 1]), (0, 2));
        let more = resident_kib() - before;
        // A staging block has 2 MiB, and on a loaded machine another worker has one too. A page
        // table of a tebibyte that is not sparse has 128 MiB.
        assert!(more < 8 << 10, "{more} KiB more: two pages were touched");
    });
    end.expect_pass();
}

/// For a core dump the kernel walks all addresses, which takes half a minute for a tebibyte of
/// holes.
#[test]
fn a_region_is_left_out_of_core_dumps_by_default() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(1).start().unwrap();
        let chunks = || [Chunk::hole(1 << 30), memfd(&[5; 8192]).into(), vec![1u8; 100].into()];
        let region = Region::builder().chunks(chunks()).build(&pool).unwrap();
        assert!(parts(&region).len() > 1, "a part is shown in place");
        assert!(parts(&region).iter().all(|flags| flags.contains(" dd")), "{:?}", parts(&region));
        let dumped = Region::builder().chunks(chunks()).dumped().build(&pool).unwrap();
        assert!(parts(&dumped).iter().all(|flags| !flags.contains(" dd")), "{:?}", parts(&dumped));
    });
    end.expect_pass();
}

/// The kernel's flags (`VmFlags`) of each mapping of a region.
fn parts(region: &Region) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = region.as_ptr().addr().get();
    let mut inside = false;
    let mut parts = Vec::new();
    for line in maps.lines() {
        let first = line.split(['-', ' ']).next().and_then(|first| usize::from_str_radix(first, 16).ok());
        match (first, line.strip_prefix("VmFlags:")) {
            (Some(address), _) if line.contains('-') => {
                inside = (start..start + region.len()).contains(&address);
            }
            (_, Some(flags)) if inside => parts.push(flags.to_owned()),
            _ => {}
        }
    }
    parts
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer is counted")]
fn many_chunks_of_one_memory_cost_at_most_32_bytes_each() {
    const CHUNKS: u64 = 1_000_000;
    let end = child::run(this_test!(), || {
        // The kernel may replace a few pages by a huge one at any time.
        nix::sys::prctl::set_thp_disable(true).unwrap();
        let memory = Memory::from((0..1 << 20).map(|i| (i % 251) as u8 | 1).collect::<Vec<u8>>());
        let source = |chunk: u64| chunk * 7919 % 1_000_000;
        let chunk = |index: u64| Chunk::from(memory.clone()).range(source(index)..source(index) + 37);
        let pool = Pool::builder().workers(1).start().unwrap();
        let before = resident_kib();
        let region = Region::builder().chunks((0..CHUNKS).map(chunk)).build(&pool).unwrap();
        let each = (resident_kib() - before) as f64 * 1024.0 / CHUNKS as f64;
        assert_eq!(region.len() as u64, CHUNKS * 37);
        for chunk in (0..CHUNKS).step_by(9973) {
            let expected = ((source(chunk) + 5) % 251) as u8 | 1;
            assert_eq!(region.as_slice()[(chunk * 37 + 5) as usize], expected);
        }
        assert!(each <= 32.0, "{each} bytes a chunk");
    });
    end.expect_pass();
}

/// The resident anonymous memory. Pages of the program's file come with the first call of a function.
/// Before Linux 6.2 each thread holds back up to 64 pages of its count, and before 6.10 `smaps_rollup` may skip a mapping.
pub(crate) fn resident_kib() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
