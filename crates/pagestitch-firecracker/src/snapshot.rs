//! Memory files: a base, and diffs over it.
//!
//! ```text
//!   base     |aaaaaaaaaaaaaaaa|................|aaaaaaaa|     holes of the base are zeros
//!   monday   |        bbbb    |                |  bb    |     outside its extents a diff changes
//! nothing
//!   tuesday  |  cc            |                |  c     |
//!            ------------------------------------------
//!   memory   |aaccaaaabbbbaaaa|0000000000000000|aacbaaaa|     one list of pieces, over all files
//! ```

use crate::extents::data_in;
use crate::{Error, Extents};
use pagestitch::source::FileSource;
use pagestitch::{Chunk, Source};
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The memory of a guest at one moment: a base, and diffs over it. Any number of guests can be
/// restored from it.
///
/// A file is read when one of its pages is touched. Its data must not change while guests are
/// restored from it. If a file is truncated meanwhile, the pages behind its end fail.
#[derive(Debug, Clone)]
#[must_use]
pub struct Snapshot {
    bytes: u64,
    /// The start of each piece, and its file: `None` for zeros.
    pieces: Arc<Pieces>,
}

type Pieces = BTreeMap<u64, Option<Arc<FileSource>>>;

impl Snapshot {
    /// Opens the base, then the diffs over it, oldest first. Each diff has the length of the base,
    /// and its [extents](Extents) replace older data. The holes of a base are zeros.
    ///
    /// The extents of a diff lie beside it, in `DIFF.extents`. A diff without this file is refused,
    /// because its holes prove nothing: a copy may have left out zeros, or filled a hole.
    /// [`open_with`](Self::open_with) trusts the holes of files that Firecracker itself has
    /// written.
    ///
    /// # Errors
    ///
    /// [`Error`] names the file and its defect.
    pub fn open(files: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, Error> {
        Self::open_with(files, Holes::Untrusted)
    }

    /// Opens files as [`open`](Self::open) does; `holes` says how to read a diff without a file of
    /// extents.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open); [`Error::UnknownHoles`] if the file system does not report
    /// holes page by page, or the file has none.
    ///
    /// ```no_run
    /// use pagestitch_firecracker::{Holes, Snapshot};
    ///
    /// let memory = Snapshot::open_with(["base.mem", "monday.diff"], Holes::Unchanged)?;   // on the host that wrote them
    /// println!("{} bytes in {} pieces", memory.bytes(), memory.pieces());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_with(files: impl IntoIterator<Item = impl AsRef<Path>>, holes: Holes) -> Result<Self, Error> {
        let mut snapshot: Option<(u64, Pieces)> = None;
        for path in files {
            let path = path.as_ref();
            let layer = Layer::open(path, snapshot.is_some().then_some(holes))?;
            let (bytes, pieces) = snapshot.get_or_insert_with(|| (layer.bytes, Pieces::from([(0, None)])));
            if layer.bytes != *bytes {
                return Err(Error::LengthMismatch { path: path.into(), bytes: layer.bytes, base: *bytes });
            }
            for extent in layer.extents()? {
                lay(pieces, *bytes, &extent, &layer.file);
            }
        }
        let (bytes, pieces) = snapshot.ok_or(Error::NoFiles)?;
        Ok(Self { bytes, pieces: Arc::new(pieces) })
    }

    /// The bytes of memory.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of pieces that make up the memory.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// All pieces, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let ends = self.pieces.keys().skip(1).copied().chain([self.bytes]);
        self.pieces.iter().zip(ends).map(|((&start, file), end)| match file {
            Some(file) => Chunk::from(Arc::clone(file)).range(start..end),
            None => Chunk::hole(end - start),
        })
    }
}

/// Replaces a range.
fn lay(pieces: &mut Pieces, bytes: u64, extent: &Range<u64>, file: &Arc<FileSource>) {
    let behind = pieces.range(..=extent.end).next_back().map(|(_, before)| before.clone());
    let within: Vec<u64> = pieces.range(extent.clone()).map(|(&start, _)| start).collect();
    for start in within {
        pieces.remove(&start);
    }
    pieces.insert(extent.start, Some(Arc::clone(file)));
    // The piece before goes on where the extent ends.
    if let Some(behind) = behind.filter(|_| extent.end < bytes) {
        pieces.entry(extent.end).or_insert(behind);
    }
}

/// The meaning of holes in a diff.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holes {
    /// Holes prove nothing: a diff needs its [extents](Extents).
    #[default]
    Untrusted,
    /// Holes are unchanged memory, because Firecracker itself has written these files.
    Unchanged,
}

struct Layer<'a> {
    path: &'a Path,
    file: Arc<FileSource>,
    bytes: u64,
    /// For a diff: the meaning of its holes.
    holes: Option<Holes>,
}

impl<'a> Layer<'a> {
    fn open(path: &'a Path, holes: Option<Holes>) -> Result<Self, Error> {
        let file = Arc::new(FileSource::open(path)?);
        // The metadata of a block device says 0 bytes.
        let bytes = file.size();
        if bytes == 0 || bytes % 4096 != 0 {
            return Err(Error::NotPageAligned { path: path.into(), bytes });
        }
        Ok(Self { path, file, bytes, holes })
    }

    /// The ranges with data of this layer.
    fn extents(&self) -> Result<Vec<Range<u64>>, Error> {
        let Some(holes) = self.holes else { return self.data() };
        let extents = match (Extents::beside(self.path)?, holes) {
            (Some(extents), _) => extents,
            (None, Holes::Unchanged) => Extents::of(self.path)?,
            (None, Holes::Untrusted) => return Err(Error::MissingExtents(self.path.into())),
        };
        if extents.bytes() == self.bytes {
            Ok(extents.ranges().to_vec())
        } else {
            Err(Error::BadExtents(Extents::path_for(self.path)))
        }
    }

    /// The data of a base. Its holes are zeros, so they need no data.
    fn data(&self) -> Result<Vec<Range<u64>>, Error> {
        let data = fs::File::open(self.path).and_then(|file| data_in(&file, self.bytes));
        let data = data.map_err(|source| Error::Extents { path: self.path.into(), source })?;
        Ok(data.unwrap_or_else(|| std::iter::once(0..self.bytes).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UnknownHoles;
    use pagestitch::ErrorKind;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    const PAGE: u64 = 4096;

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

    /// The file of each page.
    fn layers(snapshot: &Snapshot) -> Vec<Option<String>> {
        use pagestitch::Source;
        let ends = snapshot.pieces.keys().skip(1).copied().chain([snapshot.bytes]);
        let pieces = snapshot.pieces.iter().zip(ends);
        let name = |file: &Arc<FileSource>| {
            Path::new(&file.name()).file_name().unwrap().to_str().unwrap().to_owned()
        };
        pieces
            .flat_map(|((&start, file), end)| vec![file.as_ref().map(name); ((end - start) / PAGE) as usize])
            .collect()
    }

    #[test]
    fn a_page_comes_from_the_last_diff_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let base = sparse(folder.path(), "base", 20, &[0..8, 12..20], 1);
        let monday = sparse(folder.path(), "monday", 20, &[4..6, 14..16], 2);
        let tuesday = sparse(folder.path(), "tuesday", 20, &[5..7, 0..1, 19..20], 3);
        let snapshot = Snapshot::open_with([base, monday, tuesday], Holes::Unchanged).unwrap();
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

    /// The extents of a diff decide the bytes of a guest, whatever a copy has made of the holes.
    #[test]
    fn a_diff_needs_a_file_of_extents() {
        let folder = tempfile::tempdir().unwrap();
        let base = sparse(folder.path(), "base", 20, &[0..10, 10..20], 1);
        let diff = sparse(folder.path(), "diff", 20, &[4..6, 14..16], 2);
        let refused = |diff: &Path, holes| Snapshot::open_with([&base, diff], holes).unwrap_err();
        assert!(matches!(refused(&diff, Holes::Untrusted), Error::MissingExtents(path) if path == diff));
        let trusted = layers(&Snapshot::open_with([&base, &diff], Holes::Unchanged).unwrap());
        // A copy without holes, and one that lacks a page of zeros.
        let filled = folder.path().join("filled");
        fs::write(&filled, fs::read(&diff).unwrap()).unwrap();
        let lost = sparse(folder.path(), "lost", 20, &[4..5, 15..16], 2);
        let error = refused(&filled, Holes::Unchanged);
        assert!(matches!(error, Error::UnknownHoles { reason: UnknownHoles::NoHole, .. }), "{error}");
        let extents = Extents::of(&diff).unwrap();
        for copy in [&diff, &filled, &lost] {
            extents.write(copy).unwrap();
            let name = copy.file_name().unwrap().to_str().unwrap();
            let expected =
                trusted.iter().map(|layer| layer.as_ref().map(|layer| layer.replace("diff", name)));
            assert_eq!(layers(&Snapshot::open([&base, copy]).unwrap()), expected.collect::<Vec<_>>());
        }
        let text = fs::read_to_string(Extents::path_for(&diff)).unwrap();
        fs::write(Extents::path_for(&diff), text.replace("bytes 81920", "bytes 40960")).unwrap();
        let error = refused(&diff, Holes::Unchanged);
        assert!(matches!(&error, Error::BadExtents(path) if *path == Extents::path_for(&diff)), "{error}");
    }

    #[test]
    fn a_bad_snapshot_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |files: &[&Path]| Snapshot::open_with(files, Holes::Unchanged).unwrap_err();
        assert!(matches!(refused(&[]), Error::NoFiles));
        let none = folder.path().join("none");
        for (path, kind) in [(none.as_path(), ErrorKind::Io), (folder.path(), ErrorKind::UnusableFile)] {
            let Error::Memory(error) = refused(&[path]) else { panic!("{}", path.display()) };
            assert_eq!((error.kind(), error.path()), (kind, Some(path)), "{error}");
        }
        let (base, short) = (folder.path().join("base"), folder.path().join("short"));
        fs::write(&base, vec![1; 8192]).unwrap();
        fs::write(&short, vec![1; 4096]).unwrap();
        let error = refused(&[&base, &short]);
        assert!(matches!(error, Error::LengthMismatch { bytes: 4096, base: 8192, .. }), "{error}");
        fs::write(&short, vec![1; 5000]).unwrap();
        assert!(matches!(refused(&[&short]), Error::NotPageAligned { bytes: 5000, .. }));
        fs::write(&short, b"").unwrap();
        assert!(matches!(refused(&[&short]), Error::NotPageAligned { bytes: 0, .. }));
    }
}
