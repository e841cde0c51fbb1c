//! The pages of a region that were written, and a file with their bytes.

use crate::api::AnyRegion;
use crate::error::{Error, ErrorKind};
use crate::space::{ChangedPages, RecordFor, WrittenPages};
use pagestitch_kernel::{Errno, Page, Span};
use std::fs::File;
use std::iter::FusedIterator;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::vec;

/// The ranges of a region that were written between two calls of
/// [`changes`](AnyRegion::changes): byte offsets of whole pages, ascending, without two that touch.
/// The last range may end with the region inside a page.
///
/// ```
/// # use pagestitch::{Errno, ErrorKind, Pool, Region};
/// let builder = Region::builder().chunk(vec![7u8; 40_000]).writable().track_changes();
/// let mut region = match builder.build(&Pool::new()?) {
///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),   // Linux before 6.7
///     built => built?,
/// };
/// region.write_at(4_095, b"two pages")?;
/// region.write_at(39_999, b"!")?;
/// let changes = region.changes()?;
/// assert_eq!((changes.len(), changes.bytes()), (2, 8_192 + 3_136));
/// assert!(changes.eq([0..8_192, 36_864..40_000]));
/// assert_eq!(region.changes()?.len(), 0);                     // none since
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Changes {
    runs: vec::IntoIter<Range<u64>>,
}

impl Changes {
    /// The number of bytes in the ranges that are left.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.as_slice().iter().map(|run| run.end - run.start).sum()
    }

    /// The ranges that are left.
    #[must_use]
    pub fn as_slice(&self) -> &[Range<u64>] {
        self.runs.as_slice()
    }
}

impl Iterator for Changes {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        self.runs.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.runs.size_hint()
    }
}

impl DoubleEndedIterator for Changes {
    fn next_back(&mut self) -> Option<Range<u64>> {
        self.runs.next_back()
    }
}

impl ExactSizeIterator for Changes {}

impl FusedIterator for Changes {}

impl AnyRegion {
    /// The ranges that were written since the last call, or since the build. A write during the call is
    /// found by this call, the next one, or both. Read the bytes after the call: they then include each
    /// write that it reports.
    ///
    /// It may report too much, and never too little:
    ///
    /// * **Whole pages.** One written byte reports its page, also if the byte stays the same.
    /// * **Discarded pages** (`MADV_DONTNEED`) that were written before are reported, because they have
    ///   the bytes of their sources again.
    /// * **Not seen**: bytes that reach a page after the call, by a transfer that has pinned the page before
    ///   it. The pin counts as the write. Such transfers are an `O_DIRECT` read, io_uring with fixed
    ///   buffers, a device, another process's `process_vm_writev(2)`, and a debugger's write to
    ///   `/proc/PID/mem`: end them before the call. A buffered `read(2)` stores as a thread does, and
    ///   `write_at` takes care of itself.
    /// * Nor is a page taken out without a report of the kernel, by a guard (`MADV_GUARD_INSTALL`) that is
    ///   removed again, or by a move with another userfaultfd.
    /// * Nor is a page that a call reports because it was discarded, and that is then written and discarded once
    ///   more: the next call does not report it. So bytes that were read between the two are out of date.
    ///
    /// With a [budget](crate::Builder::budget), a page is reported by each call from its first write on until it is
    /// back in its source, and once more. A flush before the call keeps the reports short, except for pages that
    /// stay dirty, because they are pinned or have padding.
    ///
    /// A call takes about 0.9 ms for each GiB of pages that are present, and a few microseconds beside
    /// it. After the first discard, or without [reports](crate::Builder::report_discards) of them, it
    /// takes 1.6 ms. Absent pages take no time. With a budget, a call reads two bits for each page.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OptionConflict`] unless the region is built
    /// [`track_changes`](crate::Builder::track_changes). [`ErrorKind::ForkedChild`] in a forked child.
    /// [`ErrorKind::MemoryGone`] if the application has mapped other memory over a part of the region.
    /// After an error, no change is lost: the next call finds it.
    ///
    /// [`Changes`] has an example.
    pub fn changes(&self) -> Result<Changes, Error> {
        let spans = self.take_changes(self.record_of_changes("changes")?)?;
        let runs: Vec<_> = spans.iter().map(|span| self.clipped(*span)).collect();
        Ok(Changes { runs: runs.into_iter() })
    }

    /// Writes the changes to a sparse file; returns them.
    pub(super) fn save_changes(
        &self,
        file: &File,
        read: impl FnMut(u64, &mut [u8]) -> Result<(), Error>,
    ) -> Result<Changes, Error> {
        let record = self.record_of_changes("save_changes")?;
        let spans = self.take_changes(record)?;
        let runs: Vec<_> = spans.iter().map(|span| self.clipped(*span)).collect();
        if let Err(error) = self.write_sparse(file, &runs, read) {
            match record {
                Record::OfKernel(written) => written.give_back(RecordFor::Changes, &spans),
                Record::OfFaults(changed) => changed.give_back(&spans),
            }
            return Err(error);
        }
        Ok(Changes { runs: runs.into_iter() })
    }

    fn record_of_changes(&self, call: &str) -> Result<Record<'_>, Error> {
        let written = self.served.written.as_deref();
        let written = written.filter(|written| written.uses.has(RecordFor::Changes)).map(Record::OfKernel);
        let changed = || self.served.written_back()?.changed().map(Record::OfFaults);
        let record = written.or_else(changed).ok_or_else(|| self.lacks_record(RecordFor::Changes, call))?;
        self.check_process(call)?;
        Ok(record)
    }

    fn take_changes(&self, record: Record<'_>) -> Result<Vec<Span>, Error> {
        match record {
            Record::OfKernel(written) => {
                self.take_written(written, RecordFor::Changes, self.served.target.all())
            }
            Record::OfFaults(changed) => Ok(changed.take()),
        }
    }

    pub(super) fn lacks_record(&self, used_for: RecordFor, call: &str) -> Error {
        let (name, option) = (self.name(), used_for.option());
        let what = format!("region {name} has no record for {call}(): build it with {option}()");
        Error::new(ErrorKind::OptionConflict, what).of_option(option)
    }

    /// Refuses a call in a forked child.
    pub(super) fn check_process(&self, call: &str) -> Result<(), Error> {
        if self.server.is_of_this_process() {
            return Ok(());
        }
        let what = format!("region {}: it belongs to the parent process: call {call}() there", self.name());
        Err(Error::new(ErrorKind::ForkedChild, what))
    }

    /// Takes the written pages of a span for a use, and arms them again.
    pub(super) fn take_written(
        &self,
        written: &WrittenPages,
        used_for: RecordFor,
        span: Span,
    ) -> Result<Vec<Span>, Error> {
        let target = &self.served.target;
        if target.is_on_memfd() {
            self.map_unmapped(written, span).map_err(|errno| not_taken(self.name(), errno))?;
        }
        let addresses = (target.addresses(target.all()), self.served.page_size());
        let taken = written.take(used_for, addresses, span, (&self.served.pages, self.served.discards));
        taken.map_err(|errno| not_taken(self.name(), errno))
    }

    /// Maps pages again that the kernel has unmapped, though the memfd has them: reclaim does, and
    /// `MADV_DONTNEED`. Such a page has no record if it was written. Once mapped, it counts as written.
    fn map_unmapped(&self, written: &WrittenPages, span: Span) -> Result<(), Errno> {
        let served = &self.served;
        let range = served.target.addresses(served.target.all());
        let map = |page: Page| {
            let page = served.target.addresses(page.span());
            // The kernel refuses a page that the memfd lacks because it was discarded.
            let _ = served.uffd.of(page).continue_pages(page);
        };
        written.absent((range, served.page_size()), span, |run| served.pages.each_present(run, map))
    }

    /// The offsets of a span, as far as the region has bytes.
    pub(super) fn clipped(&self, span: Span) -> Range<u64> {
        let offsets = self.served.page_size().offsets(span);
        offsets.start..offsets.end.min(self.len() as u64)
    }

    fn write_sparse(
        &self,
        file: &File,
        runs: &[Range<u64>],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let failed = |error| {
            Error::of_descriptor(format_args!("region {}: cannot save its changes", self.name()), error)
        };
        // Older data would look like changes.
        file.set_len(0).and_then(|()| file.set_len(self.len() as u64)).map_err(failed)?;
        let mut buffer = vec![0; SAVED_AT_ONCE.min(self.len())];
        for run in runs {
            for start in run.clone().step_by(buffer.len()) {
                let bytes = (run.end - start).min(buffer.len() as u64) as usize;
                read(start, &mut buffer[..bytes])?;
                file.write_all_at(&buffer[..bytes], start).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// The record of the changes to a region.
#[derive(Clone, Copy)]
enum Record<'r> {
    /// The kernel's.
    OfKernel(&'r WrittenPages),
    /// That of a region with a budget, whose first write to a page is a fault.
    OfFaults(&'r dyn ChangedPages),
}

fn not_taken(name: &str, errno: Errno) -> Error {
    let what = format!("region {name}: cannot ask the kernel for written pages");
    match errno {
        Errno::EPERM => {
            let reason = "the application has mapped other memory over a part of the region";
            Error::because(ErrorKind::MemoryGone, format_args!("{what}: {reason}"), errno)
        }
        errno => Error::refused(what, errno),
    }
}

/// The bytes of one read and one write.
const SAVED_AT_ONCE: usize = 1 << 20;
