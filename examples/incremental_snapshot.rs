//! Incremental snapshots of memory: a base, then a sparse file of each day's changes.
//! `cargo run --example incremental_snapshot`.
//!
//! The kernel records which pages are written. Each snapshot reads and writes only these.

use pagestitch::source::FileSource;
use pagestitch::{ErrorKind, Pool, Region, SharedRegion};
use std::error::Error;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BYTES: u64 = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-snapshots-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let ended = snapshots(&folder);
    fs::remove_dir_all(&folder)?;
    ended
}

fn snapshots(folder: &Path) -> Result<(), Box<dyn Error>> {
    let base = folder.join("base");
    File::create(&base)?.set_len(BYTES)?;
    // The memory is the base, until it is written. Pages are read on first touch.
    let builder = Region::builder().name("memory").chunk(FileSource::open(&base)?).writable().track_changes();
    let memory = match builder.build_shared(&Pool::new()?) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            println!("{error}");
            return Ok(());
        }
        built => built?,
    };
    let mut diffs = Vec::new();
    for day in 1..=3_u64 {
        work(&memory, day)?;
        let path = folder.join(format!("day-{day}"));
        let diff = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        let changes = memory.save_changes(&diff)?;
        println!("day {day}: {} KiB changed in {} ranges", changes.bytes() >> 10, changes.len());
        diffs.push((diff, changes.collect::<Vec<_>>()));
    }
    let restored = restore(&base, &diffs)?;
    let mut now = vec![0; BYTES as usize];
    memory.read_at(0, &mut now)?;
    assert!(restored == now);
    println!("base and diffs together are the memory of today");
    Ok(())
}

/// A day's work: a few writes, some of them to pages of the day before.
fn work(memory: &SharedRegion, day: u64) -> Result<(), pagestitch::Error> {
    for step in 0..100 {
        let at = (step * 7_919 * 4096 + day * 500_000) % (BYTES - 8);
        memory.write_at(at, &(day * 1000 + step).to_le_bytes())?;
    }
    Ok(())
}

/// Lays the diffs over the base, the oldest first.
fn restore(base: &Path, diffs: &[(File, Vec<Range<u64>>)]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = fs::read(base)?;
    for (diff, changes) in diffs {
        for range in changes {
            let into = &mut bytes[range.start as usize..range.end as usize];
            diff.read_exact_at(into, range.start)?;
        }
    }
    Ok(bytes)
}
