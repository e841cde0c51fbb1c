//! The reasons for methods, which plans name.

use std::fmt;

/// The reason for the method of a run of chunks; if its pages are copied, the reason why they are
/// not mapped. `Display` prints the words of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PlanReason {
    /// Padding up to the next chunk's page.
    Padding,
    /// Padding in pages that show a source in place: the source's bytes around the chunk.
    PaddingInPlace,
    /// A hole: the kernel's zero page.
    Zeros,
    /// Memory of the process, which has one address.
    Memory,
    /// A [`Fetch`](crate::source::Fetch), which answers later.
    Fetched,
    /// A [`Source`](crate::Source), which is read into a buffer.
    Read,

    /// The region is foreign memory, into which pages are copied.
    ForeignMemory,
    /// The region is [on a memfd](crate::Builder::on_memfd) of its own, into which pages are copied.
    OnMemfd,
    /// The region [tracks changes](crate::Builder::track_changes): its pages arrive by copies.
    ChangesTracked,
    /// The region is filled when it is built ([`Eager`](crate::Eager)): no page moves in or is mapped
    /// later.
    FilledByBuild,
    /// The chunk was [appended](crate::Region::append): nothing is mapped while threads read.
    Appended,
    /// The chunk has another offset in its page than in its source.
    OtherOffset,
    /// The chunk has another offset in its huge page (hugetlbfs) than in its source.
    OtherOffsetInHugePage,
    /// The chunk covers no whole page.
    NoWholePage,
    /// The chunk covers no whole huge page (hugetlbfs).
    NoWholeHugePage,
    /// Only the edge of the chunk is copied.
    Edge,
    /// Only the edge of the chunk is copied, which has huge pages (hugetlbfs).
    EdgeOfHugePage,
    /// The huge pages (hugetlbfs) of the source are larger than the region's alignment.
    LargerHugePages,
    /// The kernel has no minor faults of memfds (Linux 5.14).
    NoMinorFaults,
    /// No mapping is left (`vm.max_map_count`, or `max_mappings()`).
    NoMappings,
    /// The kernel does not move donated pages without unmapping them (Linux 5.7).
    NoMoves,
    /// The kernel does not map the file.
    UnmappableFile,
    /// No huge page is left for writes to the source (`vm.nr_hugepages`).
    NoHugePages,

    /// Donated pages, which move in on first touch.
    MovesOnTouch,
    /// Donated pages, which have moved in.
    Moved,
    /// A memfd that is filled later, of which each page is mapped once it is there.
    MappedWhenFilled,
    /// The file's own pages; its opener has promised that they do not change.
    MappedByPromise,
    /// The file's own pages, which fs-verity keeps from changing.
    MappedByVerity,
    /// The file's own pages, until they are written to.
    MappedUntilWritten,
    /// A second mapping of the same pages.
    MappedTwice,
    /// Frames of physical memory.
    MappedFrames,
    /// The source's own pages.
    Mapped,
}

impl fmt::Display for PlanReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Padding => "padding up to the next chunk's page",
            Self::PaddingInPlace => "padding with the source's own bytes around the chunk",
            Self::Zeros => "zeros: the kernel's zero page, no copy",
            Self::Memory => "private memory: copied once, from its own address",
            Self::Fetched => "fetched asynchronously, then copied; no worker waits",
            Self::Read => "read into a buffer, then copied",
            Self::ForeignMemory => "foreign memory: pages are copied into it",
            Self::OnMemfd => "the region has a memfd of its own, and pages are copied into it",
            Self::ChangesTracked => "changes are tracked, and a page that is mapped or moved has no record: copied",
            Self::FilledByBuild => {
                "the region is filled when it is built (Eager), so no page moves in or is mapped later: copied"
            }
            Self::Appended => "appended to a region that threads read: copied",
            Self::OtherOffset => "at another offset in its page than in its source: copied",
            Self::OtherOffsetInHugePage => {
                "at another offset in its huge page (hugetlbfs) than in its source: copied"
            }
            Self::NoWholePage => "covers no whole page: copied",
            Self::NoWholeHugePage => "covers no whole huge page (hugetlbfs): copied",
            Self::Edge => "an edge lies inside a page: its whole pages are shown in place, the edge is copied",
            Self::EdgeOfHugePage => {
                "an edge lies inside a huge page: whole huge pages (hugetlbfs) are shown in place, the edge is copied"
            }
            Self::LargerHugePages => {
                "its huge pages (hugetlbfs) are larger than the region's alignment of 2 MiB: copied"
            }
            Self::NoMinorFaults => {
                "minor faults of memfds need Linux 5.14: the memfd is filled, then copied"
            }
            Self::NoMappings => "no mapping is left for it (vm.max_map_count): copied",
            Self::NoMoves => "donated pages cannot be moved without unmapping them (Linux 5.7): copied",
            Self::UnmappableFile => {
                "the kernel does not map this file (FUSE with direct_io, sysfs, sealed against writes): copied"
            }
            Self::NoHugePages => "no huge pages are left for writes to it (vm.nr_hugepages): copied",
            Self::MovesOnTouch => "donated: its pages move in when they are touched",
            Self::Moved => "donated: its pages have moved in",
            Self::MappedWhenFilled => "mapped once the memfd has the page",
            Self::MappedByPromise => {
                "mapped in place: the file's own pages, which its opener promised not to change"
            }
            Self::MappedByVerity => "mapped in place: the file's own pages, which fs-verity keeps from changing",
            Self::MappedUntilWritten => "mapped in place: the file's own pages, until they are written to",
            Self::MappedTwice => "mapped in place: a second mapping of the same pages",
            Self::MappedFrames => "mapped in place: the frames themselves",
            Self::Mapped => "mapped in place: the source's own pages",
        })
    }
}
