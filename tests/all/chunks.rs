//! The values that a builder takes as a chunk, and the compiler's answer to another value.

use crate::{PAGE, pattern};
use pagestitch::source::{Cached, Fetch, FileSource, Limited, Memfd, Memory, Reply, Retrying, UnsealedMemfd};
use pagestitch::{Chunk, ErrorKind, IntoChunk, Pool, Region, Retry, Source};
use pagestitch_testkit::this_test;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::SystemTime;
use std::{fs, io};

const BYTES: &[u8; 6] = b"a text";

fn chunk(value: impl IntoChunk) -> Chunk {
    value.into_chunk().unwrap()
}

/// A file with the bytes, open for reading.
fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(BYTES).unwrap();
    file
}

fn sealed() -> UnsealedMemfd {
    let memfd = UnsealedMemfd::create("chunk", BYTES.len() as u64).unwrap();
    memfd.file().write_all_at(BYTES, 0).unwrap();
    memfd
}

/// A source that is neither copied nor known to the library.
struct Own;

impl Source for Own {
    fn size(&self) -> u64 {
        BYTES.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        into.copy_from_slice(&BYTES[offset..offset + into.len()]);
        Ok(())
    }

    fn granularity(&self) -> u64 {
        4096
    }
}

impl Fetch for Own {
    fn size(&self) -> u64 {
        BYTES.len() as u64
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        let offset = offset as usize;
        let bytes = &BYTES[offset..offset + reply.len()];
        reply.answer(bytes);
    }
}

#[test]
fn each_owner_of_bytes_is_a_chunk() {
    let text = str::from_utf8(BYTES).unwrap();
    let chunks = [
        chunk("a text"),
        chunk(b"a text"),
        chunk(&BYTES[..]),
        chunk(*BYTES),
        chunk(text.to_owned()),
        chunk(BYTES.to_vec()),
        chunk(BYTES.to_vec().into_boxed_slice()),
        chunk(Arc::<[u8]>::from(&BYTES[..])),
        chunk(bytes::Bytes::from_static(BYTES)),
        chunk(Memory::new(text.to_owned())),
        chunk(file()),
        Chunk::try_from(file()).unwrap(),
        chunk(FileSource::try_from(file()).unwrap()),
        chunk(sealed().seal().unwrap()),
        chunk(Memfd::from(sealed().seal().unwrap())),
        chunk(Arc::new(Own) as Arc<dyn Source>),
        chunk(Box::new(Own) as Box<dyn Source>),
    ];
    let count = chunks.len();
    let region = Region::builder().chunks(chunks).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice(), BYTES.repeat(count));
}

#[test]
fn wrappers_stack_on_boxed_shared_and_borrowed_sources() {
    static OWN: Own = Own;
    let pool = Pool::new().unwrap();
    let once = Retry::times(1);
    let sources: [Arc<dyn Source>; 4] = [
        Arc::new(Limited::new(Box::new(Own) as Box<dyn Source>, 1)),
        Arc::new(Cached::new(Arc::new(Retrying::new(&OWN as &dyn Source, once)) as Arc<dyn Source>, 1 << 20)),
        Arc::new(Box::new(Limited::new(&OWN, 1))),
        Arc::new(Arc::new(Own)),
    ];
    let fetches: [Arc<dyn Fetch>; 2] = [
        Arc::new(Limited::new(Box::new(Own) as Box<dyn Fetch>, 1)),
        Arc::new(Box::new(Arc::new(&OWN as &dyn Fetch))),
    ];
    assert!(sources.iter().all(|source| source.granularity() == 4096));
    let chunks = sources.into_iter().map(Chunk::source).chain(fetches.into_iter().map(Chunk::fetch));
    let region = Region::builder().chunks(chunks).build(&pool).unwrap();
    assert_eq!(region.as_slice(), BYTES.repeat(6));
}

#[test]
fn memory_behind_an_unsized_source_is_copied_without_a_read() {
    let memory: Arc<dyn Source> = Arc::new(Box::new(Memory::from("text")) as Box<dyn Source>);
    let region = Region::builder().chunk(memory).build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.plan().runs()[0].method, pagestitch::Method::Copy);
}

#[test]
fn a_file_that_cannot_be_a_chunk_is_an_error_of_the_build_with_its_number() {
    let folder = || File::open("/").unwrap();
    let builder = Region::builder().chunk("first").chunk(folder()).chunk("third");
    let error = builder.build(&Pool::new().unwrap()).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::UnusableFile, Some(1)), "{error}");
    assert_eq!(error.path(), Some(Path::new("/")));
    assert_eq!(Chunk::try_from(folder()).unwrap_err().kind(), ErrorKind::UnusableFile);
}

#[test]
fn a_range_keeps_the_bound_that_is_left_out() {
    let bytes = pattern(9, 3 * PAGE);
    let of = |chunk: Chunk| {
        let region = Region::builder().chunk(chunk).build(&Pool::new().unwrap())?;
        Ok::<_, pagestitch::Error>(region.as_slice().to_vec())
    };
    let all = || Chunk::from(bytes.clone());
    assert_eq!(of(all().range(..)).unwrap(), bytes);
    assert_eq!(of(all().range(5_000..)).unwrap(), bytes[5_000..]);
    assert_eq!(of(all().range(..=5_000)).unwrap(), bytes[..=5_000]);
    assert_eq!(of(all().range(..5_000).range(4_000..)).unwrap(), bytes[4_000..5_000]);
    assert_eq!(of(Chunk::hole(9).range(7..)).unwrap(), [0, 0]);
    let after = (std::ops::Bound::Excluded(4), std::ops::Bound::Included(9));
    assert_eq!(of(all().range(after)).unwrap(), bytes[5..=9]);
    for range in [all().range(3 * PAGE as u64..), all().range(..=u64::MAX), all().range(7..).range(..3)] {
        assert_eq!(of(range).unwrap_err().kind(), ErrorKind::InvalidChunk);
    }
}

/// The newest build of the library beside this test. A guest has neither library nor compiler.
fn library(folder: &Path) -> Option<PathBuf> {
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("libpagestitch-") && name.ends_with(".rlib")
    };
    let age = |path: &PathBuf| {
        fs::metadata(path).and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(is_library).max_by_key(age)
}

/// The compiler's messages for a program that passes `value` to a builder, with the library in a folder.
fn messages(value: &str, library: &Path) -> String {
    let deps = library.parent().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program.rs");
    fs::write(&program, format!("fn main() {{ let _ = pagestitch::Region::builder().chunk({value}); }}\n"))
        .unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--edition", "2024", "--emit", "metadata", "--out-dir"])
        .arg(folder.path())
        .arg("--extern")
        .arg(format!("pagestitch={}", library.display()))
        .arg(format!("-Ldependency={}", deps.display()))
        .arg(program)
        .output()
        .expect("the compiler");
    let messages = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.success(), messages.is_empty(), "{messages}");
    messages
}

#[test]
#[cfg_attr(sanitized, ignore = "the compiler of the program has no sanitizer")]
fn the_compiler_names_the_function_that_makes_a_chunk() {
    let Some(library) = library(std::env::current_exe().unwrap().parent().unwrap()) else {
        return println!("SKIPPED {}: the library is not beside this test", this_test!());
    };
    assert_eq!(messages("vec![1u8]", &library), "");
    for value in ["vec![1u32]", "std::sync::Arc::new(5u8)", "std::path::Path::new(\"/\")"] {
        let lines = messages(value, &library);
        assert!(lines.contains("is not a chunk"), "{value}: {lines}");
        for remedy in ["Chunk::source(Arc::new(", "Memory::new(", "FileSource::open", "borrow(&"] {
            assert!(lines.contains(remedy), "{value}: {remedy} is missing in {lines}");
        }
    }
}

#[test]
fn an_aligned_chunk_starts_at_a_multiple_in_region_and_memory() {
    let bytes = pattern(3, 3_000);
    let aligned = |bytes: &[u8], align| Chunk::from(bytes.to_vec()).align(align);
    let region = Region::builder()
        .chunk(&b"odd"[..])
        .chunk(aligned(&bytes[..1_001], 8))
        .chunk(aligned(&bytes[1_001..1_002], 64))
        .chunk(b"end")
        .align(32)
        .chunk(aligned(&bytes[1_002..], 2))
        .chunk(aligned(b"x", PAGE as u64))
        .build(&Pool::new().unwrap())
        .unwrap();
    let ranges = [0..3, 8..1_009, 1_024..1_025, 1_025..1_028, 1_056..3_054, 4_096..4_097];
    assert!(region.chunk_ranges().eq(ranges.clone()));
    assert_eq!((region.chunk_count(), region.len(), region.is_empty()), (6, 4_097, false));
    let expected = [b"odd", &bytes[..1_001], &bytes[1_001..1_002], b"end", &bytes[1_002..], b"x"];
    for (chunk, (range, bytes)) in ranges.into_iter().zip(expected).enumerate() {
        let slice = region.chunk_slice(chunk).unwrap();
        assert_eq!(slice, bytes, "chunk {chunk}");
        assert_eq!(slice.as_ptr().addr() - region.as_ptr().addr().get(), range.start as usize);
        assert_eq!(region.chunk_len(chunk), Some(bytes.len() as u64));
        assert_eq!(region.chunk_at(range.start), Some(chunk));
    }
    assert_eq!((region.chunk_slice(6), region.chunk_len(6), region.chunk_range(6)), (None, None, None));
    assert_eq!(region.chunk_at(4), None);
}

#[test]
fn an_alignment_that_no_chunk_can_have_is_refused_with_the_number_of_the_chunk() {
    for align in [0, 24, 2 * PAGE as u64] {
        let first = || Region::builder().chunk("first");
        for builder in [first().chunk(Chunk::from("x").align(align)), first().align(align).chunk("x")] {
            let error = builder.build(&Pool::new().unwrap()).unwrap_err();
            assert_eq!((error.kind(), error.chunk()), (ErrorKind::InvalidChunk, Some(1)), "{error}");
        }
    }
}

#[test]
fn page_aligned_chunks_keep_their_alignment() {
    let memfd = UnsealedMemfd::create("aligned", 2 * PAGE as u64).unwrap();
    memfd.file().write_all_at(&pattern(5, 2 * PAGE), 0).unwrap();
    let memfd = Memfd::from(memfd.seal().unwrap());
    let part = |start| Chunk::from(memfd.clone()).range(start..);
    let region = Region::builder()
        .page_aligned()
        .chunk(part(100))
        .chunk(part(128).align(64))
        .chunk(part(100).align(64))
        .build(&Pool::new().unwrap())
        .unwrap();
    let starts: Vec<u64> = region.chunk_ranges().map(|range| range.start % PAGE as u64).collect();
    assert_eq!(starts, [100, 128, 0]);
    assert_eq!(region.chunk_slice(2).unwrap(), &pattern(5, 2 * PAGE)[100..]);
}
