//! Files laid end to end, mapped in place, and read on first touch.
//! `cargo run --example files_as_one`.
//!
//! `page_aligned` lays each file on a page boundary, so that all of it can be mapped in place. Other
//! processes may write to these files; for files that do not change, see `weights`.

use pagestitch::source::SharedFile;
use pagestitch::{Access, Region, best_server};
use std::error::Error;
use std::fs;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join(format!("pagestitch-files-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let paths = ["first", "second", "third"].map(|name| folder.join(name));
    for (path, bytes) in paths.iter().zip([10_000, 3, 8192]) {
        fs::write(path, format!("{:-^bytes$}", path.display()))?;
    }

    let files = paths.iter().map(|path| SharedFile::open(path, Access::ReadOnly));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let builder = Region::builder().name("files").page_aligned().chunks(files).require_zero_copy();
    let region = builder.build_shared(&best_server()?)?;

    println!("{}", region.plan());
    for (number, path) in paths.iter().enumerate() {
        let (start, bytes) = (region.offset_of(number).expect("a file each"), fs::read(path)?);
        let mut seen = vec![0; bytes.len()];
        region.read_at(start, &mut seen)?;
        assert!(seen == bytes);
        println!("{:6} bytes of {} at {start:#x}", bytes.len(), path.display());
    }
    assert_eq!(region.close().bytes_copied, 0);
    fs::remove_dir_all(folder)?;
    Ok(())
}
