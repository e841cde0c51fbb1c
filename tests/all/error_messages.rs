//! The full text of each error, once: it names the thing, the reason and the remedy, on one line.
//! All other tests check kinds and details, so that a better text changes this file only.

use crate::donated::pages_of;
use crate::guests::adopt;
use crate::{PAGE, discard, pattern};
use pagestitch::source::{Donated, Fetch, FileSource, Memfd, Memory, Reply, SharedFile, UnsealedMemfd};
use pagestitch::{
    Access, AdoptedMemory, Budget, Builder, Chunk, Eager, Error, Inline, Manual, OnFailure, Placement, Pool,
    Readahead, Recording, Region, Server, Source, WriteBack,
};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scripted::Scripted;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Compares errors with their texts, and shows all differences at once.
pub(crate) fn check<E: std::fmt::Display, T: AsRef<str>>(cases: impl IntoIterator<Item = (E, T)>) {
    let cases = cases.into_iter().map(|(error, text)| (error.to_string(), text.as_ref().to_owned()));
    let (said, expected): (Vec<_>, Vec<_>) = cases.unzip();
    assert_eq!(said, expected);
    assert!(said.iter().all(|line| !line.contains('\n')), "one line each: {said:?}");
}

fn named() -> Builder {
    Region::builder().name("r")
}

fn filled() -> Builder {
    named().chunk(pattern(1, 4 * PAGE))
}

fn refused(builder: Builder, server: impl Into<Server>) -> Error {
    builder.build(server).unwrap_err()
}

#[test]
fn the_errors_of_inline_regions_with_a_budget_name_the_remedy() {
    let budget = Budget::bytes(8 << 20).unwrap();
    let written = |server: Server| {
        let chunk = Chunk::writable(Arc::new(Mutex::new(vec![7; PAGE])));
        let builder = named().chunk(chunk).writable().write_back(WriteBack::ToSource);
        builder.budget(&budget).build_shared(server).unwrap_err()
    };
    let file = crate::inline_files::file_of(b"bytes");
    let name = file.name();
    check([
        (
            refused(filled().chunk(file).budget(&budget), Inline),
            format!(
                "region r: chunk 1 ({name}) may change, and a signal handler has no stack for hashes: use build_shared(), an ImmutableFile, Chunk::stable(), or a pool"
            ),
        ),
        (
            refused(filled().budget(&budget), Eager),
            "region r: Eager has no thread that evicts pages: leave out budget(), or use a pool".into(),
        ),
    ]);
    if !crate::bounded_writes::moves_no_pages() {
        check([(
            written(Inline.into()),
            "region r: chunk 0 (memory) cannot be served inline, as a signal handler must not read it: use a pool, or a WritableFile",
        )]);
    }
}

#[test]
fn the_errors_of_growth_name_the_numbers_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let log = || filled().capacity(5 * PAGE as u64).build(&pool).unwrap();
    let inner = Memory::new(filled().build(&Pool::new().unwrap()).unwrap());
    let memfd = UnsealedMemfd::create("shared", 10).unwrap();
    check([
        (
            filled().build(&pool).unwrap().append("1").unwrap_err(),
            "region r: it has no room for further chunks: build it with capacity()",
        ),
        (
            refused(filled().capacity(10), &pool),
            "region r: a capacity of 10 bytes is too little: ask for capacity(16384) or more",
        ),
        (
            refused(filled().capacity(1), &pool),
            "region r: a capacity of 1 byte is too little: ask for capacity(16384) or more",
        ),
        (
            log().append(vec![1; PAGE + 1]).unwrap_err(),
            "region r: 4097 bytes after its 16384 bytes exceed its capacity of 20480 bytes: build it with a larger capacity()",
        ),
        (
            log().append("").unwrap_err(),
            "region r: chunk 1 (memory) is empty: leave it out, or give it a length",
        ),
        (
            log().append(pages_of(&pattern(1, PAGE))).unwrap_err(),
            "region r: chunk 1 (donated pages) cannot be appended, because its pages move in or are mapped by the build: build a region of it",
        ),
        (
            log().append(SharedFile::try_from(&memfd).unwrap()).unwrap_err(),
            "region r: other processes may change the appended chunk (/memfd:shared (deleted)): use build_shared(), or seal or copy it",
        ),
        (
            log().append(inner).unwrap_err(),
            "region r: the chunk is memory of region r, which only a build can take: copy the bytes out with read_at()",
        ),
        (
            refused(filled().capacity(1 << 20), Eager),
            "region r: a region that is filled when it is built takes no further chunks: leave out capacity(), or use a pool",
        ),
    ]);
}

#[test]
fn the_errors_of_growth_in_a_budget_name_the_chunk_and_the_remedy() {
    let (pool, budget) = (Pool::new().unwrap(), Budget::bytes(8 << 20).unwrap());
    let file = crate::inline_files::file_of(&pattern(2, 100));
    let (file, name) = (|| Arc::clone(&file), file.name());
    let log = named().budget(&budget).capacity(1 << 20).build(&pool).unwrap();
    let after_file = named().chunk(file()).budget(&budget).capacity(1 << 20);
    check([
        (
            log.append(file()).unwrap_err(),
            format!(
                "region r: chunk 0 ({name}) may have other bytes after its page has left, because hashes are kept for the chunks of the build alone: use build_shared(), or bytes that cannot change"
            ),
        ),
        (
            log.append(Chunk::from("1").on_failure(OnFailure::Zeros)).unwrap_err(),
            String::from(
                "region r: a page of chunk 0 (memory) may come back as zeros (OnFailure::Zeros): use build_shared(), or another on_failure(), or leave out budget()",
            ),
        ),
        (
            after_file.build(&pool).unwrap().append("1").unwrap_err(),
            String::from(
                "region r: chunk 1 (memory) begins in a page of a source that may change, of which a hash is kept: give it align(4096), or use build_shared()",
            ),
        ),
    ]);
}

#[test]
fn the_errors_of_chunks_name_the_chunk_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let memory = || Chunk::from(vec![0u8; 10]);
    let donated = Arc::new(Donated::from(pages_of(&pattern(1, 2 * PAGE))));
    let donation = |range| Chunk::from(Arc::clone(&donated)).range(range);
    let memfd = UnsealedMemfd::create("shared", 4096).unwrap();
    let shared = SharedFile::try_from(&memfd).unwrap();
    check([
        (refused(named(), &pool), "region r: a region needs at least one chunk: the list is empty"),
        (
            refused(filled().chunk(memory().range(3..3)), &pool),
            "region r: chunk 1 (memory) is empty: leave it out, or give it a length",
        ),
        (
            refused(filled().chunk(memory().range(3..11)), &pool),
            "region r: chunk 1 (memory) reaches to byte 11 of a source of 10 bytes: end it at or before 10",
        ),
        (
            refused(filled().chunk(memory().align(24)), &pool),
            "region r: chunk 1 cannot be aligned to 24 bytes: use a power of two, at most the page size of 4096",
        ),
        (
            refused(filled().chunk(File::open("/").unwrap()), &pool),
            "region r: chunk 1: / is a directory: name a file in it",
        ),
        (
            refused(named().chunk(donation(0..5000)).chunk(donation(4999..6000)), &pool),
            "region r: chunk 1 (donated pages) donates bytes 0..5000, which another chunk has donated already: a page moves only once",
        ),
        (
            refused(named().chunk(Chunk::hole(u64::MAX)).chunk(Chunk::hole(1)), &pool),
            "region r: chunk 1 takes the region to 2^64 bytes or more: split the region",
        ),
        (
            refused(named().chunk(Chunk::hole(u64::MAX)), &pool),
            "region r: 18446744073709551615 bytes are more than there are addresses: split it",
        ),
        (
            refused(filled().chunk(shared), &pool),
            "region r: other processes may change chunk 1 (/memfd:shared (deleted)): use build_shared(), or seal or copy it",
        ),
        (
            refused(filled().require_zero_copy(), &pool),
            "region r: chunk 0 (memory) is not zero-copy: private memory: copied once, from its own address",
        ),
    ]);
}

#[test]
fn the_error_of_a_small_budget_names_the_remedy() {
    let least = 1024 * PAGE;
    check([(
        Budget::bytes(1).unwrap_err(),
        format!("a budget of 1 byte is too small: give it {least} bytes or more"),
    )]);
}

#[test]
fn the_errors_of_options_name_the_option_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let recorded = filled().record().build(&pool).unwrap();
    let recording = recorded.recording().unwrap();
    let other = || named().chunk(vec![1; PAGE]).replay(&recording);
    check([
        (
            refused(filled().writable().hardware_read_only(), &pool),
            "region r: hardware_read_only() stops the writes that writable() allows: leave out one of the two",
        ),
        (
            refused(filled().populate_threads(0), Eager),
            "region r: a thread must fill pages in populate() and read_at(): ask for populate_threads(1) or more",
        ),
        (
            refused(filled().record().replay(&recording), &pool),
            "region r: a page that is replayed has no first touch: record() another region, without replay()",
        ),
        (
            refused(filled().release_sources().inherit_on_fork(), &pool),
            "region r: forked children are filled from the same sources: leave out release_sources() or inherit_on_fork()",
        ),
        (
            refused(other(), &pool),
            "region r: the recording is of a region of 16384 bytes in pages of 4 KiB, but this region has 4096 bytes in pages of 4 KiB: record it anew",
        ),
        (
            refused(filled().inherit_on_fork(), &Manual::new().unwrap()),
            "region r: a manual serves no forked children, because its loop may wait for the allocator while fork(2) holds it: use a pool",
        ),
        (
            refused(filled().inherit_on_fork(), Inline),
            "region r: an inline region serves no forked children: use a pool",
        ),
        (refused(filled().record(), Inline), "region r: only workers can record or replay: use a pool"),
        (
            refused(filled().readahead(Readahead::Adaptive), Inline),
            "region r: a signal handler fills one page and none ahead: leave out readahead(), or use a pool",
        ),
        (
            refused(filled().max_in_flight(1), Inline),
            "region r: each thread fills its own page, so faults cannot be limited: leave out max_in_flight(), or use a pool",
        ),
        (
            refused(filled().record_latency(), Inline),
            "region r: a signal handler reads no clock: leave out record_latency(), or use a pool",
        ),
        (
            refused(filled().chunk(Chunk::source(Arc::new(Scripted::new(10)))), Inline),
            "region r: chunk 1 (scripted) cannot be served inline, as a signal handler must not read it: use a pool, or read it into memory first",
        ),
    ]);
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "the sanitizer leaves fewer addresses than the region has")]
fn the_errors_of_a_build_that_fills_name_the_chunk_or_the_size_and_the_remedy() {
    let failing = || Chunk::source(Arc::new(Scripted::new(4 * PAGE as u64).failing(0..1)));
    let poisoned = named().chunk(failing().on_failure(OnFailure::Poison)).build(Eager).unwrap();
    let huge = refused(named().chunk(Chunk::source(Arc::new(Scripted::new(1 << 44)))), Eager);
    let limit = huge.limit().unwrap();
    let left = huge.to_string();
    let left = left.split_once(", and ").unwrap().1.split_once(' ').unwrap().0;
    let size = format!(
        "region r: the server Eager fills 17592186044416 bytes at the build, and {left} are left: {limit}; a pool, with userfaultfd, fills only the pages that are touched"
    );
    check([
        (
            refused(filled().chunk(failing()), Eager),
            "region r: chunk 1 (scripted), at byte 0 of its source: scripted to fail",
        ),
        (
            refused(filled().record(), Eager),
            "region r: a region that is filled when it is built does not notice a touch: leave out record(), or use a pool",
        ),
        (huge, size.as_str()),
        (
            poisoned.retry_failed(..).unwrap_err(),
            "region r: chunk 0 (scripted), at byte 0 of its source: the server Eager reads the sources only when a region is built: build the region anew",
        ),
    ]);
}

#[test]
fn the_errors_of_pools_and_manuals_name_the_option_and_the_remedy() {
    check([
        (
            Pool::builder().workers(0).start().unwrap_err(),
            "a pool needs at least one worker: ask for 1 or more",
        ),
        (
            Pool::builder().name("a\0b").start().unwrap_err(),
            "the pool's name \"a\\0b\" has a NUL byte, which a thread's name cannot have: leave it out",
        ),
        (
            Pool::builder().placement(Placement::Cpus(vec![])).start().unwrap_err(),
            "a pool needs at least one CPU: name one in Placement::Cpus",
        ),
        (Manual::group(0).unwrap_err(), "no thread would serve: ask for 1 or more"),
    ]);
}

#[test]
fn the_errors_of_adopted_memory_name_the_range_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let guest = Guest::new(&[4 * PAGE], false).unwrap();
    let refused =
        |set: fn(Builder) -> Builder| set(filled()).build_adopted(adopt(&guest), &pool).unwrap_err();
    check([
        (
            refused(|builder| builder.writable()),
            "region r: only its owner writes to adopted memory: leave out writable()",
        ),
        (
            refused(|builder| builder.hardware_read_only()),
            "region r: adopted memory is mapped by its owner: leave out hardware_read_only()",
        ),
        (
            refused(|builder| builder.dumped()),
            "region r: adopted memory is part of its owner's core dumps, not of this process's: leave out dumped()",
        ),
        (
            refused(|builder| builder.max_mappings(1)),
            "region r: nothing is mapped in adopted memory: leave out max_mappings()",
        ),
        (
            refused(|builder| builder.inherit_on_fork()),
            "region r: children of adopted memory's owner cannot be served, because their discarded pages are unknown: leave out inherit_on_fork()",
        ),
        (
            refused(|builder| builder.release_sources()),
            "region r: a page of adopted memory may be filled again, because only its owner knows which pages are present: leave out release_sources()",
        ),
        (
            refused(|builder| builder.chunk(vec![1; PAGE])),
            "region r: the chunks hold 20480 bytes and the memory's ranges 16384: lay chunks for exactly its ranges",
        ),
        (
            filled().build_adopted(adopt(&guest), Inline).unwrap_err(),
            "region r: adopted memory cannot be served inline: its owner has registered it for events; use a pool",
        ),
    ]);
}

#[test]
fn the_errors_of_ranges_of_adopted_memory_name_the_range_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let guest = Guest::new(&[4 * PAGE], false).unwrap();
    let ranges = |ranges: &[(usize, usize)]| {
        let owner = pagestitch::Process::open(std::process::id()).unwrap();
        let memory = guest.memory_without_ranges().unwrap().owner(owner);
        let memory = ranges.iter().fold(memory, |memory, &(start, bytes)| memory.range(start, bytes));
        filled().build_adopted(memory, &pool).unwrap_err()
    };
    check([
        (ranges(&[]), "region r: adopted memory has no range: add one with range()"),
        (
            ranges(&[(0x1001, PAGE)]),
            "region r: the range of 0x1000 bytes at 0x1001 is not whole pages of 4 KiB: align its start and length to pages",
        ),
        (
            ranges(&[(0x1000, 2 * PAGE), (0x2000, PAGE)]),
            "region r: the range of 0x1000 bytes at 0x2000 overlaps the range at 0x1000: pass each page once",
        ),
        (
            guest.memory_without_ranges().unwrap().page_size(3000).unwrap_err(),
            "pages of 3000 bytes: serve pages of 4 KiB or 2 MiB",
        ),
        (
            AdoptedMemory::new(File::open("/dev/null").unwrap().into()).unwrap_err(),
            "cannot adopt memory: the descriptor is no userfaultfd but /dev/null: send the one that the memory is registered with",
        ),
        (
            AdoptedMemory::new(guest.uffd().try_clone_to_owned().unwrap()).unwrap_err(),
            "cannot adopt memory: the userfaultfd fills memory of this process, not of another: to fill it, make the promise of OwnMemory",
        ),
    ]);
}

#[test]
fn the_errors_of_files_name_the_path_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let (within, shown) = (folder.path().display(), path.display());
    let missing = || format!("cannot open {shown}: No such file or directory (os error 2)");
    check([
        (FileSource::open(&path).unwrap_err(), missing()),
        (SharedFile::open(&path, Access::ReadOnly).unwrap_err().into(), missing()),
        (
            Recording::read(&path).unwrap_err(),
            format!("cannot read {shown}: No such file or directory (os error 2)"),
        ),
    ]);
    fs::write(&path, "something else").unwrap();
    let write_only = File::options().write(true).open(&path).unwrap();
    check([
        (FileSource::open(folder.path()).unwrap_err(), format!("{within} is a directory: name a file in it")),
        (
            FileSource::open("/dev/null").unwrap_err(),
            String::from("/dev/null cannot be read at an offset: use a regular file or a block device"),
        ),
        (
            FileSource::from_file(write_only, &path).unwrap_err(),
            format!("{shown} is open for writing only: open it for reading too"),
        ),
        (
            Memfd::from_fd(File::open(&path).unwrap().into()).unwrap_err(),
            String::from(
                "cannot use the descriptor: the memfd is not sealed against writing and shrinking: add F_SEAL_WRITE and F_SEAL_SHRINK first",
            ),
        ),
        (Recording::read(&path).unwrap_err(), format!("{shown} is no recording of first touches")),
        (
            Recording::from_bytes(b"pgstrec1").unwrap_err(),
            String::from("the data is damaged or cut short: record it anew"),
        ),
    ]);
    let file = || SharedFile::open(&path, Access::ReadOnly).unwrap();
    let pool = Pool::new().unwrap();
    let region = named().chunk(file()).build_shared(&pool).unwrap();
    check([
        (
            region.write_at(0, b"no").unwrap_err(),
            String::from("region r is read-only: build it writable() to write to it"),
        ),
        (
            named().chunk(file()).writable().build_shared(&pool).unwrap_err(),
            format!(
                "region r: cannot map chunk 0 ({shown}) in place: it is open for reading only: open it for writing too, or map it copy_on_write()"
            ),
        ),
    ]);
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    check([(
        region.read_at(0, &mut [0; 10]).unwrap_err(),
        format!("region r: bytes 0..10 cannot be read: {shown} is shorter than it was: 0 bytes"),
    )]);
}

#[test]
fn the_error_of_a_write_to_padding_names_the_ranges_to_write() {
    let memfd = UnsealedMemfd::create("part", 10).unwrap();
    let part = Chunk::from(SharedFile::try_from(&memfd).unwrap()).range(3..5);
    let region = named().page_aligned().writable().chunk(part).build_shared(&Pool::new().unwrap()).unwrap();
    check([(
        region.write_at(0, b"no").unwrap_err(),
        String::from(
            "region r: bytes 0..2 are padding in pages that show /memfd:part (deleted), and a write would change it outside its chunks: write the ranges of chunks (chunk_ranges())",
        ),
    )]);
}

/// Answers no request.
struct Silent;

impl Fetch for Silent {
    fn size(&self) -> u64 {
        10
    }

    fn fetch(&self, _offset: u64, _reply: Reply) {}
}

/// Answers each request with two bytes.
struct Short;

impl Fetch for Short {
    fn size(&self) -> u64 {
        10
    }

    fn fetch(&self, _offset: u64, reply: Reply) {
        reply.answer(b"no");
    }
}

#[test]
fn the_errors_of_pages_name_the_chunk_the_source_and_the_reason() {
    let pool = Pool::new().unwrap();
    let failed = |chunk: Chunk| filled().chunk(chunk).build(&pool).unwrap().populate(..).unwrap_err();
    let failing = Scripted::new(2 * PAGE as u64).failing(PAGE as u64..PAGE as u64 + 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [7; 100]).unwrap();
    let truncated = FileSource::from_file(file.reopen().unwrap(), "file").unwrap();
    file.as_file().set_len(10).unwrap();
    check([
        (
            failed(Chunk::source(Arc::new(failing))),
            "region r: chunk 1 (scripted), at byte 4096 of its source: scripted to fail",
        ),
        (
            failed(Chunk::source(Arc::new(Scripted::new(10).panicking(0..1)))),
            "region r: chunk 1 (scripted), at byte 0 of its source: the source panicked: scripted to panic",
        ),
        (
            failed(Chunk::fetch(Arc::new(Silent))),
            "region r: chunk 1 (source), at byte 0 of its source: the source gave no answer: it dropped the request",
        ),
        (
            failed(Chunk::fetch(Arc::new(Short))),
            "region r: chunk 1 (source), at byte 0 of its source: the source gave 2 bytes where 10 were requested",
        ),
        (
            failed(truncated.into()),
            "region r: chunk 1 (file), at byte 0 of its source: the file ends before byte 100: it was truncated while in use, or has fewer bytes than its length, as files of sysfs have",
        ),
    ]);
    let released = filled().release_sources().build(&pool).unwrap();
    released.populate(..).unwrap();
    discard(released.as_ptr().addr().get(), PAGE);
    check([(
        released.populate(..).unwrap_err(),
        "region r: chunk 0 (memory), at byte 0 of its source: the page was discarded (MADV_DONTNEED) after its source was released: \
         add keep_sources() if pages are discarded",
    )]);
    drop(released);
    let region = filled().build(&pool).unwrap();
    check([
        (
            region.read_at(5, &mut [0; 4 * PAGE]).unwrap_err(),
            "bytes 5..16389 are not inside region r of 16384 bytes",
        ),
        (pool.clone().stop().unwrap_err(), "the pool still serves 1 (r): drop the regions first"),
    ]);
}

/// Memory of a region.
struct Bytes(Arc<Region>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

#[test]
fn the_errors_of_servers_name_the_region_and_the_remedy() {
    let pool = Pool::new().unwrap();
    let lower = Arc::new(Region::builder().name("lower").chunk(vec![1; PAGE]).build(&pool).unwrap());
    let over = |region: &Arc<Region>| named().chunk(Memory::new(Bytes(Arc::clone(region))));
    let inline = Arc::new(Region::builder().name("inline").chunk(vec![1; PAGE]).build(Inline).unwrap());
    check([
        (
            refused(over(&lower), &pool),
            "region r: chunk 0 is memory of region lower, which is filled by the same server, which would wait for itself: give each region a pool of its own, or copy the bytes out with read_at()",
        ),
        (
            refused(over(&inline), &pool),
            "region r: chunk 0 is memory of region inline, which is served inline, so that the kernel cannot copy its absent pages: give each region a pool of its own, or copy the bytes out with read_at()",
        ),
    ]);
    drop(lower);
    pool.clone().stop().unwrap();
    check([(
        refused(filled(), &pool),
        "region r: its server has ended, because the pool was stopped or the server dropped: start another",
    )]);
}

#[test]
fn the_errors_of_a_snapshot_name_the_file_and_the_remedy() {
    use pagestitch_firecracker::{Error, UnknownHoles};
    let path = || PathBuf::from("diff");
    let refused = || io::Error::from_raw_os_error(nix::libc::EACCES);
    let unknown = |reason| Error::UnknownHoles { path: path(), reason };
    check([
        (
            Error::NoFiles,
            "a snapshot needs at least one memory file: name the base first, then the diffs over it, oldest first",
        ),
        (
            Error::Extents { path: path(), source: refused() },
            "cannot read or write the extents of diff: Permission denied (os error 13)",
        ),
        (
            Error::MissingExtents(path()),
            "the diff diff has no file of extents, and its holes prove nothing, because a copy may add or fill holes: write its extents where Firecracker made it (pagestitch extents), or trust its holes (--assume-holes, Holes::Unchanged)",
        ),
        (
            unknown(UnknownHoles::NotRegular),
            "the holes of diff are unknown, because only a regular file has holes: write its extents where Firecracker made it (pagestitch extents)",
        ),
        (
            unknown(UnknownHoles::LargeBlocks),
            "the holes of diff are unknown, because its file system has blocks larger than a page: a hole inside a block is reported as data: write its extents where Firecracker made it (pagestitch extents)",
        ),
        (
            unknown(UnknownHoles::NotReported),
            "the holes of diff are unknown, because its file system does not report holes: write its extents where Firecracker made it (pagestitch extents)",
        ),
        (
            unknown(UnknownHoles::Hidden),
            "the holes of diff are unknown, because it occupies less space than its length, but its file system reports no hole: write its extents where Firecracker made it (pagestitch extents)",
        ),
        (
            unknown(UnknownHoles::NoHole),
            "the holes of diff are unknown, because it has no hole: a copy has filled them, or it is a full snapshot (name that as the base): write its extents where Firecracker made it (pagestitch extents)",
        ),
        (
            Error::BadExtents(path()),
            "diff is not the list of extents of this diff, or is truncated: write it again (pagestitch extents)",
        ),
        (
            Error::LengthMismatch { path: path(), bytes: 1, base: 2 },
            "diff has 1 byte and its base 2: name a diff of this base, which has the same length",
        ),
        (
            Error::NotPageAligned { path: path(), bytes: 1 },
            "diff has 1 byte, which is not a whole number of pages: name a memory file that is not truncated",
        ),
    ]);
}

#[test]
fn the_errors_of_a_handler_name_the_path_and_the_remedy() {
    use pagestitch_firecracker::Error;
    let path = || PathBuf::from("diff");
    let refused = || io::Error::from_raw_os_error(nix::libc::EACCES);
    check([
        (
            Error::RecordingMismatch { recorded: 1, bytes: 2 },
            "the recording is of 1 byte of memory, but the memory file has 2: record a guest of this snapshot",
        ),
        (
            Error::InUse(path()),
            "diff is in use: another handler listens there; stop it, or choose another path",
        ),
        (Error::NotASocket(path()), "diff exists and is no socket: choose another path, or remove it"),
        (
            Error::Listen { path: path(), source: refused() },
            "cannot listen at diff: Permission denied (os error 13)",
        ),
        (
            Error::SocketAccess { path: path(), source: refused() },
            "cannot set the mode and group of diff: Permission denied (os error 13): name a group of this user, or run as root",
        ),
    ]);
}

#[test]
fn the_refusals_of_a_handshake_name_what_was_sent_and_what_was_expected() {
    use pagestitch_firecracker::HandshakeError;
    check([
        (
            HandshakeError::Garbage(String::from("expected value")),
            "sent no list of memory mappings (expected value): expected the JSON array that Firecracker sends",
        ),
        (HandshakeError::TooLong, "sent more than 1024 KiB, which is no list of memory mappings"),
        (
            HandshakeError::Closed { bytes: 9, fds: 0 },
            "closed the connection after 9 bytes and 0 descriptors: expected a JSON array and one userfaultfd",
        ),
        (
            HandshakeError::TimedOut(Duration::from_millis(500), 3, 0),
            "sent no complete handshake within 500ms: 3 bytes and 0 descriptors came",
        ),
        (HandshakeError::Descriptors(2), "sent 2 descriptors: expected one, the userfaultfd"),
        (
            HandshakeError::NoDescriptors,
            "sent more descriptors than this process may open: raise the limit on open files (ulimit -n)",
        ),
        (
            HandshakeError::NotUserfaultfd(String::from("/dev/null")),
            "sent a descriptor that is no userfaultfd but /dev/null: expected the userfaultfd of its memory",
        ),
        (HandshakeError::Empty, "sent an empty list: a guest has memory"),
        (
            HandshakeError::MixedPages(4096, 2 << 20),
            "mixes page sizes of 4096 and 2097152 bytes: all memory of a guest has one",
        ),
        (HandshakeError::PageSize(8192), "has pages of 8192 bytes: supported are 4096 and 2097152"),
        (
            HandshakeError::Gap { start: 0x2000, end: 0x3000, expected: 0x1000 },
            "maps bytes 0x2000..0x3000 of the memory file: expected a range from 0x1000 on, because ranges lie end to end",
        ),
        (
            HandshakeError::Size { guest: 1, file: 2 },
            "has 1 byte of memory, but the memory file has 2: name the memory file of this guest's snapshot",
        ),
        (
            HandshakeError::Overflow { address: 0x1000, size: 1 },
            "has a mapping of 0x1 bytes at 0x1000, which ends beyond 2^64",
        ),
        (
            HandshakeError::TooManyClients,
            "had no complete handshake when 128 others had come: send the handshake at once",
        ),
        (HandshakeError::ShuttingDown, "had no complete handshake when the handler shut down"),
    ]);
}
