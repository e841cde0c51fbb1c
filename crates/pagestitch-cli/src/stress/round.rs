//! One round: a region is built, touched from several threads, discarded in parts, and dropped.

use super::kernel::Injection;
use super::locked::Locked;
use super::model::{Model, PAGE};
use super::stopped;
use super::tally::Tally;
use fastrand::Rng;
use nix::sys::wait::WaitStatus;
use pagestitch::{
    AdoptedMemory, AdoptedRegion, Inline, Manual, Pool, Process, Readahead, Region, Server, Support,
};
use pagestitch_kernel::Features;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::memory::{Split, discard};
use std::ops::Range;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

type Failure = String;

pub(super) fn run(seed: u64, round: u64, tally: &Arc<Tally>, heartbeat: &AtomicU64) -> Result<(), Failure> {
    let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
    if rng.u8(..) == 0 {
        return stopped::run(rng.u64(..), tally).map_err(|failure| format!("round {round}: {failure}"));
    }
    let adopted = rng.u8(..4) == 0;
    // The owner of adopted memory must register it before the kernel populates it, which locking
    // cannot respect.
    let locked = if adopted { None } else { Some(Locked::begin(&mut rng, tally)) };
    let builder = Region::builder().name(format!("round {round}"));
    let builder = if rng.bool() { builder.readahead(Readahead::None) } else { builder };
    let builder = if rng.u8(..4) == 0 { builder.record_latency() } else { builder };
    let builder = if rng.u8(..5) == 0 { builder.max_in_flight(rng.usize(1..3)) } else { builder };
    let builder = if rng.u8(..4) == 0 { builder.hardware_read_only() } else { builder };
    let in_round = |error: &dyn std::fmt::Display| format!("round {round}: {error}");
    let (model, builder) =
        Model::random(&mut rng, tally, adopted, builder).map_err(|error| in_round(&error))?;
    let injection = Injection::begin(&mut rng, !adopted);
    let server =
        RunningServer::start(&mut rng, model.inline && !adopted).map_err(|error| in_round(&error))?;
    let children = !adopted && server.pool.is_some() && rng.u8(..3) == 0 && may_serve_children();
    let builder = if children { builder.inherit_on_fork() } else { builder };
    let done = if adopted {
        let guest =
            Guest::new(&ranges(&mut rng, model.bytes.len()), false).map_err(|error| in_round(&error))?;
        let memory = adopt(&guest).map_err(|error| in_round(&error))?;
        let region = builder.build_adopted(memory, server.server()).map_err(|error| in_round(&error))?;
        touch_guest(&mut rng, &guest, &region, &model, tally, heartbeat)
    } else {
        let region = builder.build(server.server()).map_err(|error| in_round(&error))?;
        touch(
            &mut rng,
            (
                &region,
                Conditions { events: !server.is_inline(), injection, children, locked: locked.as_ref() },
            ),
            &model,
            tally,
            heartbeat,
        )
    };
    Injection::end();
    drop(server);
    Tally::count(&tally.regions, 1);
    done.map_err(|failure| in_round(&failure))
}

/// The conditions of a round.
#[derive(Debug, Clone, Copy)]
struct Conditions<'a> {
    /// The server reads events of discarded pages.
    events: bool,
    injection: Injection,
    /// Forked children inherit the region.
    children: bool,
    /// The memory that is locked during the round.
    locked: Option<&'a Locked>,
}

/// True if this process may serve children on this kernel.
fn may_serve_children() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let built =
            Pool::new().and_then(|pool| Region::builder().chunk(vec![1]).inherit_on_fork().build(&pool));
        built.is_ok()
    })
}

/// A running server, until this is dropped.
struct RunningServer {
    pool: Option<Pool>,
    manual: Option<Server>,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl RunningServer {
    fn start(rng: &mut Rng, inline: bool) -> Result<Self, pagestitch::Error> {
        let mut server = Self { pool: None, manual: None, stop: Arc::default(), threads: vec![] };
        match rng.u8(..5) {
            0 if inline => {}
            1 => {
                let manuals = Manual::group(rng.usize(1..3))?;
                server.manual = Some(Server::from(&manuals[0]));
                server.threads = manuals
                    .into_iter()
                    .map(|manual| serve_in_thread(manual, Arc::clone(&server.stop)))
                    .collect();
            }
            _ => {
                let pool = Pool::builder();
                let pool = if rng.bool() { pool.workers(rng.usize(1..5)) } else { pool };
                server.pool = Some(pool.start()?);
            }
        }
        Ok(server)
    }

    /// An inline server reads no events of discarded pages.
    const fn is_inline(&self) -> bool {
        self.pool.is_none() && self.manual.is_none()
    }

    fn server(&self) -> Server {
        match (&self.pool, &self.manual) {
            (Some(pool), _) => pool.into(),
            (_, Some(manual)) => manual.clone(),
            _ => Inline.into(),
        }
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn serve_in_thread(mut manual: Manual, stop: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let _ = poll(&mut [PollFd::new(manual.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5_u8));
            manual.serve_ready(64);
        }
    })
}

fn touch(
    rng: &mut Rng,
    (region, conditions): (&Region, Conditions<'_>),
    model: &Model,
    tally: &Tally,
    heartbeat: &AtomicU64,
) -> Result<(), Failure> {
    let threads = rng.usize(1..6);
    let forks = rng.u8(..8) == 0;
    let outcome = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                let mut rng = rng.fork();
                scope.spawn(move || touch_at_random(&mut rng, (region, conditions), model, tally, heartbeat))
            })
            .collect();
        conditions.locked.iter().for_each(|locked| locked.meanwhile(tally));
        if forks {
            Tally::count(&tally.forks, 1);
            let _ = Command::new("true").status();
        }
        let children: Result<(), Failure> = (0..if conditions.children { 3 } else { 0 }).try_for_each(|_| {
            Tally::count(&tally.children, 1);
            // The child has its own copy of the counters, which is lost.
            let child = ForkedChild::start(|| {
                i32::from(verify_in_child(&mut rng.fork(), region, conditions, model, tally).is_err())
            });
            let ended = child.wait();
            if matches!(ended, WaitStatus::Exited(_, 0)) {
                Ok(())
            } else {
                Err(format!("a forked child ended with {ended:?}"))
            }
        });
        let joined = threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| String::from("a thread panicked"))?);
        children.and(joined)
    });
    outcome?;
    // The sources are repaired now, so every page can be filled.
    model.repair();
    Injection::end();
    retry_and_verify(region, conditions.injection, model, tally)?;
    let metrics = region.metrics();
    Tally::count(&tally.faults, metrics.faults);
    Tally::count(&tally.pages, metrics.pages_installed());
    Ok(())
}

fn touch_at_random(
    rng: &mut Rng,
    (region, conditions): (&Region, Conditions<'_>),
    model: &Model,
    tally: &Tally,
    heartbeat: &AtomicU64,
) -> Result<(), Failure> {
    for _ in 0..rng.usize(10..150) {
        heartbeat.fetch_add(1, Ordering::Relaxed);
        let range = range(rng, model.bytes.len());
        // With fatal answers any page may be poisoned, and a touch of it would be a signal.
        let fatal = conditions.injection == Injection::Fatal;
        match rng.u8(..11) {
            0..5 if !fatal && !model.may_fail(&range) => {
                verify(&region.as_slice()[range.clone()], &range, model, tally)?;
            }
            5 => {
                let done = region.populate(range.start as u64..range.end as u64);
                check(done, fatal, &range, model, tally)?;
            }
            6 if !fatal && model.refillable && conditions.events => {
                discard(region, range.clone());
                Tally::count(&tally.discards, 1);
            }
            7 if rng.bool() => {
                split(rng).region(region, range);
                Tally::count(&tally.splits, 1);
            }
            _ => {
                let mut read = vec![0; range.len()];
                let done = region.read_at(range.start as u64, &mut read);
                if done.is_ok() {
                    verify(&read, &range, model, tally)?;
                }
                check(done, fatal, &range, model, tally)?;
            }
        }
    }
    Ok(())
}

/// A random call that splits a mapping.
fn split(rng: &mut Rng) -> Split {
    match rng.u8(..7) {
        0 => Split::Protect,
        1 | 2 => Split::Lock(rng.bool()),
        3 => Split::PageOut,
        _ => Split::Advise(rng.bool()),
    }
}

/// Reads pages that cannot fail, in a forked child.
fn verify_in_child(
    rng: &mut Rng,
    region: &Region,
    conditions: Conditions<'_>,
    model: &Model,
    tally: &Tally,
) -> Result<(), Failure> {
    for _ in 0..10 {
        let range = range(rng, model.bytes.len());
        if conditions.injection != Injection::Fatal && !model.may_fail(&range) {
            verify(&region.as_slice()[range.clone()], &range, model, tally)?;
        }
    }
    Ok(())
}

fn retry_and_verify(
    region: &Region,
    injection: Injection,
    model: &Model,
    tally: &Tally,
) -> Result<(), Failure> {
    let failed = region.failures().len();
    match region.retry_failed(..) {
        Ok(()) => {
            Tally::count(&tally.retried, failed as u64);
            let mut read = vec![0; model.bytes.len()];
            region
                .read_at(0, &mut read)
                .map_err(|error| format!("fails after a successful retry: {error}"))?;
            verify(&read, &(0..read.len()), model, tally)
        }
        // Before Linux 6.6 a failed page is unmapped for good.
        Err(_) if !Support::current().has(Features::POISON) => Ok(()),
        // Without memory for a poison marker the page was unmapped.
        Err(error) if injection == Injection::Fatal && error.to_string().contains("not mapped any more") => {
            Ok(())
        }
        Err(error) => Err(format!("the retry fails: {error}")),
    }
}

fn verify(read: &[u8], range: &Range<usize>, model: &Model, tally: &Tally) -> Result<(), Failure> {
    let expected = &model.bytes[range.clone()];
    if let Some(at) = read.iter().zip(expected).position(|(read, expected)| read != expected) {
        let (read, expected) = (read[at], expected[at]);
        return Err(format!("byte {} is {read:#x}, expected {expected:#x}", range.start + at));
    }
    Tally::count(&tally.bytes_verified, read.len() as u64);
    Ok(())
}

fn check(
    done: Result<(), pagestitch::Error>,
    fatal: bool,
    range: &Range<usize>,
    model: &Model,
    tally: &Tally,
) -> Result<(), Failure> {
    match done {
        Err(_) if fatal => {
            Tally::count(&tally.errors_as_injected, 1);
            Ok(())
        }
        Err(error) if !model.may_fail(range) => {
            Err(format!("bytes {range:?} fail, but their source does not: {error}"))
        }
        Err(_) => {
            Tally::count(&tally.errors_as_declared, 1);
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn range(rng: &mut Rng, len: usize) -> Range<usize> {
    let start = rng.usize(..len);
    let most = if rng.u8(..8) == 0 { len } else { 20_000 };
    start..(start + rng.usize(1..=most)).min(len)
}

/// One or two ranges of so many bytes in total.
fn ranges(rng: &mut Rng, bytes: usize) -> Vec<usize> {
    let pages = bytes / PAGE;
    let first = if pages > 1 && rng.bool() { rng.usize(1..pages) } else { pages };
    [first, pages - first].into_iter().filter(|&pages| pages > 0).map(|pages| pages * PAGE).collect()
}

fn adopt(guest: &Guest) -> Result<AdoptedMemory, Box<dyn std::error::Error>> {
    let memory = guest.memory()?;
    // The owner is this process, so unavailable bytes end the test.
    Ok(memory.owner(Process::open(nix::unistd::Pid::this())?))
}

/// Runs a guest in this process: virtual CPUs that touch all pages that cannot fail, and discard
/// pages of their own.
fn touch_guest(
    rng: &mut Rng,
    guest: &Guest,
    region: &AdoptedRegion,
    model: &Model,
    tally: &Tally,
    heartbeat: &AtomicU64,
) -> Result<(), Failure> {
    let pages = model.bytes.len() / PAGE;
    let cpus = rng.usize(1..6);
    // For each page: 1 after it was discarded, when it must read as zeros.
    let gone: Vec<AtomicU8> = (0..pages).map(|_| AtomicU8::new(0)).collect();
    let outcome = thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| {
                let (mut rng, gone) = (rng.fork(), &gone);
                scope.spawn(move || run_cpu(&mut rng, (cpu, cpus), guest, model, gone, tally, heartbeat))
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| String::from("a thread panicked"))?)
    });
    outcome?;
    model.repair();
    let all = 0..model.bytes.len() as u64;
    region
        .retry_failed(all.clone())
        .and_then(|()| region.populate(all))
        .map_err(|error| format!("fails after the repair: {error}"))?;
    for (page, gone) in gone.iter().enumerate() {
        let is_gone = gone.load(Ordering::Relaxed) == 1;
        let expected = if is_gone { 0 } else { model.bytes[page * PAGE + 7] };
        // All pages are checked now, also discarded ones and those that failed before the repair.
        let read = guest.read(page * PAGE + 7);
        if read != expected {
            return Err(format!("byte 7 of page {page} is {read:#x} at the end, expected {expected:#x}"));
        }
    }
    let metrics = region.metrics();
    Tally::count(&tally.faults, metrics.faults);
    Tally::count(&tally.pages, metrics.pages_installed());
    Ok(())
}

/// Runs a virtual CPU. Each has pages of its own to discard, and touches all pages.
fn run_cpu(
    rng: &mut Rng,
    (cpu, cpus): (usize, usize),
    guest: &Guest,
    model: &Model,
    gone: &[AtomicU8],
    tally: &Tally,
    heartbeat: &AtomicU64,
) -> Result<(), Failure> {
    for _ in 0..rng.usize(20..400) {
        heartbeat.fetch_add(1, Ordering::Relaxed);
        let page = rng.usize(..gone.len());
        if model.may_fail(&(page * PAGE..page * PAGE + 1)) {
            continue;
        }
        if page % cpus == cpu && rng.u8(..6) == 0 {
            guest
                .balloon(page * PAGE, PAGE)
                .map_err(|error| format!("the guest cannot discard a page: {error}"))?;
            gone[page].store(1, Ordering::SeqCst);
            Tally::count(&tally.balloons, 1);
        }
        if rng.u8(..12) == 0 {
            // No locks, because a locked page cannot be discarded.
            let how = match rng.u8(..4) {
                0 => Split::Protect,
                1 => Split::PageOut,
                _ => Split::Advise(rng.bool()),
            };
            let first = rng.usize(..gone.len());
            guest.split(first * PAGE, PAGE, how);
            Tally::count(&tally.splits, 1);
        }
        let before = gone[page].load(Ordering::SeqCst);
        let at = page * PAGE + rng.usize(..PAGE);
        let read = guest.read(at);
        // Another virtual CPU may discard the page at this moment, so zeros are right, too.
        let after = page % cpus != cpu;
        let right = if before == 1 { read == 0 } else { read == model.bytes[at] || after && read == 0 };
        if !right {
            return Err(format!(
                "byte {at} is {read:#x}, expected {:#x}; discarded before: {before}",
                model.bytes[at]
            ));
        }
        Tally::count(&tally.bytes_verified, 1);
    }
    Ok(())
}
