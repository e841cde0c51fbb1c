//! The weights of a model in several files, as slices, in place. `cargo run --example weights`.
//!
//! A shard has a length, a table of its tensors as text, and the tensors. `ImmutableFile` takes one
//! promise for each shard, that it does not change; from then on a tensor is a `&[u8]` of the file's
//! own pages. Nothing is copied, and the page cache is the only memory.

use pagestitch::source::ImmutableFile;
use pagestitch::{BestServer, Chunk, Error, Region, best_server};
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-weights-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let shards = [
        write_shard(&folder, "shard-0", &[("embed", 3_000), ("layer.0", 70_000)])?,
        write_shard(&folder, "shard-1", &[("layer.1", 70_000), ("norm", 64)])?,
    ];
    let model = Model::open(&shards, &best_server()?)?;
    println!("{}", model.region.plan());
    for (name, bytes) in model.tensors() {
        let floats = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("4 bytes")));
        println!("{name:8} {:6} bytes, sum {}", bytes.len(), floats.sum::<f32>());
    }
    let layer = model.tensor("layer.1").expect("it was written");
    assert!(layer.as_ptr().addr().is_multiple_of(64), "an f32, and a cache line, is aligned");
    assert_eq!(model.region.close().bytes_copied, 0);
    fs::remove_dir_all(folder)?;
    Ok(())
}

/// Tensors by their names.
struct Model {
    region: Region,
    /// The chunk of each tensor.
    chunks: BTreeMap<String, usize>,
}

impl Model {
    fn open(shards: &[PathBuf], server: &BestServer) -> Result<Self, Error> {
        let (mut builder, mut chunks) = (Region::builder().name("weights").page_aligned(), BTreeMap::new());
        for path in shards {
            // SAFETY: no process writes to a shard after it is complete. A new version gets a new
            // file, which is renamed to the old name.
            #[expect(unsafe_code, reason = "the promise that a file does not change")]
            let shard = unsafe { ImmutableFile::open(path) }?;
            for (name, range) in table_of(path) {
                chunks.insert(name, chunks.len());
                builder = builder.chunk(Chunk::from(shard.clone()).range(range));
            }
        }
        // With `require_zero_copy`, a tensor that cannot be mapped is an error with the reason.
        Ok(Self { region: builder.require_zero_copy().build(server)?, chunks })
    }

    fn tensor(&self, name: &str) -> Option<&[u8]> {
        self.region.chunk_slice(*self.chunks.get(name)?)
    }

    fn tensors(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let slice = |&number: &usize| self.region.chunk_slice(number).expect("a chunk for each tensor");
        self.chunks.iter().map(move |(name, number)| (name.as_str(), slice(number)))
    }
}

/// The tensors of a shard, and their places in the file. A real program reads them with a parser of
/// its format.
fn table_of(path: &Path) -> Vec<(String, Range<u64>)> {
    let shard = fs::read(path).expect("a shard");
    let length = u64::from_le_bytes(shard[..8].try_into().expect("8 bytes")) as usize;
    let table = str::from_utf8(&shard[8..8 + length]).expect("text");
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (name, start, end) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((name.to_owned(), start..end))
    };
    table.lines().filter_map(entry).collect()
}

/// Writes a shard: each tensor at a multiple of 64 bytes, as most formats have it.
fn write_shard(folder: &Path, name: &str, tensors: &[(&str, u64)]) -> std::io::Result<PathBuf> {
    let (mut table, mut end) = (String::new(), 1024_u64);
    for (name, bytes) in tensors {
        let start = end.next_multiple_of(64);
        end = start + bytes;
        table += &format!("{name} {start} {end}\n");
    }
    let ones = 1f32.to_le_bytes().into_iter().cycle();
    let mut shard: Vec<u8> = ones.take(end as usize).collect();
    shard[..8].copy_from_slice(&(table.len() as u64).to_le_bytes());
    shard[8..8 + table.len()].copy_from_slice(table.as_bytes());
    let path = folder.join(name);
    fs::write(&path, shard)?;
    Ok(path)
}
