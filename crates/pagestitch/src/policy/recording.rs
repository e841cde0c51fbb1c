//! Recordings: the order in which the pages of a region were first touched. A replay fills a region
//! in this order, ahead of its touches.
//!
//! The encoding. Numbers are varints; a run is a sequence of adjacent pages.
//!
//! ```text
//!   "pgstrec1" | page size | region bytes | number of runs | runs ... | checksum of all before (8 bytes)
//!
//!   run:  zigzag(distance from the end of the run before) << 1 | (more than one page)
//!         the number of pages, if more than one
//! ```

use crate::error::{BuildOption, Bytes, Error, ErrorKind};
use pagestitch_kernel::atomic_table::AtomicTable;
use pagestitch_kernel::replace::{can_replace, replace};
use pagestitch_kernel::{Errno, Page, PageSize, Span};
use parking_lot::Mutex;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The order in which the pages of a region were first touched. A region that
/// [records](crate::Builder::record) returns it from [`recording`](crate::AnyRegion::recording); a
/// later region of the same size [replays](crate::Builder::replay) it.
///
/// ```
/// use pagestitch::{Pool, Recording, Region};
///
/// let pool = Pool::new()?;
/// let build = || Region::builder().chunk(vec![7u8; 100_000]);
/// let first = build().record().build(&pool)?;
/// assert_eq!(first.as_slice()[50_000] + first.as_slice()[9_000], 14);
/// let recording = first.recording().expect("it records");
/// assert_eq!(recording.offsets().collect::<Vec<_>>(), [49_152, 8192]);
///
/// let second = build().replay(&recording).build(&pool)?;      // fills these pages before they are touched
/// # drop(second);
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    page: PageSize,
    bytes: u64,
    /// Runs of adjacent pages, in the order of their touches.
    runs: Arc<[Span]>,
}

impl Recording {
    /// The number of touched pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// True if no page was touched.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).record().build(&Pool::new()?)?;
    /// assert!(region.recording().expect("it records").is_empty());
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// assert!(!region.recording().expect("it records").is_empty());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The byte offsets of the pages in the region, in the order of their touches.
    pub fn offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().flat_map(|run| run.iter()).map(|page| self.page.offset_of(page))
    }

    /// Writes the recording to a file, atomically. Takes about three bytes a page.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] names the path and the kernel's error.
    ///
    /// ```no_run
    /// # use pagestitch::{Pool, Recording, Region};
    /// Recording::can_write("/var/lib/app/touches")?;              // before the work, not after it
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).record().build(&Pool::new()?)?;
    /// // The work, which touches the region.
    /// region.recording().expect("it records").write("/var/lib/app/touches")?;
    /// let for_the_next_run = Recording::read("/var/lib/app/touches")?;
    /// # let _ = for_the_next_run;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        replace(path, &self.to_bytes()).map_err(|error| cannot_write(path, error))
    }

    /// Checks whether [`write`](Self::write) can work at this path, without writing, so that a
    /// program can fail before the recorded run, not after it.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), as far as the errors can be foreseen: no such directory, no
    /// permission.
    pub fn can_write(path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        can_replace(path).map_err(|error| cannot_write(path, error))
    }

    /// Reads a file written by [`write`](Self::write).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if the file cannot be read; [`ErrorKind::InvalidRecording`] if it is no
    /// recording, or is damaged.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let encoded = fs::read(path).map_err(|error| Error::io("cannot read", path, error))?;
        let invalid = |why| {
            let what = format!("{} {why}", path.display());
            Error::new(ErrorKind::InvalidRecording, what).at_path(path)
        };
        Self::decode(&encoded).map_err(invalid)
    }

    /// Decodes the bytes that [`to_bytes`](Self::to_bytes) returns.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidRecording`] if the bytes are not a recording, or are damaged.
    pub fn from_bytes(encoded: &[u8]) -> Result<Self, Error> {
        Self::decode(encoded)
            .map_err(|why| Error::new(ErrorKind::InvalidRecording, format!("the data {why}")))
    }

    fn of(page: PageSize, bytes: u64, pages: &[Page]) -> Self {
        let runs = pages.chunk_by(|before, page| page.0 == before.0 + 1);
        let runs = runs.map(|run| Span { first: run[0], pages: run.len() }).collect();
        Self { page, bytes, runs }
    }

    /// The length of the recorded region, in bytes.
    #[must_use]
    pub const fn region_bytes(&self) -> u64 {
        self.bytes
    }

    /// The size of the recorded pages, in bytes.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// # let region = Region::builder().chunk(vec![7u8; 100_000]).record().build(&Pool::new()?)?;
    /// let recording = region.recording().expect("it records");
    /// println!("{} of {} bytes were touched", recording.len() * recording.page_bytes(), recording.region_bytes());
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        self.page.bytes()
    }

    /// Refuses a region with another page size or length.
    pub(crate) fn check(&self, page: PageSize, bytes: u64) -> Result<(), Error> {
        if (self.page, self.bytes) == (page, bytes) {
            return Ok(());
        }
        let what = format!(
            "the recording is of a region of {} in pages of {}, but this region has {} in pages of {page}: record it anew",
            Bytes(self.bytes),
            self.page,
            Bytes(bytes)
        );
        Err(Error::new(ErrorKind::InvalidRecording, what).of_option(BuildOption::Replay))
    }

    /// Encodes the recording, as [`write`](Self::write) does.
    ///
    /// ```
    /// # use pagestitch::{Pool, Recording, Region};
    /// let region = Region::builder().chunk(vec![7u8; 100_000]).record().build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[50_000], 7);
    /// let recording = region.recording().expect("it records");
    /// assert_eq!(Recording::from_bytes(&recording.to_bytes())?, recording);
    /// assert_eq!((recording.len(), recording.region_bytes()), (1, 100_000));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for number in [self.page.bytes() as u64, self.bytes, self.runs.len() as u64] {
            put(&mut out, number);
        }
        let mut end = 0;
        for run in self.runs.iter() {
            let distance = (run.first.0 as i64).wrapping_sub(end);
            let several = run.pages > 1;
            let zigzag = ((distance << 1) ^ (distance >> 63)) as u64;
            put(&mut out, zigzag << 1 | u64::from(several));
            if several {
                put(&mut out, run.pages as u64);
            }
            end = run.end().0 as i64;
        }
        let sum = checksum(&out);
        out.extend(sum.to_le_bytes());
        out
    }

    fn decode(encoded: &[u8]) -> Result<Self, &'static str> {
        let damaged = "is damaged or cut short: record it anew";
        let rest = encoded.strip_prefix(MAGIC).ok_or("is no recording of first touches")?;
        let (rest, sum) = rest.split_last_chunk::<8>().ok_or(damaged)?;
        if checksum(&encoded[..encoded.len() - 8]) != u64::from_le_bytes(*sum) {
            return Err(damaged);
        }
        let mut rest = rest;
        let mut next = || take(&mut rest).ok_or(damaged);
        let page = usize::try_from(next()?).ok().and_then(PageSize::new).ok_or(damaged)?;
        let (bytes, count) = (next()?, next()?);
        let all = page.round_up(bytes).ok_or(damaged)? / page.bytes() as u64;
        let mut runs = Vec::new();
        let mut end = 0_i64;
        for _ in 0..count {
            let head = next()?;
            let distance = (head >> 2) as i64 ^ -((head >> 1 & 1) as i64);
            let length = if head & 1 == 1 { next()? } else { 1 };
            let first =
                end.checked_add(distance).and_then(|first| u64::try_from(first).ok()).ok_or(damaged)?;
            let last = first.checked_add(length).filter(|&last| length > 0 && last <= all);
            end = last.and_then(|last| i64::try_from(last).ok()).ok_or(damaged)?;
            runs.push(Span { first: Page(first as usize), pages: length as usize });
        }
        if rest.is_empty() { Ok(Self { page, bytes, runs: runs.into() }) } else { Err(damaged) }
    }
}

/// Records the pages of faults, without a lock or an allocation. It has an entry for each page of
/// the region. A page that is discarded and touched again is recorded again while entries are left.
#[derive(Debug)]
pub(crate) struct TouchRecorder {
    next: AtomicUsize,
    /// Each entry is a page number plus one; 0 while it is not written yet.
    pages: AtomicTable,
}

impl TouchRecorder {
    pub(crate) fn new(pages: NonZeroUsize) -> Result<Self, Errno> {
        Ok(Self { next: AtomicUsize::new(0), pages: AtomicTable::new(pages)? })
    }

    /// Records a fault on a page.
    pub(crate) fn note(&self, page: Page) {
        if let Some(word) = self.pages.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            word.store(page.0 as u64 + 1, Ordering::Release);
        }
    }

    pub(crate) fn read(&self, page: PageSize, bytes: u64) -> Recording {
        let noted = self.next.load(Ordering::Relaxed).min(self.pages.len());
        let words = self.pages[..noted].iter().map(|word| word.load(Ordering::Acquire));
        let pages: Vec<Page> = words.filter(|&word| word > 0).map(|word| Page(word as usize - 1)).collect();
        Recording::of(page, bytes, &pages)
    }
}

/// The progress of a replay.
#[derive(Debug)]
pub(crate) struct Replay {
    recording: Recording,
    /// The next run, and the number of its pages that have been replayed.
    next: Mutex<(usize, usize)>,
}

impl Replay {
    pub(crate) const fn new(recording: Recording) -> Self {
        Self { recording, next: Mutex::new((0, 0)) }
    }

    /// The next few pages, as runs sorted by address; `None` at the end.
    pub(crate) fn next(&self) -> Option<impl Iterator<Item = Span>> {
        let mut few = [Span { first: Page(0), pages: 0 }; AT_ONCE];
        let (mut runs, mut left) = (0, AT_ONCE);
        let mut next = self.next.lock();
        while left > 0 {
            let Some(run) = self.recording.runs.get(next.0) else { break };
            few[runs] = run.without_prefix(next.1).prefix(left);
            left -= few[runs].pages;
            *next = if few[runs].end() == run.end() {
                (next.0 + 1, 0)
            } else {
                (next.0, next.1 + few[runs].pages)
            };
            runs += 1;
        }
        few[..runs].sort_unstable_by_key(|run| run.first);
        (runs > 0).then(|| few.into_iter().take(runs))
    }
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::io("cannot write", path, error)
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, later) = rest.split_first()?;
        *rest = later;
        let bits = u64::from(byte & 0x7f);
        number |= bits.checked_shl(shift).filter(|shifted| shifted >> shift == bits)?;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// FNV-1a: detects accidental damage, not forgery.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

const MAGIC: &[u8] = b"pgstrec1";
/// Pages replayed between two checks for faults.
const AT_ONCE: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recording(bytes: u64, pages: Vec<usize>) -> Recording {
        let pages: Vec<Page> = pages.into_iter().map(Page).collect();
        Recording::of(PageSize::new(4096).unwrap(), bytes, &pages)
    }

    proptest! {
        #[test]
        fn a_decoded_recording_is_the_encoded_one(pages in prop::collection::vec(0usize..10_000, 0..300), run in 0usize..50) {
            let pages = pages.into_iter().chain(9_000..9_000 + run).collect();
            let recording = recording(10_000 * 4096 - 5, pages);
            prop_assert_eq!(Recording::decode(&recording.to_bytes()), Ok(recording));
        }

        #[test]
        fn a_damaged_recording_is_refused(cut in 0usize..60, flip in 0usize..60, bit in 0u8..8) {
            let whole = recording(1 << 30, (0..20).map(|page| page * 37 % 1000).collect()).to_bytes();
            prop_assert!(Recording::decode(&whole[..cut.min(whole.len() - 1)]).is_err());
            let mut flipped = whole.clone();
            flipped[flip % whole.len()] ^= 1 << bit;
            prop_assert!(Recording::decode(&flipped).is_err());
        }

        /// Bytes with a correct checksum neither panic nor allocate more than their length
        /// justifies.
        #[test]
        fn arbitrary_bytes_with_a_checksum_decode_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut whole = [MAGIC, &bytes].concat();
            whole.extend(checksum(&whole).to_le_bytes());
            let _ = Recording::decode(&whole);
        }
    }

    #[test]
    fn a_replay_returns_all_pages_a_few_at_a_time() {
        let pages: Vec<usize> = (0..100).chain([500, 400]).chain(300..340).collect();
        let replay = Replay::new(recording(1 << 30, pages.clone()));
        let mut replayed = Vec::new();
        while let Some(runs) = replay.next() {
            let few: Vec<usize> = runs.flat_map(|run| run.iter().map(|page| page.0)).collect();
            assert!(few.len() <= AT_ONCE && few.is_sorted());
            replayed.extend(few);
        }
        replayed.sort_unstable();
        let mut pages = pages;
        pages.sort_unstable();
        assert_eq!(replayed, pages);
    }

    #[test]
    fn an_encoded_recording_is_compact() {
        let random: Vec<usize> = (0..50_000).map(|i: usize| i.wrapping_mul(0x9e37_79b9) % 500_000).collect();
        let encoded = recording(2 << 30, random).to_bytes();
        assert!(encoded.len() < 50_000 * 7 / 2, "{} bytes", encoded.len());
        assert!(recording(2 << 30, (0..500_000).collect()).to_bytes().len() < 40);
    }

    #[test]
    fn a_run_past_the_region_is_refused() {
        let mut out = MAGIC.to_vec();
        [4096, 8192, 1, 1, u64::MAX].into_iter().for_each(|number| put(&mut out, number));
        out.extend(checksum(&out).to_le_bytes());
        assert!(Recording::decode(&out).is_err());
    }
}
