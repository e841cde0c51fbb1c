//! The options of a builder, and the checks of which options exclude each other.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::policy::Readahead;
use crate::reclaim::Budget;
use crate::serve::Demands;
use crate::source::Releasables;
use crate::space::{RecordFor, ServeOptions};
use pagestitch_kernel::{Access, PageSize};

/// All options of a builder. The defaults are those of [`Builder`](crate::Builder).
#[derive(Debug)]
pub(super) struct Options {
    pub(super) name: Option<String>,
    pub(super) access: Access,
    pub(super) hardware_read_only: bool,
    pub(super) dumped: bool,
    pub(super) zero_copy: bool,
    /// `None`: the user has not chosen.
    pub(super) readahead: Option<Readahead>,
    pub(super) max_mappings: Option<usize>,
    /// `None`: the user has not chosen.
    pub(super) shards: Option<usize>,
    /// `None`: the user has not chosen.
    pub(super) report_discards: Option<bool>,
    pub(super) inherit_on_fork: bool,
    /// `None`: the user has not chosen.
    pub(super) release_sources: Option<bool>,
    pub(super) budget: Option<Budget>,
    /// True if the region gives out slices, so that a page never comes back with other bytes.
    pub(super) slices: bool,
    /// The most bytes of a region that grows.
    pub(super) capacity: Option<u64>,
    /// True if the pages are those of a memfd.
    pub(super) on_memfd: bool,
    /// The alignment of all chunks.
    pub(super) align: u64,
    pub(super) serve_options: ServeOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            access: Access::ReadOnly,
            hardware_read_only: false,
            dumped: false,
            zero_copy: false,
            readahead: None,
            max_mappings: None,
            shards: None,
            report_discards: None,
            inherit_on_fork: false,
            release_sources: None,
            budget: None,
            slices: false,
            capacity: None,
            on_memfd: false,
            align: 1,
            serve_options: ServeOptions::default(),
        }
    }
}

impl Options {
    pub(super) const UNNAMED: &str = "unnamed";

    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(Self::UNNAMED)
    }

    /// The memory that the region releases when it has all of its bytes. If the user has not chosen, these
    /// are buffers of a region whose pages nothing but an `unsafe` call of the application discards. Without
    /// poison markers, a page of a released source that is swapped out may be taken for a discarded one, and
    /// is lost then.
    pub(super) fn releasables(&self, has_poison: bool) -> Option<Releasables> {
        let buffers = Releasables::Buffers { least: PageSize::system().bytes() };
        match self.release_sources {
            Some(true) => Some(Releasables::Owned),
            Some(false) => None,
            None => (has_poison && self.is_never_discarded()).then_some(buffers),
        }
    }

    /// True if neither the library, nor another process, nor a safe call discards pages.
    fn is_never_discarded(&self) -> bool {
        self.slices
            && self.access == Access::ReadOnly
            && self.budget.is_none()
            && self.capacity.is_none()
            && !self.inherit_on_fork
            // The option is for programs that discard pages.
            && self.report_discards.is_none()
    }

    /// The demands of the region on its server.
    pub(super) const fn demands(&self, adopted: bool) -> Demands {
        let ServeOptions {
            record_latency,
            max_in_flight,
            populate_threads: _,
            record,
            replay,
            reporter: _,
            record_of_writes,
        } = &self.serve_options;
        Demands {
            adopted,
            children: self.inherit_on_fork,
            recording: match replay {
                Some(_) => Some(BuildOption::Replay),
                None if *record => Some(BuildOption::Record),
                None => None,
            },
            readahead: matches!(&self.readahead, Some(readahead) if !matches!(readahead, Readahead::None)),
            limit: max_in_flight.is_some(),
            shards: self.has_shards(),
            report_discards: matches!(self.report_discards, Some(true)),
            timed: *record_latency,
            tracked: record_of_writes.option(),
            growth: self.capacity.is_some(),
            on_memfd: self.on_memfd,
        }
    }

    /// The options that a region that grows cannot have.
    fn refused_growth(&self, adopted: bool) -> [(bool, BuildOption, &'static str); 7] {
        let grows = self.capacity.is_some();
        let ServeOptions { record, replay, record_of_writes, .. } = &self.serve_options;
        [
            (
                grows && adopted,
                BuildOption::Capacity,
                "adopted memory has the length that its owner has given it: leave out capacity()",
            ),
            (
                grows && self.inherit_on_fork,
                BuildOption::InheritOnFork,
                "a forked child would not know the appended chunks: leave out inherit_on_fork() or capacity()",
            ),
            (
                grows && self.hardware_read_only,
                BuildOption::HardwareReadOnly,
                "an append writes behind the last byte of a page: leave out hardware_read_only() or capacity()",
            ),
            (
                grows && self.zero_copy,
                BuildOption::Capacity,
                "appended chunks are copied: leave out require_zero_copy() or capacity()",
            ),
            (
                grows && self.release_sources == Some(true),
                BuildOption::ReleaseSources,
                "appended sources are kept: leave out release_sources() or capacity()",
            ),
            (
                grows && (*record || replay.is_some()),
                BuildOption::Capacity,
                "a recording is of a region of one length: leave out record(), replay() or capacity()",
            ),
            (
                grows && record_of_writes.any(),
                BuildOption::TrackChanges,
                "the record of written pages is of one length: leave out track_changes(), write_back() or capacity()",
            ),
        ]
    }

    /// True if the user has asked for more than one shard.
    const fn has_shards(&self) -> bool {
        matches!(self.shards, Some(2..))
    }

    /// Refuses options that exclude each other, and options that do not apply to adopted memory.
    pub(super) fn check_target(&self, adopted: bool) -> Result<(), Error> {
        let writable = self.access == Access::Writable;
        refuse_first([(
            self.hardware_read_only && writable,
            BuildOption::HardwareReadOnly,
            "hardware_read_only() stops the writes that writable() allows: leave out one of the two",
        )])?;
        if adopted {
            self.check_adopted()?;
        }
        if self.budget.is_some() {
            self.check_budget()?;
        }
        refuse_first([
            (
                self.inherit_on_fork && self.has_shards(),
                BuildOption::Shards,
                "each userfaultfd of a region reports a forked child of its own: leave out shards() or inherit_on_fork()",
            ),
            (
                self.inherit_on_fork && self.release_sources == Some(true),
                BuildOption::ReleaseSources,
                "forked children are filled from the same sources: leave out release_sources() or inherit_on_fork()",
            ),
        ])?;
        refuse_first(self.refused_growth(adopted))?;
        self.check_tracked(adopted)
    }

    /// Refuses options that exclude a record of written pages.
    fn check_tracked(&self, adopted: bool) -> Result<(), Error> {
        let Some(option) = self.serve_options.record_of_writes.option() else { return Ok(()) };
        refuse_first([
            (
                adopted,
                option,
                "only the owner of adopted memory can protect its pages: leave out track_changes() and write_back()",
            ),
            (
                self.access != Access::Writable,
                option,
                "a read-only region does not change: add writable(), or leave out track_changes()",
            ),
            (
                self.inherit_on_fork,
                option,
                "forked children write to pages of their own: leave out inherit_on_fork(), or track_changes() and write_back()",
            ),
        ])
    }

    /// Refuses options that exclude a budget.
    fn check_budget(&self) -> Result<(), Error> {
        let uses = self.serve_options.record_of_writes;
        refuse_first([
            (
                uses.has(RecordFor::Changes) && !uses.has(RecordFor::WriteBack),
                BuildOption::Budget,
                "a written page would be lost when it leaves, because nothing writes it back: add write_back(), or leave out track_changes() or budget()",
            ),
            (
                self.access == Access::Writable && !uses.any(),
                BuildOption::Budget,
                "a written page would be lost when it leaves, because nothing writes it back: add write_back(), or leave out writable() or budget()",
            ),
            (
                self.access == Access::Writable && self.slices,
                BuildOption::Budget,
                "a slice must not change when a page comes back: use build_shared(), or leave out budget()",
            ),
            (
                self.report_discards == Some(true),
                BuildOption::ReportDiscards,
                "each page that leaves would be reported, and its evictor would wait: leave out report_discards() or budget()",
            ),
            (
                self.inherit_on_fork,
                BuildOption::Budget,
                "a page that a forked child shares cannot leave: leave out inherit_on_fork() or budget()",
            ),
            (
                self.release_sources == Some(true),
                BuildOption::Budget,
                "a page that leaves is filled from its source again: leave out release_sources() or budget()",
            ),
            (
                self.serve_options.record,
                BuildOption::Budget,
                "a page that comes back would be recorded in the place of a first touch: leave out record() or budget()",
            ),
        ])
    }

    /// Refuses options that do not apply to adopted memory.
    fn check_adopted(&self) -> Result<(), Error> {
        refuse_first([
            (
                self.access == Access::Writable,
                BuildOption::Writable,
                "only its owner writes to adopted memory: leave out writable()",
            ),
            (
                self.hardware_read_only,
                BuildOption::HardwareReadOnly,
                "adopted memory is mapped by its owner: leave out hardware_read_only()",
            ),
            (
                self.dumped,
                BuildOption::Dumped,
                "adopted memory is part of its owner's core dumps, not of this process's: leave out dumped()",
            ),
            (
                self.max_mappings.is_some(),
                BuildOption::MaxMappings,
                "nothing is mapped in adopted memory: leave out max_mappings()",
            ),
            (
                self.has_shards(),
                BuildOption::Shards,
                "adopted memory has the one userfaultfd of its owner: leave out shards()",
            ),
            (
                self.report_discards.is_some(),
                BuildOption::ReportDiscards,
                "the owner of adopted memory has chosen the events of its userfaultfd: leave out report_discards()",
            ),
            (
                self.budget.is_some(),
                BuildOption::Budget,
                "only its owner takes pages of adopted memory away: leave out budget()",
            ),
            (
                self.inherit_on_fork,
                BuildOption::InheritOnFork,
                "children of adopted memory's owner cannot be served, because their discarded pages are unknown: leave out inherit_on_fork()",
            ),
            (
                self.release_sources == Some(true),
                BuildOption::ReleaseSources,
                "a page of adopted memory may be filled again, because only its owner knows which pages are present: leave out release_sources()",
            ),
        ])
    }
}

/// The error of the first conflict: true, the option, and the remedy.
pub(super) fn refuse_first<const N: usize>(conflicts: [(bool, BuildOption, &str); N]) -> Result<(), Error> {
    match conflicts.into_iter().find(|(is, ..)| *is) {
        Some((_, option, what)) => Err(Error::new(ErrorKind::OptionConflict, what).of_option(option)),
        None => Ok(()),
    }
}
