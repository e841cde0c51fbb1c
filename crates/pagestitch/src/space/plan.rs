//! The plan of a region, printable: the method by which each run of chunks is installed, with the
//! reason.

use crate::method::{Method, PlanReason, SameBytes};
use crate::source::{Backing, Shared};
use crate::space::Mapping;
use crate::space::mapped_in_place::{is_aligned, whole_pages};
use pagestitch_kernel::immutable::Grounds;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::shared::Sharing;
use pagestitch_kernel::{Page, PageSize, Span};
use std::fmt;
use std::ops::Range;

/// The methods by which a region's chunks are installed. `Display` prints a table.
#[derive(Debug, Clone)]
pub struct Plan {
    region: String,
    bytes: u64,
    page: PageSize,
    chunks: usize,
    runs: Vec<PlanRun>,
    gathered_pages: u64,
    staged: Result<(), &'static str>,
}

/// A run of adjacent chunks with the same method, reason and name of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanRun {
    /// The byte offsets in the region that the run covers.
    pub offsets: Range<u64>,
    /// The indices of its chunks; empty for padding.
    pub chunks: Range<usize>,
    /// The name of the source.
    pub source: String,
    /// The method by which its pages are installed.
    pub method: Method,
    /// The reason for the method; if the pages are copied, the reason why they are not mapped.
    pub reason: PlanReason,
    /// The grounds on which pages that leave come back with the same bytes; `None` if they do not leave:
    /// the region has no budget, or they take no memory of it.
    pub same_bytes: Option<SameBytes>,
}

impl Plan {
    pub(crate) fn of(mapping: &Mapping) -> Self {
        let layout = &mapping.layout;
        let mut runs: Vec<PlanRun> = Vec::new();
        let all = mapping.chunks();
        for chunk in 0..all {
            let run = run_of(mapping, chunk);
            match runs.last_mut() {
                Some(last)
                    if last.method == run.method
                        && last.source == run.source
                        && last.same_bytes == run.same_bytes
                        && last.reason == run.reason =>
                {
                    last.offsets.end = run.offsets.end;
                    last.chunks.end = run.chunks.end;
                }
                _ => runs.push(run),
            }
        }
        let page = mapping.page_size();
        let gathered_pages = count_gathered(mapping, page);
        Self {
            region: mapping.name.clone(),
            bytes: mapping.len(),
            page,
            chunks: layout.number_of(all),
            runs,
            gathered_pages,
            staged: mapping.staged,
        }
    }

    /// The run of the first chunk that takes a copy.
    pub(crate) fn first_copy(mapping: &Mapping) -> Option<PlanRun> {
        let is_copied = |chunk: &usize| match method_of(mapping, *chunk).0 {
            Method::Map | Method::Alias | Method::Move | Method::Continue | Method::Zero => false,
            Method::Copy | Method::Buffered | Method::Gathered | Method::StagedMove | Method::Poison => true,
        };
        (0..mapping.chunks()).find(is_copied).map(|chunk| run_of(mapping, chunk))
    }

    /// The runs, in the order of the region.
    ///
    /// ```
    /// # use pagestitch::{Method, Pool, Region};
    /// let region = Region::builder().chunk(vec![1u8; 5_000]).chunk(vec![2u8; 5_000]).build(&Pool::new()?)?;
    /// let plan = region.plan();
    /// for run in plan.runs().iter().filter(|run| run.method != Method::Map) {
    ///     println!("chunks {:?} take a copy: {}", run.chunks, run.reason);
    /// }
    /// assert_eq!(plan.gathered_pages(), 2);                       // the chunks meet in one, the region ends in one
    /// if let Err(reason) = plan.staged() {
    ///     println!("blocks are copied page by page: {reason}");
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn runs(&self) -> &[PlanRun] {
        &self.runs
    }

    /// `Ok` if whole blocks of 2 MiB that are copied or read are filled in a huge page and moved
    /// in, which takes less than half the time.
    ///
    /// Decided when the region is built. On Linux before 6.16 (6.12.37), the kernel may lose a page
    /// that moves while it is swapped out. So pages do not move there if swap is on when the region
    /// is built; do not switch swap on later.
    ///
    /// # Errors
    ///
    /// The reason why blocks are copied page by page.
    pub const fn staged(&self) -> Result<(), &'static str> {
        self.staged
    }

    /// The number of pages in which several chunks meet, or a chunk ends. They are gathered in a
    /// buffer, then copied.
    #[must_use]
    pub const fn gathered_pages(&self) -> u64 {
        self.gathered_pages
    }
}

fn run_of(mapping: &Mapping, chunk: usize) -> PlanRun {
    let (method, reason) = method_of(mapping, chunk);
    let source = mapping.layout.backing_of(chunk).source().name();
    let offsets = mapping.layout.offsets_of(chunk);
    let number = mapping.layout.number_of(chunk);
    let counted = usize::from(!mapping.layout.is_padding(chunk));
    let same_bytes = same_bytes(mapping, chunk, method);
    PlanRun { offsets, chunks: number..number + counted, source, method, reason, same_bytes }
}

/// The grounds on which pages of a chunk come back with the same bytes, if they leave.
fn same_bytes(mapping: &Mapping, chunk: usize, method: Method) -> Option<SameBytes> {
    let residence = mapping.residence.as_ref()?;
    if matches!(method, Method::Map | Method::Alias | Method::Continue | Method::Zero) {
        return None;
    }
    let first = mapping.page_size().page_at(mapping.layout.offsets_of(chunk).start);
    Some(match mapping.layout.backing_of(chunk).is_stable() {
        true => SameBytes::Stable,
        false if residence.hashes(first) => SameBytes::Hashed,
        false => SameBytes::Unchecked,
    })
}

/// Padding has the bytes of a page that is shown in place, if each of its pages is one.
fn method_of_padding(mapping: &Mapping, padding: usize) -> (Method, PlanReason) {
    let pages = mapping.page_size().covering(&mapping.layout.offsets_of(padding));
    let shows_source = |page: Page| {
        let run = mapping.in_place.prefix(page.span());
        run.is_some_and(|(_, run)| !mapping.layout.is_padding(run.chunk))
    };
    match pages.iter().all(shows_source) {
        true => (Method::Map, PlanReason::PaddingInPlace),
        false => (Method::Zero, PlanReason::Padding),
    }
}

fn method_of(mapping: &Mapping, chunk: usize) -> (Method, PlanReason) {
    let backing = mapping.layout.backing_of(chunk);
    match backing {
        Backing::Hole(_) if mapping.layout.is_padding(chunk) => method_of_padding(mapping, chunk),
        Backing::Memory(_) => (Method::Copy, PlanReason::Memory),
        Backing::Fetched(_) => (Method::Buffered, PlanReason::Fetched),
        Backing::Read(_) => (Method::Buffered, PlanReason::Read),
        Backing::Hole(_) => (Method::Zero, PlanReason::Zeros),
        Backing::Memfd(_)
        | Backing::Immutable(_)
        | Backing::Donated(_)
        | Backing::Shared(_)
        | Backing::Mapped(_) => method_of_pages(mapping, chunk, backing),
    }
}

/// The method for a source that has pages. A chunk counts as mapped only if all of its pages are.
fn method_of_pages(mapping: &Mapping, chunk: usize, backing: &Backing) -> (Method, PlanReason) {
    if let Backing::Mapped(mapped) = backing {
        if let Some(plan) = mapped.plan_of_copies() {
            return plan;
        }
    }
    let page = mapping.page_size();
    let offsets = mapping.layout.offsets_of(chunk);
    let is_shown = |span: Span| match backing {
        Backing::Shared(Shared::Lazy(_)) => mapping.lazy.next_gap(span).is_empty(),
        Backing::Donated(_) if mapping.moves => {
            let own = whole_pages(&mapping.layout, page, chunk..chunk + 1);
            own.is_some_and(|own| own.span.pages >= span.pages)
        }
        Backing::Donated(_) => mapping.moved.next_gap(span).is_empty(),
        _ => mapping.in_place.next_gap(span).is_empty(),
    };
    if is_shown(page.covering(&offsets)) {
        return shown(mapping, backing);
    }
    let reason = reason_for_copy(mapping, chunk, backing, is_shown);
    (if matches!(backing, Backing::Memfd(_)) { Method::Copy } else { Method::Buffered }, reason)
}

/// The reason why some pages of a chunk are copied, though its source has pages that could be
/// mapped.
fn reason_for_copy(
    mapping: &Mapping,
    chunk: usize,
    backing: &Backing,
    is_shown: impl Fn(Span) -> bool,
) -> PlanReason {
    let (page, granule) = (mapping.page_size(), backing.granule());
    let offsets = mapping.layout.offsets_of(chunk);
    let huge = granule.bytes() > page.bytes();
    let whole = page.covering(&granule.offsets(granule.inside(&offsets)));
    let all = page.covering(&offsets);
    let next = mapping.refused.partition_point(|(span, _)| span.end() <= all.first);
    let refused = mapping.refused.get(next).filter(|(span, _)| span.first < all.end());
    if mapping.target.foreign().is_some() {
        PlanReason::ForeignMemory
    } else if mapping.target.is_on_memfd() {
        PlanReason::OnMemfd
    } else if mapping.records_writes() {
        PlanReason::ChangesTracked
    } else if mapping.growth.as_ref().is_some_and(|growth| growth.has_appended(chunk)) {
        PlanReason::Appended
    } else if mapping.uffd.is_stand_in()
        && matches!(backing, Backing::Donated(_) | Backing::Shared(Shared::Lazy(_)))
    {
        PlanReason::FilledByBuild
    } else if !is_aligned(granule, offsets.start, mapping.layout.source_offset(chunk)) {
        if huge { PlanReason::OtherOffsetInHugePage } else { PlanReason::OtherOffset }
    } else if let Some((_, reason)) = refused {
        *reason
    } else if whole.is_empty() {
        if huge { PlanReason::NoWholeHugePage } else { PlanReason::NoWholePage }
    } else if granule.bytes() > HUGE {
        PlanReason::LargerHugePages
    } else if is_shown(whole) {
        if huge { PlanReason::EdgeOfHugePage } else { PlanReason::Edge }
    } else if mapping.lacks_minor_faults(backing) {
        PlanReason::NoMinorFaults
    } else {
        PlanReason::NoMappings
    }
}

fn shown(mapping: &Mapping, backing: &Backing) -> (Method, PlanReason) {
    match backing {
        Backing::Donated(_) if mapping.moves => (Method::Move, PlanReason::MovesOnTouch),
        Backing::Donated(_) => (Method::Move, PlanReason::Moved),
        Backing::Shared(Shared::Lazy(_)) => (Method::Continue, PlanReason::MappedWhenFilled),
        Backing::Shared(Shared::File(_, Sharing::CopyOnWrite)) => MAPPED_COPY_ON_WRITE,
        Backing::Mapped(mapped) if mapped.is_copy_on_write() => MAPPED_COPY_ON_WRITE,
        Backing::Immutable(file) => (Method::Map, mapped_on(file.stable().grounds())),
        Backing::Mapped(mapped) => (Method::Map, mapped.grounds().map_or(PlanReason::Mapped, mapped_on)),
        Backing::Shared(Shared::Alias(_)) => (Method::Alias, PlanReason::MappedTwice),
        Backing::Shared(Shared::Physical(_)) => (Method::Map, PlanReason::MappedFrames),
        _ => (Method::Map, PlanReason::Mapped),
    }
}

/// The reason for pages of an immutable file.
const fn mapped_on(grounds: Grounds) -> PlanReason {
    match grounds {
        Grounds::Promise => PlanReason::MappedByPromise,
        Grounds::Verity => PlanReason::MappedByVerity,
    }
}

const MAPPED_COPY_ON_WRITE: (Method, PlanReason) = (Method::Map, PlanReason::MappedUntilWritten);

/// The number of copied pages in which a chunk ends before the page does.
fn count_gathered(mapping: &Mapping, page: PageSize) -> u64 {
    let mut count = 0;
    let mut last = None;
    for chunk in 0..mapping.chunks() {
        let end = mapping.layout.offsets_of(chunk).end;
        let holder = page.page_at(end - 1);
        let is_partial = end != page.offset_of(holder.span().end());
        let moved = || {
            mapping.moved.contains(holder) || mapping.moves && mapping.movable_pages(holder.span()).is_some()
        };
        let shown = mapping.in_place.contains(holder) || mapping.lazy.contains(holder) || moved();
        if is_partial && last != Some(holder) && !shown {
            count += 1;
            last = Some(holder);
        }
    }
    count
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { region, bytes, page, chunks, runs, gathered_pages, staged } = self;
        let pages = bytes.div_ceil(page.bytes() as u64);
        writeln!(
            f,
            "region {region}: {}, {} of {page}, {}; gathered: {}",
            counted(*bytes, "byte"),
            counted(pages, "page"),
            counted(*chunks as u64, "chunk"),
            counted(*gathered_pages, "page"),
        )?;
        if runs.iter().any(|run| matches!(run.method, Method::Copy | Method::Buffered)) {
            match staged {
                Ok(()) => writeln!(f, "  whole blocks of 2 MiB are filled in a huge page and moved in"),
                Err(reason) => writeln!(f, "  whole blocks are copied page by page: {reason}"),
            }?;
        }
        let rows: Vec<[String; 5]> = runs.iter().map(PlanRun::cells).collect();
        let widths = std::array::from_fn(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(HEADER[column].len())
        });
        write_row(f, &HEADER, &widths)?;
        rows.iter().try_for_each(|row| write_row(f, row, &widths))
    }
}

/// A number and its noun, which has an `s` unless there is one.
fn counted(number: u64, noun: &str) -> String {
    let end = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{end}")
}

impl PlanRun {
    fn cells(&self) -> [String; 5] {
        let chunks = match self.chunks.len() {
            0 => String::from("-"),
            1 => self.chunks.start.to_string(),
            _ => format!("{}-{}", self.chunks.start, self.chunks.end - 1),
        };
        let offsets = format!("{:#x}..{:#x}", self.offsets.start, self.offsets.end);
        let reason = match self.same_bytes {
            Some(same_bytes) => format!("{}; {same_bytes}", self.reason),
            None => self.reason.to_string(),
        };
        [offsets, chunks, self.source.clone(), self.method.to_string(), reason]
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, row: &[impl AsRef<str>; 5], widths: &[usize; 5]) -> fmt::Result {
    for (cell, width) in row.iter().zip(widths).take(4) {
        write!(f, "  {:width$}", cell.as_ref())?;
    }
    writeln!(f, "  {}", row[4].as_ref())
}

const HEADER: [&str; 5] = ["offsets", "chunks", "source", "method", "reason"];
