//! The range of a region on a memfd: the options that such a region cannot have, and its memfd.

use crate::api::options::{Options, refuse_first};
use crate::error::{BuildOption, Error, ErrorKind};
use crate::serve::Demands;
use crate::source::refuse_huge_pages;
use crate::space::{Layout, RecordFor};
use pagestitch_kernel::memfd::UnsealedMemfd;
use pagestitch_kernel::{Access, PageSize, Reservation, View};
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// Refuses options, chunks and servers that a region on a memfd cannot have.
pub(super) fn check(options: &Options, layout: &Layout, demands: &Demands) -> Result<(), Error> {
    if !options.on_memfd {
        return Ok(());
    }
    check_options(options, demands.adopted)?;
    let Some((chunk, source)) = layout.first_written_by_others() else { return Ok(()) };
    let what = format!(
        "chunk {chunk} ({source}) is memory that others write to, and the memfd would have a copy of it: map it copy_on_write(), \
         copy it, or leave out on_memfd()"
    );
    Err(Error::new(ErrorKind::OptionConflict, what).of_chunk(chunk).of_option(BuildOption::OnMemfd))
}

fn check_options(options: &Options, adopted: bool) -> Result<(), Error> {
    refuse_first([
        (
            adopted,
            BuildOption::OnMemfd,
            "adopted memory has the pages that its owner has mapped: leave out on_memfd()",
        ),
        (
            options.budget.is_some(),
            BuildOption::Budget,
            "a page that leaves a memfd is zeros for the other processes, and their writes to it are lost: leave out budget() or on_memfd()",
        ),
        (
            options.serve_options.record_of_writes.has(RecordFor::WriteBack),
            BuildOption::WriteBack,
            "writes of other processes have no record, and would not go back: leave out write_back() or on_memfd()",
        ),
        (
            options.release_sources == Some(true),
            BuildOption::ReleaseSources,
            "a page that another process discards is filled from its source again: leave out release_sources() or on_memfd()",
        ),
        (
            options.inherit_on_fork,
            BuildOption::InheritOnFork,
            "a forked child would share each page that it fills: have it map the memfd, and leave out inherit_on_fork() or on_memfd()",
        ),
        (
            options.report_discards == Some(true),
            BuildOption::ReportDiscards,
            "a discard through the memfd is not reported: leave out report_discards() or on_memfd()",
        ),
    ])
}

/// Reserves a range on a memfd, if the region is on one.
pub(super) fn reserve(
    name: &str,
    options: &Options,
    pages: (NonZeroUsize, PageSize),
    access: Access,
) -> Result<Option<(Arc<Reservation>, View)>, Error> {
    if !options.on_memfd {
        return Ok(None);
    }
    let reserved = View::reserve_on(create(name, pages)?, pages, access);
    let (reservation, view) = reserved.map_err(|error| Error::unreserved(name, error))?;
    reservation.use_small_pages();
    Ok(Some((reservation, view)))
}

/// The memfd of a region. It has no page yet, and its length is fixed.
fn create(name: &str, (pages, page): (NonZeroUsize, PageSize)) -> Result<UnsealedMemfd, Error> {
    let failed = |error| {
        Error::of_descriptor(format_args!("region {name}: cannot create its memfd"), error)
            .of_option(BuildOption::OnMemfd)
    };
    // The kernel takes shorter names than regions may have.
    let label: String = name.chars().filter(|letter| *letter != '\0').take(LABEL).collect();
    let memfd = UnsealedMemfd::create(&label, (pages.get() * page.bytes()) as u64).map_err(failed)?;
    memfd.fix_length().map_err(failed)?;
    let allocated = memfd.file().metadata().and_then(|metadata| refuse_huge_pages(metadata.blksize()));
    allocated.map_err(failed)?;
    Ok(memfd)
}

/// The most characters of a memfd's name: a character has up to four bytes, and a name 249.
const LABEL: usize = 60;
