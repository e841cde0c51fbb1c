//! A table in a file: rows are written in the region, flushed, and read back from the file.
//! `cargo run --example write_back`.
//!
//! The file has its old bytes until the flush, and an error of the disk is a value, not a signal.

use pagestitch::source::WritableFile;
use pagestitch::{Chunk, ErrorKind, Pool, Region, WriteBack};
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// A row: a number, and its square.
const ROW: u64 = 16;
const ROWS: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-table-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let ended = table(&folder.join("table"));
    fs::remove_dir_all(&folder)?;
    ended
}

fn table(path: &Path) -> Result<(), Box<dyn Error>> {
    File::create(path)?.set_len(ROW * ROWS)?;
    let chunk = Chunk::writable(Arc::new(WritableFile::open(path)?));
    let builder = Region::builder().name("table").chunk(chunk).write_back(WriteBack::ToSource);
    let table = match builder.build_shared(&Pool::new()?) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            println!("{error}");
            return Ok(());
        }
        built => built?,
    };
    let file = File::open(path)?;
    for number in (0..ROWS).step_by(50_000) {
        table.write_at(number * ROW, &row(number))?;
    }
    assert_eq!(read(&file, 50_000)?, [0; ROW as usize], "nothing is written before the flush");
    table.flush(..)?;
    assert_eq!(read(&file, 50_000)?, row(50_000));
    println!("21 rows are in the file, and synced");

    // The end of the region flushes too. `finish` returns its error, which a drop could only log.
    table.write_at(7 * ROW, &row(7))?;
    let metrics = table.finish()?;
    assert_eq!(read(&file, 7)?, row(7));
    println!("{} of {} pages were read", metrics.pages_installed(), ROW * ROWS / 4096);
    Ok(())
}

fn row(number: u64) -> [u8; ROW as usize] {
    let mut row = [0; ROW as usize];
    row[..8].copy_from_slice(&number.to_le_bytes());
    row[8..].copy_from_slice(&(number * number).to_le_bytes());
    row
}

fn read(file: &File, number: u64) -> std::io::Result<[u8; ROW as usize]> {
    let mut row = [0; ROW as usize];
    file.read_exact_at(&mut row, number * ROW)?;
    Ok(row)
}
