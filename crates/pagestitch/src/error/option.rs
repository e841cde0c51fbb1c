//! The options that errors name.

use std::fmt;

/// An option of a builder. `Display` is the name of its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BuildOption {
    /// [`Builder::writable`](crate::Builder::writable).
    Writable,
    /// [`Builder::hardware_read_only`](crate::Builder::hardware_read_only).
    HardwareReadOnly,
    /// [`Builder::dumped`](crate::Builder::dumped).
    Dumped,
    /// [`Builder::readahead`](crate::Builder::readahead).
    Readahead,
    /// [`Builder::max_mappings`](crate::Builder::max_mappings).
    MaxMappings,
    /// [`Builder::shards`](crate::Builder::shards).
    Shards,
    /// [`Builder::report_discards`](crate::Builder::report_discards).
    ReportDiscards,
    /// [`Builder::max_in_flight`](crate::Builder::max_in_flight), also of a pool.
    MaxInFlight,
    /// [`Builder::populate_threads`](crate::Builder::populate_threads).
    PopulateThreads,
    /// [`Builder::record`](crate::Builder::record).
    Record,
    /// [`Builder::replay`](crate::Builder::replay).
    Replay,
    /// [`Builder::record_latency`](crate::Builder::record_latency).
    RecordLatency,
    /// [`Builder::inherit_on_fork`](crate::Builder::inherit_on_fork).
    InheritOnFork,
    /// [`Builder::release_sources`](crate::Builder::release_sources).
    ReleaseSources,
    /// [`Builder::track_changes`](crate::Builder::track_changes).
    TrackChanges,
    /// [`Builder::budget`](crate::Builder::budget), or [`Budget::bytes`](crate::Budget::bytes).
    Budget,
    /// [`Builder::write_back`](crate::Builder::write_back).
    WriteBack,
    /// [`Builder::capacity`](crate::Builder::capacity)
    Capacity,
    /// [`Builder::on_memfd`](crate::Builder::on_memfd).
    OnMemfd,
    /// [`PoolBuilder::name`](crate::PoolBuilder::name).
    Name,
    /// [`PoolBuilder::workers`](crate::PoolBuilder::workers), or the threads of
    /// [`Manual::group`](crate::Manual::group).
    Workers,
    /// [`PoolBuilder::max_workers`](crate::PoolBuilder::max_workers).
    MaxWorkers,
    /// [`PoolBuilder::placement`](crate::PoolBuilder::placement).
    Placement,
    /// [`AdoptedMemory::range`](crate::AdoptedMemory::range).
    Range,
    /// [`AdoptedMemory::page_size`](crate::AdoptedMemory::page_size).
    PageSize,
    /// [`AdoptedMemory::owner`](crate::AdoptedMemory::owner).
    Owner,
}

impl fmt::Display for BuildOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Writable => "writable",
            Self::HardwareReadOnly => "hardware_read_only",
            Self::Dumped => "dumped",
            Self::Readahead => "readahead",
            Self::MaxMappings => "max_mappings",
            Self::Shards => "shards",
            Self::ReportDiscards => "report_discards",
            Self::MaxInFlight => "max_in_flight",
            Self::PopulateThreads => "populate_threads",
            Self::Record => "record",
            Self::Replay => "replay",
            Self::RecordLatency => "record_latency",
            Self::InheritOnFork => "inherit_on_fork",
            Self::ReleaseSources => "release_sources",
            Self::TrackChanges => "track_changes",
            Self::Budget => "budget",
            Self::WriteBack => "write_back",
            Self::Capacity => "capacity",
            Self::OnMemfd => "on_memfd",
            Self::Name => "name",
            Self::Workers => "workers",
            Self::MaxWorkers => "max_workers",
            Self::Placement => "placement",
            Self::Range => "range",
            Self::PageSize => "page_size",
            Self::Owner => "owner",
        })
    }
}
