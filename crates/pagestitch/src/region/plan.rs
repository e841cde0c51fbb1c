//! The plan: how each run of chunks is installed, and why not without a copy. For people to read.

use crate::region::Served;
use crate::region::in_place::is_aligned;
use crate::source::Backing;
use pagestitch_kernel::{PageSize, Span};
use std::fmt;
use std::ops::Range;

/// How a region's chunks are installed. `Display` prints a table.
#[derive(Debug, Clone)]
pub struct Plan {
    region: String,
    bytes: u64,
    page: PageSize,
    chunks: usize,
    runs: Vec<Run>,
    gathered_pages: u64,
}

/// A run of chunks next to each other that are installed the same way from sources of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Run {
    /// The offsets in the region that it covers.
    pub offsets: Range<u64>,
    /// Its chunks, counted from 0.
    pub chunks: Range<usize>,
    /// What the source calls itself.
    pub source: String,
    /// How its pages are installed.
    pub how: How,
    /// Why so, and not without a copy.
    pub why: &'static str,
}

/// How pages are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum How {
    /// Mapped in place when the region is built: the source's own pages. No copy, no fault.
    Map,
    /// Copied on first touch, straight from where the bytes lie. One copy.
    Copy,
    /// Read into staging on first touch, then copied. Two copies.
    Read,
    /// The kernel's zero page. No copy.
    Zero,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Map => "map",
            Self::Copy => "copy",
            Self::Read => "read",
            Self::Zero => "zero",
        })
    }
}

impl Plan {
    pub(super) fn of(served: &Served) -> Self {
        let layout = &served.layout;
        let mut runs: Vec<Run> = Vec::new();
        for chunk in 0..layout.chunks() {
            let run = run_of(served, chunk);
            match runs.last_mut() {
                Some(last) if last.how == run.how && last.source == run.source && last.why == run.why => {
                    last.offsets.end = run.offsets.end;
                    last.chunks.end = run.chunks.end;
                }
                _ => runs.push(run),
            }
        }
        let page = served.page_size();
        let gathered_pages = count_gathered(served, page);
        Self {
            region: served.name.clone(),
            bytes: layout.total(),
            page,
            chunks: layout.chunks(),
            runs,
            gathered_pages,
        }
    }

    /// The runs, in the order of the region.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many pages several chunks meet in, or end in: these are gathered in staging, then copied.
    #[must_use]
    pub const fn gathered_pages(&self) -> u64 {
        self.gathered_pages
    }
}

fn run_of(served: &Served, chunk: usize) -> Run {
    let backing = served.layout.backing_of(chunk);
    let (how, why) = match backing {
        Backing::Memfd(_) => how_of_memfd(served, chunk),
        Backing::Memory(_) => (How::Copy, "private memory: copied once, from where it lies"),
        Backing::Read(_) => (How::Read, "read at an offset: into staging, then copied"),
        Backing::Hole(_) => (How::Zero, "zeros: the kernel's zero page, no copy"),
    };
    let offsets = served.layout.offsets_of(chunk);
    Run { offsets, chunks: chunk..chunk + 1, source: backing.source().name(), how, why }
}

/// A chunk counts as mapped only if all of it is.
fn how_of_memfd(served: &Served, chunk: usize) -> (How, &'static str) {
    let page = served.page_size();
    let offsets = served.layout.offsets_of(chunk);
    let shown = |span: Span| served.in_place.next_gap(span).is_empty();
    let whole = page.inside(&offsets);
    if !is_aligned(page, offsets.start, served.layout.source_offset(chunk)) {
        (How::Copy, "not at the same place in a page as in the memfd: copied from its memory")
    } else if shown(page.covering(&offsets)) {
        (How::Map, "mapped in place: the memfd's own pages")
    } else if whole.is_empty() {
        (How::Copy, "fills no page of its own: copied from the memfd's memory")
    } else if shown(whole) {
        (How::Copy, "an edge lies inside a page: its whole pages are mapped, the edge is copied")
    } else {
        (How::Copy, "no mapping left for it (vm.max_map_count): copied from the memfd's memory")
    }
}

/// Pages in which a chunk ends before the page does.
fn count_gathered(served: &Served, page: PageSize) -> u64 {
    let mut count = 0;
    let mut last = None;
    for chunk in 0..served.layout.chunks() {
        let end = served.layout.offsets_of(chunk).end;
        let holder = page.page_at(end - 1);
        let ragged = end != page.offset_of(holder.span().end());
        if ragged && last != Some(holder) && !served.in_place.contains(holder) {
            count += 1;
            last = Some(holder);
        }
    }
    count
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { region, bytes, page, chunks, runs, gathered_pages } = self;
        let pages = bytes.div_ceil(page.bytes() as u64);
        writeln!(
            f,
            "region {region}: {bytes} bytes, {pages} pages of {page}, {chunks} chunks; {gathered_pages} pages are gathered"
        )?;
        let rows: Vec<[String; 5]> = runs.iter().map(Run::cells).collect();
        let widths = std::array::from_fn(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(HEADER[column].len())
        });
        write_row(f, &HEADER, &widths)?;
        rows.iter().try_for_each(|row| write_row(f, row, &widths))
    }
}

impl Run {
    fn cells(&self) -> [String; 5] {
        let chunks = match self.chunks.len() {
            1 => self.chunks.start.to_string(),
            _ => format!("{}-{}", self.chunks.start, self.chunks.end - 1),
        };
        let offsets = format!("{:#x}..{:#x}", self.offsets.start, self.offsets.end);
        [offsets, chunks, self.source.clone(), self.how.to_string(), self.why.to_owned()]
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, row: &[impl AsRef<str>; 5], widths: &[usize; 5]) -> fmt::Result {
    for (cell, width) in row.iter().zip(widths).take(4) {
        write!(f, "  {:width$}", cell.as_ref())?;
    }
    writeln!(f, "  {}", row[4].as_ref())
}

const HEADER: [&str; 5] = ["offsets", "chunks", "source", "how", "why"];
