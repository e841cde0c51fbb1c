//! Memory files: a base, and diffs over it.
//!
//! ```text
//!   base     |aaaaaaaaaaaaaaaa|................|aaaaaaaa|     what is sparse in the base is zeros
//!   monday   |        bbbb    |                |  bb    |     what is sparse in a diff is as before
//!   tuesday  |  cc            |                |  c     |
//!            ------------------------------------------
//!   memory   |aaccaaaabbbbaaaa|0000000000000000|aacbaaaa|     one list of pieces, over all of them
//! ```

use crate::Error;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use pagestitch::source::File;
use pagestitch::{Chunk, Source};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The memory of a guest at one moment: a base, and diffs over it. Any number of guests can be restored from it.
///
/// Files are read when a page is touched; their data must not change while guests are restored from them. A file that is cut
/// short meanwhile is an error of the pages behind its end.
#[derive(Debug, Clone)]
pub struct Snapshot {
    bytes: u64,
    /// Where each piece begins, and whose it is: `None` for zeros.
    pieces: Arc<Pieces>,
}

type Pieces = BTreeMap<u64, Option<Arc<File>>>;

impl Snapshot {
    /// Opens the base, then the diffs over it, oldest first: sparse files as long as the base, whose data replaces what was
    /// before.
    ///
    /// # Errors
    ///
    /// [`Error`] names the file and what is wrong with it.
    pub fn open(files: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, Error> {
        let mut snapshot: Option<(u64, Pieces)> = None;
        for path in files {
            let path = path.as_ref();
            let layer = Layer::open(path)?;
            let (bytes, pieces) = snapshot.get_or_insert_with(|| (layer.bytes, Pieces::from([(0, None)])));
            if layer.bytes != *bytes {
                return Err(Error::Length { path: path.into(), bytes: layer.bytes, base: *bytes });
            }
            for extent in &layer.extents {
                lay(pieces, *bytes, extent, &layer.file);
            }
        }
        let (bytes, pieces) = snapshot.ok_or(Error::NoFiles)?;
        Ok(Self { bytes, pieces: Arc::new(pieces) })
    }

    /// How many bytes of memory there are.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many pieces it is put together from.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// All of it, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let ends = self.pieces.keys().skip(1).copied().chain([self.bytes]);
        self.pieces.iter().zip(ends).map(|((&start, file), end)| match file {
            Some(file) => Chunk::from(Arc::clone(file)).range(start..end),
            None => Chunk::hole(end - start),
        })
    }
}

/// Replaces what is in a range.
fn lay(pieces: &mut Pieces, bytes: u64, extent: &Range<u64>, file: &Arc<File>) {
    let behind = pieces.range(..=extent.end).next_back().map(|(_, before)| before.clone());
    let within: Vec<u64> = pieces.range(extent.clone()).map(|(&start, _)| start).collect();
    for start in within {
        pieces.remove(&start);
    }
    pieces.insert(extent.start, Some(Arc::clone(file)));
    // What was before goes on where this ends.
    if let Some(behind) = behind.filter(|_| extent.end < bytes) {
        pieces.entry(extent.end).or_insert(behind);
    }
}

struct Layer {
    file: Arc<File>,
    bytes: u64,
    extents: Vec<Range<u64>>,
}

impl Layer {
    fn open(path: &Path) -> Result<Self, Error> {
        let file = Arc::new(File::open(path)?);
        let extents = |source| Error::Extents { path: path.into(), source };
        // The metadata of a block device says 0 bytes.
        let (bytes, data) = (file.size(), fs::File::open(path).map_err(extents)?);
        if bytes == 0 || !bytes.is_multiple_of(4096) {
            return Err(Error::Ragged { path: path.into(), bytes });
        }
        let extents = data_in(&data, bytes).map_err(extents)?;
        Ok(Self { file, bytes, extents })
    }
}

/// The ranges of a file that are not sparse, whole pages. See `lseek(2)`.
fn data_in(file: &fs::File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match lseek(file, at.cast_signed(), Whence::SeekData) {
            Ok(start) => start.cast_unsigned(),
            // Nothing but a hole up to the end.
            Err(Errno::ENXIO) => break,
            // A file system that does not know of holes: all of it is data.
            Err(Errno::EINVAL) if at == 0 => return Ok(std::iter::once(0..bytes).collect()),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start.cast_signed(), Whence::SeekHole)?.cast_unsigned();
        // A hole is seen by blocks of the file system, which may be smaller than a page, where all is told.
        extents.push(start / PAGE * PAGE..end.next_multiple_of(PAGE).min(bytes));
        at = end;
    }
    Ok(extents)
}

const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    fn sparse(folder: &Path, name: &str, pages: u64, data: &[Range<u64>], byte: u8) -> PathBuf {
        let path = folder.join(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(pages * PAGE).unwrap();
        for range in data {
            let bytes = vec![byte; ((range.end - range.start) * PAGE) as usize];
            file.write_all_at(&bytes, range.start * PAGE).unwrap();
        }
        path
    }

    /// Page for page: the file that it comes from.
    fn layers(snapshot: &Snapshot) -> Vec<Option<String>> {
        use pagestitch::Source;
        let ends = snapshot.pieces.keys().skip(1).copied().chain([snapshot.bytes]);
        let pieces = snapshot.pieces.iter().zip(ends);
        let name =
            |file: &Arc<File>| Path::new(&file.name()).file_name().unwrap().to_str().unwrap().to_owned();
        pieces
            .flat_map(|((&start, file), end)| vec![file.as_ref().map(name); ((end - start) / PAGE) as usize])
            .collect()
    }

    #[test]
    fn the_last_diff_that_has_a_page_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let base = sparse(folder.path(), "base", 20, &[0..8, 12..20], 1);
        let monday = sparse(folder.path(), "monday", 20, &[4..6, 14..16], 2);
        let tuesday = sparse(folder.path(), "tuesday", 20, &[5..7, 0..1, 19..20], 3);
        let snapshot = Snapshot::open([base, monday, tuesday]).unwrap();
        assert_eq!(snapshot.bytes(), 20 * PAGE);
        let expected: Vec<_> = (0..20)
            .map(|page| match page {
                0 | 5 | 6 | 19 => Some("tuesday"),
                4 | 14 | 15 => Some("monday"),
                8..12 => None,
                _ => Some("base"),
            })
            .map(|name| name.map(str::to_owned))
            .collect();
        assert_eq!(layers(&snapshot), expected);
        assert_eq!(snapshot.chunks().count(), snapshot.pieces());
    }

    #[test]
    fn what_is_no_snapshot_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |files: &[&Path]| Snapshot::open(files).unwrap_err().to_string();
        assert!(refused(&[]).contains("at least one"));
        assert!(refused(&[&folder.path().join("none")]).contains("none"));
        assert!(refused(&[folder.path()]).contains("is a directory"));
        let (base, short) = (folder.path().join("base"), folder.path().join("short"));
        fs::write(&base, vec![1; 8192]).unwrap();
        fs::write(&short, vec![1; 4096]).unwrap();
        let told = refused(&[&base, &short]);
        assert!(told.contains("short has 4096 bytes and its base 8192"), "{told}");
        fs::write(&short, vec![1; 5000]).unwrap();
        assert!(refused(&[&short]).contains("not whole pages"));
        fs::write(&short, b"").unwrap();
        assert!(refused(&[&short]).contains("0 bytes"));
    }
}
