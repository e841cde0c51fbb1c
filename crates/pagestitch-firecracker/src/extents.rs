//! The ranges of a diff that hold changed memory. The file itself does not prove them. A hole may
//! be unchanged memory, or a page of zeros that a copy left out. Data may be a changed page, a hole
//! that a copy filled, or a hole that the file system does not report.
//!
//! ```text
//!   pagestitch-extents 1
//!   bytes 536870912            the length of the diff
//!   4096 12288                 start and end in bytes: whole pages, in order
//!   1048576 1052672
//!   end 2                      the number of these lines: a truncated file is no proof
//! ```

use crate::{Error, UnknownHoles};
use nix::errno::Errno;
use nix::libc::O_NONBLOCK;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};
use pagestitch_kernel::replace::replace;
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The ranges of a diff that hold changed memory. Kept in a file beside the diff, `DIFF.extents`,
/// they are the proof that [`Snapshot::open`](crate::Snapshot::open) needs, and survive every way
/// to copy the two files.
///
/// ```no_run
/// use pagestitch_firecracker::Extents;
///
/// // Where Firecracker has just written it, before it is copied or compressed:
/// Extents::of("monday.diff")?.write("monday.diff")?;          // monday.diff.extents
/// # Ok::<(), pagestitch_firecracker::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extents {
    bytes: u64,
    ranges: Vec<Range<u64>>,
}

impl Extents {
    /// Asks the file system for the holes of a diff, and takes each hole for unchanged memory. That
    /// is true of the file that Firecracker has written; a copy may have lost holes, or have other
    /// ones.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownHoles`] if the file system does not report holes page by page, or the file
    /// has none; [`Error::NotPageAligned`]; [`Error::Extents`].
    ///
    /// ```no_run
    /// use pagestitch_firecracker::Extents;
    ///
    /// let extents = Extents::of("monday.diff")?;                  // before the diff is copied to another host
    /// println!("{} changed bytes in {} ranges", extents.bytes(), extents.ranges().len());
    /// let beside = extents.write("monday.diff")?;
    /// assert_eq!(beside, Extents::path_for("monday.diff"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of(diff: impl AsRef<Path>) -> Result<Self, Error> {
        let path = diff.as_ref();
        let failed = |source| Error::Extents { path: path.into(), source };
        // Non-blocking, because the open of a named pipe would wait for a writer.
        let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let refused = |reason| Err(Error::UnknownHoles { path: path.into(), reason });
        if !metadata.is_file() {
            return refused(UnknownHoles::NotRegular);
        }
        let system = fstatfs(&file).map_err(|errno| failed(errno.into()))?;
        // A tmpfs of huge pages reports holes of whole huge pages only.
        let huge = system.filesystem_type() == TMPFS_MAGIC && metadata.blksize() > PAGE;
        if huge || u64::try_from(system.block_size()).is_ok_and(|bytes| bytes > PAGE) {
            return refused(UnknownHoles::LargeBlocks);
        }
        let bytes = metadata.len();
        if bytes == 0 || bytes % PAGE != 0 {
            return Err(Error::NotPageAligned { path: path.into(), bytes });
        }
        let ranges = data_in(&file, bytes).map_err(failed)?;
        match ranges.as_deref() {
            None => refused(UnknownHoles::NotReported),
            Some([all]) if *all == (0..bytes) && metadata.blocks() * 512 < bytes => {
                refused(UnknownHoles::Hidden)
            }
            Some([all]) if *all == (0..bytes) => refused(UnknownHoles::NoHole),
            Some(_) => Ok(Self { bytes, ranges: ranges.unwrap_or_default() }),
        }
    }

    /// The extents of a diff of `bytes` bytes that a program has written itself, such as
    /// `SharedRegion::save_changes` of the crate `pagestitch`, which returns the ranges. `None` unless
    /// they are whole pages of 4 KiB, ascending, and inside the diff.
    ///
    /// ```
    /// use pagestitch_firecracker::Extents;
    ///
    /// let extents = Extents::new(1 << 20, [4096..12_288, 65_536..69_632]).expect("whole pages, in order");
    /// assert_eq!(extents.ranges().len(), 2);
    /// assert_eq!(Extents::new(1 << 20, [100..200]), None);
    /// ```
    #[must_use]
    pub fn new(bytes: u64, ranges: impl IntoIterator<Item = Range<u64>>) -> Option<Self> {
        let ranges: Vec<Range<u64>> = ranges.into_iter().collect();
        let mut before = 0;
        for range in &ranges {
            let whole = range.start % PAGE == 0 && range.end % PAGE == 0;
            if !whole || range.is_empty() || range.start < before || range.end > bytes {
                return None;
            }
            before = range.end;
        }
        Some(Self { bytes, ranges })
    }

    /// The path of the extents of a diff: `DIFF.extents`.
    #[must_use]
    pub fn path_for(diff: impl AsRef<Path>) -> PathBuf {
        let mut path = diff.as_ref().as_os_str().to_owned();
        path.push(".extents");
        path.into()
    }

    /// Writes the extents beside the diff at this path, all or nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Extents`] names the file and the error of the kernel.
    pub fn write(&self, diff: impl AsRef<Path>) -> Result<PathBuf, Error> {
        let path = Self::path_for(diff);
        match replace(&path, self.to_text().as_bytes()) {
            Ok(()) => Ok(path),
            Err(source) => Err(Error::Extents { path, source }),
        }
    }

    /// The extents that are kept beside a diff, if there are any.
    pub(crate) fn beside(diff: &Path) -> Result<Option<Self>, Error> {
        let path = Self::path_for(diff);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Extents { path, source }),
        };
        Self::parse(&text).map(Some).ok_or(Error::BadExtents(path))
    }

    /// The bytes of the diff.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The ranges, in order.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    fn to_text(&self) -> String {
        let mut text = format!("{MAGIC}\nbytes {}\n", self.bytes);
        for Range { start, end } in &self.ranges {
            let _ = writeln!(text, "{start} {end}");
        }
        let _ = writeln!(text, "end {}", self.ranges.len());
        text
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_prefix(MAGIC)?.strip_prefix('\n')?.strip_suffix('\n')?.lines();
        let bytes = lines.next()?.strip_prefix("bytes ")?.parse().ok()?;
        let count: usize = lines.next_back()?.strip_prefix("end ")?.parse().ok()?;
        let range = |line: &str| {
            let (start, end) = line.split_once(' ')?;
            Some(start.parse().ok()?..end.parse().ok()?)
        };
        let ranges: Vec<Range<u64>> = lines.map(range).collect::<Option<_>>()?;
        (ranges.len() == count).then(|| Self::new(bytes, ranges)).flatten()
    }
}

/// The ranges of a file that are data, in whole pages; None if the file system does not know of
/// holes. See `lseek(2)`.
pub(crate) fn data_in(file: &File, bytes: u64) -> io::Result<Option<Vec<Range<u64>>>> {
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            // The rest of the file is a hole.
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) if at == 0 => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        // The file system reports holes by its own blocks, which may be smaller than a page. A page
        // with any data is data.
        let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(bytes));
        match extents.last_mut() {
            Some(before) if before.end >= first => before.end = last,
            _ => extents.push(first..last),
        }
        at = end;
    }
    Ok(Some(extents))
}

const MAGIC: &str = "pagestitch-extents 1";
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extents_survive_a_round_trip(lengths in prop::collection::vec((1u64..9, 1u64..9), 0..50)) {
            let mut at = 0;
            let ranges = lengths.iter().map(|(gap, pages)| {
                let start = at + gap * PAGE;
                at = start + pages * PAGE;
                start..at
            });
            let ranges: Vec<_> = ranges.collect();
            let extents = Extents { bytes: at + PAGE, ranges };
            let text = extents.to_text();
            prop_assert_eq!(Extents::parse(&text), Some(extents));
            for cut in 0..text.len() {
                prop_assert_eq!(Extents::parse(&text[..cut]), None);
            }
        }
    }

    #[test]
    fn malformed_extents_are_refused() {
        for ranges in [
            "4096 4096",
            "4096 8191",
            "8192 12288\n4096 8192",
            "0 20480",
            "8192 4096",
            "0 4096 8192",
            "x 4096",
        ] {
            let text = format!("{MAGIC}\nbytes 16384\n{ranges}\nend {}\n", ranges.lines().count());
            assert_eq!(Extents::parse(&text), None, "{ranges}");
        }
        assert_eq!(Extents::parse("pagestitch-extents 2\nbytes 4096\nend 0\n"), None);
    }
}
