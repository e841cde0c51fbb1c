//! Each option of the builder with each kind of region and each server: the region has it, or `build`
//! refuses it and says why.

use crate::guests::adopt;
use crate::{PAGE, pattern};
use pagestitch::{
    BuildOption, Builder, Eager, Error, ErrorKind, Inline, Manual, Pool, Readahead, Recording, Region, Server,
};
use pagestitch_testkit::guest::Guest;

const BYTES: usize = 4 * PAGE;

fn builder() -> Builder {
    Region::builder().name("r").chunk(pattern(5, BYTES))
}

/// An option, by its name.
type Option = (&'static str, fn(Builder) -> Builder);

const OPTIONS: [Option; 13] = [
    ("writable", |builder| builder.writable()),
    ("hardware_read_only", |builder| builder.hardware_read_only()),
    ("writable and hardware_read_only", |builder| builder.writable().hardware_read_only()),
    ("dumped", |builder| builder.dumped()),
    ("readahead", |builder| builder.readahead(Readahead::Adaptive)),
    ("no readahead", |builder| builder.readahead(Readahead::None)),
    ("max_mappings", |builder| builder.max_mappings(10)),
    ("max_in_flight", |builder| builder.max_in_flight(1)),
    ("record", |builder| builder.record()),
    ("replay", |builder| builder.replay(&recording())),
    ("on_page_failure", |builder| builder.on_page_failure(|_, _| {})),
    ("record_latency", |builder| builder.record_latency()),
    ("inherit_on_fork", |builder| builder.inherit_on_fork()),
];

fn recording() -> Recording {
    let pool = Pool::new().unwrap();
    let region = builder().record().build(&pool).unwrap();
    region.populate(..).unwrap();
    region.recording().unwrap()
}

/// Why an option is refused, and which option it is; `None`: the region has it.
fn refusal(option: &str, server: &str, adopted: bool) -> std::option::Option<Refusal> {
    use BuildOption::{
        Dumped, HardwareReadOnly, InheritOnFork, MaxInFlight, MaxMappings, Readahead, Record, RecordLatency,
        Replay, Writable,
    };
    use ErrorKind::{OptionConflict, UnsuitableServer};
    Some(match (option, server, adopted) {
        ("writable and hardware_read_only", _, _) => (OptionConflict, Some(HardwareReadOnly)),
        ("writable", _, true) => (OptionConflict, Some(Writable)),
        ("hardware_read_only", _, true) => (OptionConflict, Some(HardwareReadOnly)),
        ("dumped", _, true) => (OptionConflict, Some(Dumped)),
        ("max_mappings", _, true) => (OptionConflict, Some(MaxMappings)),
        ("inherit_on_fork", _, true) => (OptionConflict, Some(InheritOnFork)),
        (_, "inline" | "eager", true) => (UnsuitableServer, None),
        ("inherit_on_fork", "inline" | "manual", _) => (UnsuitableServer, Some(InheritOnFork)),
        ("record", "inline" | "eager", _) => (UnsuitableServer, Some(Record)),
        ("replay", "inline", _) => (UnsuitableServer, Some(Replay)),
        ("readahead", "inline", _) => (UnsuitableServer, Some(Readahead)),
        ("max_in_flight", "inline", _) => (UnsuitableServer, Some(MaxInFlight)),
        ("record_latency", "inline", _) => (UnsuitableServer, Some(RecordLatency)),
        _ => return None,
    })
}

type Refusal = (ErrorKind, std::option::Option<BuildOption>);

fn check(what: &str, built: Result<(), Error>, refusal: std::option::Option<Refusal>) {
    match (built, refusal) {
        (Ok(()), None) => {}
        (Err(error), Some(expected)) => {
            assert_eq!((error.kind(), error.option()), expected, "{what}: {error}");
        }
        (built, refusal) => panic!("{what}: {built:?}, expected {refusal:?}"),
    }
}

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
    for (option, set) in OPTIONS {
        for (name, server) in &servers {
            let refused = |adopted| refusal(option, name, adopted);
            let what = |kind| format!("{option}, {kind}, {name}");
            if option == "inherit_on_fork" && *name == "pool" && !children {
                eprintln!("SKIPPED {}: this process cannot serve children", what("owned"));
            } else {
                check(&what("owned"), set(builder()).build(server.clone()).map(drop), refused(false));
                check(&what("shared"), set(builder()).build_shared(server.clone()).map(drop), refused(false));
            }
            let guest = Guest::new(&[BYTES], false).unwrap();
            let adopted = set(builder()).build_adopted(adopt(&guest), server.clone());
            // Without marks, missing pages of a dropped region end their owner, which is this process.
            let built = adopted.map(|region| assert!(region.finish().is_ok()));
            check(&what("adopted"), built, refused(true));
        }
    }
}
