//! Reads the sources of all pages to fill into a memfd, block by block, on several threads.

use super::spans::Spans;
use crate::error::{Error, Failure};
use crate::fault::fill::{Buffers, Content};
use crate::fault::recovery::{Attempts, Next, Sources};
use crate::fault::{InstallError, count};
use crate::method::Method;
use crate::signals::NoSignals;
use crate::source::{Source, UnsealedMemfd};
use crate::space::Mapping;
use pagestitch_kernel::{Errno, Outcome, Page, Span};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

/// The bytes of the pages to fill.
pub(super) struct FilledPages {
    /// Each page at its offset in the region. `None` if no page is filled.
    pub(super) memfd: Option<UnsealedMemfd>,
    /// Pages whose source has failed, where their chunk asks for poison. Ascending.
    pub(super) failed: Vec<(Page, Arc<Failure>)>,
}

/// Fills the pages with at most `threads` threads. Stops at the first page that fails the build.
pub(super) fn fill(region: &Mapping, spans: &Spans, threads: usize) -> Result<FilledPages, Error> {
    if spans.filled.is_empty() {
        return Ok(FilledPages { memfd: None, failed: Vec::new() });
    }
    let bytes = region.page_size().offset_of(spans.end());
    let memfd = UnsealedMemfd::create(&file_name(&region.name), bytes);
    let memfd = memfd.map_err(|error| refused(region, &error))?;
    let rest = Remainder { spans: spans.filled.clone(), next: 0, failed: Vec::new(), ended: None };
    let work = Work { region, memfd: memfd.file(), rest: Mutex::new(rest) };
    thread::scope(|scope| {
        let quiet = NoSignals::until_dropped();
        for index in 1..threads.min(work.blocks()) {
            let named = thread::Builder::new().name(format!("eager/{index}"));
            // A thread that cannot start is one helper fewer.
            let _ = named.spawn_scoped(scope, || work.help());
        }
        drop(quiet);
        work.help();
    });
    let Remainder { mut failed, ended, .. } = work.rest.into_inner();
    failed.sort_unstable_by_key(|(page, _)| *page);
    ended.map_or(Ok(()), |(_, error)| Err(error))?;
    Ok(FilledPages { memfd: Some(memfd), failed })
}

/// The spans to fill, as threads take blocks of them.
struct Work<'r> {
    region: &'r Mapping,
    memfd: &'r File,
    rest: Mutex<Remainder>,
}

struct Remainder {
    spans: Vec<Span>,
    /// The span of which the next block is taken. Its taken blocks are cut off.
    next: usize,
    failed: Vec<(Page, Arc<Failure>)>,
    /// The error that fails the build, with its page: the first one of the region.
    ended: Option<(Page, Error)>,
}

impl Work<'_> {
    /// About the number of blocks.
    fn blocks(&self) -> usize {
        let rest = self.rest.lock();
        rest.spans.iter().map(|&span| span.pages.div_ceil(BLOCK_PAGES)).sum()
    }

    fn help(&self) {
        let mut buffers = match Buffers::new() {
            Ok(buffers) => buffers,
            Err(errno) => return self.end(Page(0), refused(self.region, &errno.into())),
        };
        while let Some(block) = self.next_block() {
            if let Err((page, error)) = self.fill_block(block, &mut buffers) {
                self.end(page, error);
            }
        }
    }

    /// The next block; none after an error. The blocks before the failed one are taken already, and
    /// the threads that took them fill them.
    fn next_block(&self) -> Option<Span> {
        let mut rest = self.rest.lock();
        if rest.ended.is_some() {
            return None;
        }
        let at = rest.next;
        let (block, later) = self.region.first_block(*rest.spans.get(at)?);
        rest.spans[at] = later;
        rest.next += usize::from(later.is_empty());
        Some(block)
    }

    fn end(&self, page: Page, error: Error) {
        let ended = &mut self.rest.lock().ended;
        if ended.as_ref().is_none_or(|(first, _)| page < *first) {
            *ended = Some((page, error));
        }
    }

    fn fill_block(&self, block: Span, buffers: &mut Buffers) -> Result<(), (Page, Error)> {
        let mut sources = Sources::new(self.region, buffers, Attempts::default());
        let mut rest = block;
        while !rest.is_empty() {
            let pages = self.fill_some(&mut sources, rest)?;
            rest = rest.without_prefix(pages);
        }
        Ok(())
    }

    /// Fills the first pages of a span. Returns the number of those that are done; 0 to try again.
    fn fill_some(&self, sources: &mut Sources<'_>, span: Span) -> Result<usize, (Page, Error)> {
        let written = match sources.fill(span) {
            Ok(filled) => self.write(span.prefix(filled.pages), &filled.content),
            Err(error) => Err(Unwritten::Install(error)),
        };
        let error = match written {
            Ok(pages) => {
                sources.installed(pages);
                return Ok(pages);
            }
            Err(Unwritten::Install(error)) => error,
            Err(Unwritten::Memfd(error)) => return Err((span.first, refused(self.region, &error))),
        };
        match sources.next(span, error) {
            Next::Now | Next::Changing => Ok(0),
            Next::After(pause) => {
                thread::sleep(pause.length());
                Ok(0)
            }
            Next::Fail(failure) => {
                let (is_poison, failure) =
                    (self.region.layout.is_poisoned_by_choice(failure.chunk), Arc::new(failure));
                if !is_poison {
                    return Err((span.first, Error::of_failure(&self.region.name, failure)));
                }
                self.rest.lock().failed.push((span.first, failure));
                sources.installed(1);
                Ok(1)
            }
        }
    }

    /// Writes the bytes of a span's pages into the memfd.
    fn write(&self, span: Span, content: &Content<'_>) -> Result<usize, Unwritten> {
        let at = self.region.page_size().offset_of(span.first);
        let method = match content {
            Content::Copy(bytes, part) => {
                let written = self.memfd.write_all_at(&bytes[part.clone()], at);
                written.map_err(|error| Unwritten::from_memory(error, span))?;
                Method::Copy
            }
            Content::Buffered(bytes) => self.write_buffer(bytes, at, Method::Buffered)?,
            Content::Gathered(bytes) => self.write_buffer(bytes, at, Method::Gathered)?,
            Content::Move(donated, offset) => {
                let mut bytes = vec![0; self.region.page_size().bytes_of(span)];
                let read = Source::read_at(*donated, *offset, &mut bytes);
                let failed = |error| self.region.layout.piece_at(at, at + 1).failed(error).into();
                read.map_err(|error| Unwritten::Install(failed(error)))?;
                self.write_buffer(&bytes, at, Method::Buffered)?
            }
            // A memfd reads as zeros where it was not written.
            Content::Zero => Method::Zero,
            Content::StagedMove(_) | Content::Continue | Content::Released => {
                unreachable!("no page moves, none is lazy, and no source is released yet")
            }
        };
        count(self.region, span, method);
        Ok(span.pages)
    }

    fn write_buffer(&self, bytes: &[u8], at: u64, method: Method) -> Result<Method, Unwritten> {
        self.memfd.write_all_at(bytes, at).map_err(Unwritten::Memfd)?;
        Ok(method)
    }
}

/// The reason why pages are not written.
enum Unwritten {
    /// Their bytes are missing.
    Install(InstallError),
    /// The memfd takes no more bytes.
    Memfd(io::Error),
}

impl Unwritten {
    /// A write from a source's own memory has failed: the memory is unreadable, or the memfd is full.
    fn from_memory(error: io::Error, span: Span) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            // Some of the pages may be readable alone.
            Some(Errno::EFAULT) if span.pages > 1 => Self::Install(InstallError::Several(span.pages)),
            Some(Errno::EFAULT) => Self::Install(InstallError::Refused(Outcome::SourceUnreadable)),
            _ => Self::Memfd(error),
        }
    }
}

fn refused(region: &Mapping, error: &io::Error) -> Error {
    let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
    Error::refused(format_args!("region {}: cannot fill a memfd with its bytes", region.name), errno)
}

/// The name of the memfd, which `/proc/PID/maps` shows.
fn file_name(region: &str) -> String {
    let shown = region.chars().map(|letter| if letter.is_control() { '_' } else { letter });
    let mut name = String::from("pagestitch:");
    shown
        .take_while(|letter| {
            name.push(*letter);
            name.len() < NAME_MAX
        })
        .for_each(drop);
    name
}

/// The pages of a block, by which the number of threads is limited.
const BLOCK_PAGES: usize = 512;
/// The kernel takes names of 249 bytes. A letter has at most four.
const NAME_MAX: usize = 240;
