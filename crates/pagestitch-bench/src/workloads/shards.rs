//! Tensors in shards: files laid end to end, beside a plain `mmap` of each file.
//!
//! A run opens the files, makes the bytes appear, uses each tensor once, and drops everything: the
//! cost of a program that starts, and not of its second use.

use crate::case::{Case, Options, Sample};
use crate::systems::{PAGE, sum};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pagestitch::source::{FileSource, ImmutableFile};
use pagestitch::{Chunk, Pool, Region};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::slice;
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let shards = Arc::new(Shards::new(options.size(TENSOR)));
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (point, used) in [("first touch", touched as Use), ("reading", sum)] {
        let mut case = |system: &'static str, show: Box<dyn Fn(&Shards) -> u64>| {
            let shards = Arc::clone(&shards);
            let bytes = shards.tensor * TENSORS;
            let run = move |_| {
                // Each system finds its own code and the bytes in the processor's caches, whatever ran before.
                black_box(show(&shards));
                Sample::of(bytes / PAGE, bytes, || black_box(show(&shards)))
            };
            cases.push(Case::new(system, run).at(point).chunks_of(options.size(TENSOR)).against(&["mmap"]));
        };
        let (of_immutable, of_copied) = (pool.clone(), pool.clone());
        case("in place", Box::new(move |shards| shards.in_place(&of_immutable, used)));
        case("mmap", Box::new(move |shards| shards.mapped(used)));
        case("copied", Box::new(move |shards| shards.copied(&of_copied, used)));
    }
    cases
}

/// The use of a tensor.
type Use = fn(&[u8]) -> u64;

/// Reads one byte of each page.
fn touched(bytes: &[u8]) -> u64 {
    bytes.iter().step_by(PAGE).map(|&byte| u64::from(byte)).sum()
}

/// Files with a header and some tensors each, in a folder that goes with them.
struct Shards {
    folder: PathBuf,
    paths: Vec<PathBuf>,
    /// The bytes of a tensor.
    tensor: usize,
}

impl Shards {
    fn new(tensor: usize) -> Self {
        let folder = std::env::temp_dir().join(format!("pagestitch-shards-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let paths: Vec<PathBuf> = (0..SHARDS).map(|number| folder.join(number.to_string())).collect();
        for path in &paths {
            let mut file = File::create(path).expect("a file");
            file.write_all(&vec![7; HEADER + tensor * EACH]).expect("space");
        }
        Self { folder, paths, tensor }
    }

    /// The bytes of a tensor in its shard.
    fn range(&self, number: usize) -> Range<usize> {
        let start = HEADER + number * self.tensor;
        start..start + self.tensor
    }

    fn in_place(&self, pool: &Pool, used: Use) -> u64 {
        let open = |path: &PathBuf| {
            // SAFETY: only this process knows the files, and it has written them before.
            #[expect(unsafe_code, reason = "the promise that a file does not change")]
            let file = unsafe { ImmutableFile::open(path) };
            Chunk::from(file.expect("a file"))
        };
        let builder = Region::builder().page_aligned().chunks(self.tensors(open));
        let region = builder.require_zero_copy().build(pool).expect("a region");
        use_all(&region, used)
    }

    fn copied(&self, pool: &Pool, used: Use) -> u64 {
        let open = |path: &PathBuf| Chunk::from(Arc::new(FileSource::open(path).expect("a file")));
        let region = Region::builder().align(64).chunks(self.tensors(open)).build(pool).expect("a region");
        use_all(&region, used)
    }

    /// A chunk for each tensor.
    fn tensors(&self, open: impl Fn(&PathBuf) -> Chunk) -> impl Iterator<Item = Chunk> {
        self.paths.iter().flat_map(move |path| {
            let shard = open(path);
            (0..EACH).map(move |number| {
                let range = self.range(number);
                shard.clone().range(range.start as u64..range.end as u64)
            })
        })
    }

    fn mapped(&self, used: Use) -> u64 {
        let maps: Vec<Map> =
            self.paths.iter().map(|path| Map::new(&File::open(path).expect("a file"))).collect();
        let tensors = maps.iter().flat_map(|map| (0..EACH).map(|number| &map.bytes()[self.range(number)]));
        tensors.map(used).fold(0, u64::wrapping_add)
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn use_all(region: &Region, used: Use) -> u64 {
    let tensors = (0..TENSORS).map(|number| region.chunk_slice(number).expect("a tensor"));
    tensors.map(used).fold(0, u64::wrapping_add)
}

/// A plain mapping of a file.
struct Map(std::ptr::NonNull<nix::libc::c_void>, usize);

impl Map {
    fn new(file: &File) -> Self {
        let bytes = file.metadata().expect("a file").len() as usize;
        let length = NonZeroUsize::new(bytes).expect("bytes");
        // SAFETY: a new mapping, where the kernel chooses.
        #[expect(unsafe_code, reason = "mmap")]
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) };
        Self(start.expect("a mapping"), bytes)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as `self`, and no process writes to the file.
        #[expect(unsafe_code, reason = "a slice of a mapped file")]
        unsafe {
            slice::from_raw_parts(self.0.as_ptr().cast(), self.1)
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and no slice of it outlives `self`.
        #[expect(unsafe_code, reason = "munmap")]
        let _ = unsafe { munmap(self.0, self.1) };
    }
}

const SHARDS: usize = 8;
/// The tensors of a shard.
const EACH: usize = 5;
const TENSORS: usize = SHARDS * EACH;
/// The bytes of a tensor.
const TENSOR: usize = 2 << 20;
/// The bytes before the first tensor of a shard: a length and some JSON.
const HEADER: usize = 3000;
