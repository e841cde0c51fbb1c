//! One round: a region is built, touched from several threads, discarded in parts, and dropped.

use super::bounded;
use super::context::{Context, Failure, Run, join_all};
use super::grown;
use super::guest::{ServedGuest, adopt, ranges};
use super::kernel::Injection;
use super::limit;
use super::locked::Locked;
use super::model::{Kind, Model};
use super::owned::OwnedRegion;
use super::replaced;
use super::server::{RunningServer, may_serve_children};
use super::stopped;
use super::store::Failures;
use super::tally::Tally;
use super::written;
use fastrand::Rng;
use pagestitch::{Builder, Readahead, Region};
use pagestitch_testkit::guest::Guest;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;

pub(super) fn run(seed: u64, round: u64, tally: &Arc<Tally>, heartbeat: &AtomicU64) -> Result<(), Failure> {
    let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
    let done = match rng.u8(..) {
        0 => stopped::run(rng.u64(..), tally).map_err(Into::into),
        1..64 => run_guest(&mut rng, round, tally, heartbeat),
        64..140 => run_changing(&mut rng, Run { tally, heartbeat }),
        _ => run_owned(&mut rng, round, tally, heartbeat),
    };
    Injection::end();
    done.map_err(|error| format!("round {round}: {error}"))
}

/// A region of this process.
fn run_owned(
    rng: &mut Rng,
    round: u64,
    tally: &Arc<Tally>,
    heartbeat: &AtomicU64,
) -> Result<(), Box<dyn Error>> {
    let locked = Locked::begin(rng, tally);
    let builder = configure(rng, round);
    let builder = if rng.u8(..4) == 0 { builder.hardware_read_only() } else { builder };
    let (mut model, builder) = Model::random(rng, tally, Kind::Owned, builder)?;
    let injection = Injection::begin(rng, true);
    let server = RunningServer::start(rng, model.inline)?;
    let inherited = server.is_pool() && rng.u8(..3) == 0 && may_serve_children();
    let releases = !inherited && rng.u8(..3) == 0;
    // A page of a released source has no bytes after a discard.
    model.refillable &= !releases;
    let builder = if inherited { builder.inherit_on_fork() } else { builder };
    let builder = if releases { builder.release_sources() } else { builder.keep_sources() };
    let builder = if server.is_inline() { builder } else { configure_events(rng, builder) };
    // Without a number, a small region of a pool shares its userfaultfd.
    let shards =
        if inherited || server.is_inline() { None } else { [None, Some(1), Some(8)][rng.usize(..3)] };
    let builder = match shards {
        Some(most) => builder.shards(rng.usize(1..=most)),
        None => builder,
    };
    if rng.bool() {
        // The region gets the userfaultfd of this one.
        drop(Region::builder().chunk(vec![1u8; 10]).build(server.server())?);
    }
    let region = builder.build(server.server())?;
    Tally::count(&tally.shards, region.shards().len() as u64);
    let (context, reads_events) =
        (Context { model: &model, run: Run { tally, heartbeat } }, !server.is_inline());
    let owned = OwnedRegion {
        region: &region,
        context,
        injection,
        reads_events,
        inherited,
        releases,
        locked: &locked,
    };
    owned.run(rng)?;
    drop(region);
    Tally::count(&tally.regions, 1);
    Ok(())
}

/// Regions that change: those of a budget, those that are written back, and those that get other bytes. Two of
/// them may share a budget and a server.
fn run_changing(rng: &mut Rng, run: Run<'_>) -> Result<(), Box<dyn Error>> {
    let locked = Locked::begin(rng, run.tally);
    Injection::begin(rng, false);
    let budget = limit::random(rng)?;
    let server = RunningServer::start(rng, false)?;
    // Without a budget, the kernel alone records writes.
    let limit = (rng.u8(..4) > 0).then_some(&budget);
    let beside = rng.u8(..3) == 0;
    let failures = match locked.is_none() {
        false => Failures::None,
        true if beside => Failures::Some,
        true => Failures::All,
    };
    let mut beside_rng = rng.fork();
    thread::scope(|scope| {
        let other = beside.then(|| {
            let run_beside = || {
                let done = bounded::run(&mut beside_rng, run, &budget, &server, false);
                done.map_err(|error| error.to_string())
            };
            scope.spawn(run_beside)
        });
        locked.meanwhile(run.tally);
        let done = match rng.u8(..8) {
            0..3 => written::run(rng, run, limit, &server, failures),
            3..5 => bounded::run(rng, run, &budget, &server, !beside),
            5 | 6 => replaced::run(rng, run, limit, &server, !locked.is_none()),
            _ => grown::run(rng, run, limit, &server),
        };
        let other = join_all(other.into_iter().collect());
        done.and_then(|()| other.map_err(Into::into))
    })?;
    Tally::count(&run.tally.regions, 1);
    limit::check_end(&budget, run.tally)?;
    Ok(())
}

/// A guest in this process. The round locks no memory, because a guest must register its memory before
/// the kernel populates it.
fn run_guest(
    rng: &mut Rng,
    round: u64,
    tally: &Arc<Tally>,
    heartbeat: &AtomicU64,
) -> Result<(), Box<dyn Error>> {
    let builder = configure(rng, round);
    let (model, builder) = Model::random(rng, tally, Kind::Guest, builder)?;
    Injection::begin(rng, false);
    let server = RunningServer::start(rng, false)?;
    let guest = Guest::new(&ranges(rng, model.bytes.len()), false)?;
    let builder = configure_events(rng, builder);
    let region = builder.build_adopted(adopt(&guest)?, server.server())?;
    let context = Context { model: &model, run: Run { tally, heartbeat } };
    ServedGuest::new(rng, &guest, &region, context).run(rng)?;
    drop(region);
    Tally::count(&tally.regions, 1);
    Ok(())
}

/// A builder with random options.
fn configure(rng: &mut Rng, round: u64) -> Builder {
    let builder = Region::builder().name(format!("round {round}"));
    if rng.bool() { builder.readahead(Readahead::None) } else { builder }
}

/// Random options of a region whose faults are read from a userfaultfd.
fn configure_events(rng: &mut Rng, builder: Builder) -> Builder {
    let builder = if rng.u8(..4) == 0 { builder.record_latency() } else { builder };
    if rng.u8(..5) == 0 { builder.max_in_flight(rng.usize(1..3)) } else { builder }
}
