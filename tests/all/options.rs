//! Each option of the builder with each kind of region and each server: the region has it, or `build`
//! refuses it and says why.

use crate::guests::adopt;
use crate::{PAGE, pattern, reason};
use pagestitch::source::FailureReason;
use pagestitch::{
    AdoptedRegion, Budget, BuildOption, Builder, Eager, Error, ErrorKind, Inline, Manual, Pool, Readahead,
    Recording, Region, Scope, Server, scope,
};
use pagestitch_testkit::guest::Guest;

const BYTES: usize = 4 * PAGE;

fn builder() -> Builder {
    Region::builder().name("r").chunk(pattern(5, BYTES))
}

/// The options, by the names of their methods.
const OPTIONS: [&str; 60] = [
    "writable",
    "hardware_read_only",
    "writable and hardware_read_only",
    "dumped",
    "readahead",
    "no readahead",
    "max_mappings",
    "max_in_flight",
    "populate_threads",
    "no populate_threads",
    "shards",
    "report_discards",
    "no reports of discards",
    "record",
    "replay",
    "on_page_failure",
    "record_latency",
    "inherit_on_fork",
    "page_aligned",
    "align",
    "require_zero_copy",
    "release_sources",
    "release_sources and inherit_on_fork",
    "shards and inherit_on_fork",
    "budget",
    "budget and writable",
    "budget and hardware_read_only",
    "budget and dumped",
    "budget and readahead",
    "budget and populate_threads",
    "budget and shards",
    "budget and report_discards",
    "budget and no reports of discards",
    "budget and record",
    "budget and replay",
    "budget and inherit_on_fork",
    "budget and release_sources",
    "budget and track_changes",
    "budget and capacity",
    "on_memfd",
    "on_memfd and writable",
    "on_memfd and hardware_read_only",
    "on_memfd and dumped",
    "on_memfd and readahead",
    "on_memfd and max_mappings",
    "on_memfd and max_in_flight",
    "on_memfd and populate_threads",
    "on_memfd and shards",
    "on_memfd and report_discards",
    "on_memfd and no reports of discards",
    "on_memfd and record",
    "on_memfd and replay",
    "on_memfd and on_page_failure",
    "on_memfd and record_latency",
    "on_memfd and inherit_on_fork",
    "on_memfd and page_aligned",
    "on_memfd and require_zero_copy",
    "on_memfd and release_sources",
    "on_memfd and budget",
    "on_memfd and capacity",
];

/// Sets an option, in a scope or without one.
fn set<S>(option: &str, builder: Builder<S>) -> Builder<S> {
    if let Some(other) = option.strip_prefix("budget and ") {
        return set(other, set("budget", builder));
    }
    if let Some(other) = option.strip_prefix("on_memfd and ") {
        return set(other, builder.on_memfd());
    }
    match option {
        "on_memfd" => builder.on_memfd(),
        "budget" => builder.budget(&Budget::bytes(64 << 20).unwrap()),
        // Without a budget these have tests of their own.
        "track_changes" => builder.writable().track_changes(),
        "capacity" => builder.capacity(1 << 20),
        "writable" => builder.writable(),
        "hardware_read_only" => builder.hardware_read_only(),
        "writable and hardware_read_only" => builder.writable().hardware_read_only(),
        "dumped" => builder.dumped(),
        "readahead" => builder.readahead(Readahead::Adaptive),
        "no readahead" => builder.readahead(Readahead::None),
        "max_mappings" => builder.max_mappings(10),
        "max_in_flight" => builder.max_in_flight(1),
        "populate_threads" => builder.populate_threads(2),
        "no populate_threads" => builder.populate_threads(0),
        "shards" => builder.shards(4),
        "shards and inherit_on_fork" => builder.shards(4).inherit_on_fork(),
        "report_discards" => builder.report_discards(true),
        "no reports of discards" => builder.report_discards(false),
        "record" => builder.record(),
        "replay" => builder.replay(&recording()),
        "on_page_failure" => builder.on_page_failure(|_, _| {}),
        "record_latency" => builder.record_latency(),
        "inherit_on_fork" => builder.inherit_on_fork(),
        "page_aligned" => builder.page_aligned(),
        "align" => builder.align(64),
        "require_zero_copy" => builder.require_zero_copy(),
        "release_sources" => builder.release_sources(),
        "release_sources and inherit_on_fork" => builder.release_sources().inherit_on_fork(),
        other => panic!("{other} is no option"),
    }
}

fn recording() -> Recording {
    let pool = Pool::new().unwrap();
    let region = builder().record().build(&pool).unwrap();
    region.populate(..).unwrap();
    region.recording().unwrap()
}

/// Why an option is refused, and which option it is; `None`: the region has it.
fn refusal(option: &str, server: &str, kind: &str, adopted: bool) -> Option<Refusal> {
    match option.strip_prefix("on_memfd") {
        Some(other) => refusal_on_memfd(other.trim_start_matches(" and "), server, kind, adopted),
        None => refusal_in_private_memory(option, server, adopted),
    }
}

/// The refusal of an option of a region on a memfd.
fn refusal_on_memfd(other: &str, server: &str, kind: &str, adopted: bool) -> Option<Refusal> {
    use BuildOption::{Budget, InheritOnFork, OnMemfd, ReleaseSources, ReportDiscards};
    use ErrorKind::{OptionConflict, UnsuitableServer};
    if matches!(kind, "owned" | "scoped") {
        return Some((OptionConflict, Some(OnMemfd)));
    }
    let alone = match other {
        "" | "capacity" => None,
        _ => refusal_in_private_memory(other, server, adopted),
    };
    match (alone, other, server) {
        (_, "budget", "pool" | "manual" | "inline") if !adopted => Some((OptionConflict, Some(Budget))),
        (_, "budget", "eager") if !adopted => Some((UnsuitableServer, Some(OnMemfd))),
        (Some(refused), ..) if refused.0 != ErrorKind::NotZeroCopy => Some(refused),
        (_, "capacity", _) if adopted => Some((OptionConflict, Some(BuildOption::Capacity))),
        (_, _, "inline" | "eager") if adopted => Some((UnsuitableServer, None)),
        _ if adopted => Some((OptionConflict, Some(OnMemfd))),
        (_, "capacity", "eager") => Some((UnsuitableServer, Some(BuildOption::Capacity))),
        (_, _, "eager") => Some((UnsuitableServer, Some(OnMemfd))),
        (_, "inherit_on_fork", _) => Some((OptionConflict, Some(InheritOnFork))),
        (_, "release_sources", _) => Some((OptionConflict, Some(ReleaseSources))),
        (_, "report_discards", _) => Some((OptionConflict, Some(ReportDiscards))),
        (alone, ..) => alone,
    }
}

fn refusal_in_private_memory(option: &str, server: &str, adopted: bool) -> Option<Refusal> {
    use BuildOption::{
        Budget, Capacity, Dumped, HardwareReadOnly, InheritOnFork, MaxInFlight, MaxMappings, PopulateThreads,
        Readahead, Record, RecordLatency, ReleaseSources, Replay, ReportDiscards, Shards, Writable,
    };
    use ErrorKind::{InvalidOption, NotZeroCopy, OptionConflict, UnsuitableServer};
    Some(match (option, server, adopted) {
        ("budget and hardware_read_only", _, true) => (OptionConflict, Some(HardwareReadOnly)),
        ("budget and dumped", _, true) => (OptionConflict, Some(Dumped)),
        ("budget and writable" | "budget and track_changes", _, true) => (OptionConflict, Some(Writable)),
        ("budget and shards", _, true) => (OptionConflict, Some(Shards)),
        ("budget and report_discards", _, _) => (OptionConflict, Some(ReportDiscards)),
        ("budget and no reports of discards", _, true) => (OptionConflict, Some(ReportDiscards)),
        ("budget and readahead", "inline", false) => (UnsuitableServer, Some(Readahead)),
        ("budget and shards", "inline", false) => (UnsuitableServer, Some(Shards)),
        ("budget and replay", "inline", false) => (UnsuitableServer, Some(Replay)),
        ("budget and capacity", "eager", false) => (UnsuitableServer, Some(Capacity)),
        (budget, _, adopted) if budget.starts_with("budget") => {
            let (_, other) = budget.split_once(" and ").unwrap_or_default();
            let refused = ["writable", "record", "inherit_on_fork", "release_sources", "track_changes"];
            match (refused.contains(&other) || adopted, server) {
                (true, _) => (OptionConflict, Some(Budget)),
                (false, "eager") => (UnsuitableServer, Some(Budget)),
                (false, _) => return None,
            }
        }
        ("no populate_threads", _, _) => (InvalidOption, Some(PopulateThreads)),
        ("writable and hardware_read_only", _, _) => (OptionConflict, Some(HardwareReadOnly)),
        ("writable", _, true) => (OptionConflict, Some(Writable)),
        ("hardware_read_only", _, true) => (OptionConflict, Some(HardwareReadOnly)),
        ("dumped", _, true) => (OptionConflict, Some(Dumped)),
        ("max_mappings", _, true) => (OptionConflict, Some(MaxMappings)),
        ("shards" | "shards and inherit_on_fork", _, true) => (OptionConflict, Some(Shards)),
        ("report_discards" | "no reports of discards", _, true) => (OptionConflict, Some(ReportDiscards)),
        ("report_discards", "inline", _) => (UnsuitableServer, Some(ReportDiscards)),
        ("shards and inherit_on_fork", _, _) => (OptionConflict, Some(Shards)),
        ("inherit_on_fork", _, true) => (OptionConflict, Some(InheritOnFork)),
        ("release_sources", _, true) => (OptionConflict, Some(ReleaseSources)),
        ("release_sources and inherit_on_fork", _, true) => (OptionConflict, Some(InheritOnFork)),
        ("release_sources and inherit_on_fork", _, _) => (OptionConflict, Some(ReleaseSources)),
        (_, "inline" | "eager", true) => (UnsuitableServer, None),
        ("require_zero_copy", _, _) => (NotZeroCopy, None),
        ("inherit_on_fork", "inline" | "manual", _) => (UnsuitableServer, Some(InheritOnFork)),
        ("record", "inline" | "eager", _) => (UnsuitableServer, Some(Record)),
        ("replay", "inline", _) => (UnsuitableServer, Some(Replay)),
        ("readahead", "inline", _) => (UnsuitableServer, Some(Readahead)),
        ("max_in_flight", "inline", _) => (UnsuitableServer, Some(MaxInFlight)),
        ("shards", "inline", _) => (UnsuitableServer, Some(Shards)),
        ("record_latency", "inline", _) => (UnsuitableServer, Some(RecordLatency)),
        _ => return None,
    })
}

type Refusal = (ErrorKind, Option<BuildOption>);

fn check(what: &str, built: Result<(), Error>, refusal: Option<Refusal>) {
    match (built, refusal) {
        (Ok(()), None) => {}
        (Err(error), Some(expected)) => {
            assert_eq!((error.kind(), error.option()), expected, "{what}: {error}");
        }
        (built, refusal) => panic!("{what}: {built:?}, expected {refusal:?}"),
    }
}

/// The results of the builds of each kind of region.
fn builds<'s>(option: &str, server: &Server, scope: Scope<'s, '_>, bytes: &'s [u8]) -> [Build; 6] {
    let (owned, scoped) = (|| set(option, builder()), || set(option, scope.region().name("r")).borrow(bytes));
    let finish = |region: AdoptedRegion| assert!(region.finish().is_ok());
    // Without marks, missing pages of a dropped region end their owner, which is this process.
    let guest = || Guest::new(&[BYTES], false).unwrap();
    let (first, second) = (guest(), guest());
    [
        ("owned", false, owned().build(server.clone()).map(drop)),
        ("shared", false, owned().build_shared(server.clone()).map(drop)),
        ("adopted", true, owned().build_adopted(adopt(&first), server.clone()).map(finish)),
        ("scoped", false, scoped().build(server.clone()).map(drop)),
        ("scoped, shared", false, scoped().build_shared(server.clone()).map(drop)),
        (
            "scoped, adopted",
            true,
            scoped().build_adopted(adopt(&second), server.clone()).map(|region| finish(region.into_inner())),
        ),
    ]
}

/// The kind of a region, whether it is adopted, and the result of its build.
type Build = (&'static str, bool, Result<(), Error>);

#[test]
fn each_option_is_had_or_refused_by_each_kind_of_region_and_server() {
    let (pool, manual) = (Pool::new().unwrap(), Manual::new().unwrap());
    let servers: [(&str, Server); 4] = [
        ("pool", (&pool).into()),
        ("manual", (&manual).into()),
        ("inline", Inline.into()),
        ("eager", Eager.into()),
    ];
    // Children take a capability and Linux 6.6: what this process may have shows with a pool.
    let children = builder().inherit_on_fork().build(&pool).is_ok();
    let bytes = pattern(6, BYTES);
    for option in OPTIONS {
        for (name, server) in &servers {
            for (kind, adopted, built) in scope(|scope| builds(option, server, scope, &bytes)) {
                let what = format!("{option}, {kind}, {name}");
                if option == "inherit_on_fork" && *name == "pool" && !adopted && !children {
                    eprintln!("SKIPPED {what}: this process cannot serve children");
                } else {
                    check(&what, built, refusal(option, name, kind, adopted));
                }
            }
        }
    }
}

#[test]
fn a_region_that_outlives_its_scope_keeps_its_filled_pages_and_fails_the_others() {
    let bytes = pattern(7, BYTES);
    let pool = Pool::new().unwrap();
    let region = scope(|scope| {
        let builder = scope.region().readahead(Readahead::None).borrow_range(&bytes, ..2 * PAGE as u64);
        let region = builder.chunk(bytes.clone()).build(&pool).unwrap();
        region.populate(..PAGE as u64).unwrap();
        region.into_inner()
    });
    assert_eq!(region.as_slice()[..PAGE], bytes[..PAGE]);
    assert_eq!(region.as_slice()[2 * PAGE..], bytes);
    let error = region.populate(PAGE as u64..2 * PAGE as u64).unwrap_err();
    assert_eq!(reason(&error), FailureReason::ScopeEnded);
}
