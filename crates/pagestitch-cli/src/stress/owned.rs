//! A region of this process: threads and forked children touch it.

use super::context::{Context, Failure, Run, join_all};
use super::kernel::Injection;
use super::locked::Locked;
use super::tally::Tally;
use fastrand::Rng;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use pagestitch::source::FailureReason;
use pagestitch::{Region, Support};
use pagestitch_kernel::Features;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::memory::{Split, discard};
use pagestitch_testkit::wait::comes_true;
use std::ops::Range;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// A region with the conditions of its round.
pub(super) struct OwnedRegion<'a> {
    pub(super) region: &'a Region,
    pub(super) context: Context<'a>,
    pub(super) injection: Injection,
    /// The server reads events of discarded pages.
    pub(super) reads_events: bool,
    /// Forked children inherit the region.
    pub(super) inherited: bool,
    /// Sources in memory are released when the region has their bytes.
    pub(super) releases: bool,
    /// The memory that is locked during the round.
    pub(super) locked: &'a Locked,
}

impl OwnedRegion<'_> {
    /// Touches the region from several threads, repairs its sources, and checks all bytes.
    pub(super) fn run(&self, rng: &mut Rng) -> Result<(), Failure> {
        let Context { model, run: Run { tally, .. } } = self.context;
        let threads = rng.usize(1..6);
        let forks = rng.u8(..8) == 0;
        thread::scope(|scope| {
            let start = |_| {
                let mut rng = rng.fork();
                scope.spawn(move || {
                    if rng.u8(..3) == 0 {
                        pin(tally);
                    }
                    self.touch_at_random(&mut rng)
                })
            };
            let threads: Vec<_> = (0..threads).map(start).collect();
            self.locked.meanwhile(tally);
            if forks {
                Tally::count(&tally.forks, 1);
                let _ = Command::new("true").status();
            }
            let children = if self.inherited { 3 } else { 0 };
            let children = (0..children).try_for_each(|_| self.run_child(rng));
            let joined = join_all(threads);
            children.and(joined)
        })?;
        // The sources are repaired now, so every page can be filled.
        model.repair();
        Injection::end();
        self.retry_and_verify()?;
        self.context.add(&self.region.metrics());
        if !self.reads_events {
            Tally::count(&tally.inline_faults, self.region.metrics().faults);
        }
        Ok(())
    }

    fn touch_at_random(&self, rng: &mut Rng) -> Result<(), Failure> {
        let Self { region, context, .. } = self;
        let Context { model, run } = context;
        let tally = run.tally;
        for _ in 0..rng.usize(10..150) {
            context.run.beat();
            let range = range(rng, model.bytes.len());
            match rng.u8(..11) {
                0..5 if self.can_touch(&range) => {
                    context.verify(&region.as_slice()[range.clone()], &range)?;
                }
                5 => self.check(region.populate(range.start as u64..range.end as u64), &range)?,
                6 if !self.any_page_may_fail() && model.refillable && self.reads_events => {
                    discard(region, range);
                    Tally::count(&tally.discards, 1);
                }
                7 if rng.bool() => {
                    split(rng).region(region, range);
                    Tally::count(&tally.splits, 1);
                }
                _ => self.read(&range)?,
            }
        }
        Ok(())
    }

    fn read(&self, range: &Range<usize>) -> Result<(), Failure> {
        let mut read = vec![0; range.len()];
        let done = self.region.read_at(range.start as u64, &mut read);
        if done.is_ok() {
            self.context.verify(&read, range)?;
        }
        self.check(done, range)
    }

    /// A fatal answer of the kernel may poison any page.
    fn any_page_may_fail(&self) -> bool {
        self.injection == Injection::Fatal
    }

    /// True if a touch of these bytes cannot raise a signal.
    fn can_touch(&self, range: &Range<usize>) -> bool {
        !self.any_page_may_fail() && !self.context.model.may_fail(range)
    }

    /// Starts a forked child that reads pages which cannot fail, and waits for it.
    fn run_child(&self, rng: &mut Rng) -> Result<(), Failure> {
        Tally::count(&self.context.run.tally.children, 1);
        // The child has its own copy of the counters, which is lost.
        let child = ForkedChild::start(|| i32::from(self.verify_in_child(&mut rng.fork()).is_err()));
        let ended = child.wait();
        if ended.success() { Ok(()) } else { Err(format!("a forked child ended with {ended}")) }
    }

    fn verify_in_child(&self, rng: &mut Rng) -> Result<(), Failure> {
        for _ in 0..10 {
            let range = range(rng, self.context.model.bytes.len());
            if self.can_touch(&range) {
                self.context.verify(&self.region.as_slice()[range.clone()], &range)?;
            }
        }
        Ok(())
    }

    fn retry_and_verify(&self) -> Result<(), Failure> {
        let Self { region, context, .. } = self;
        let failed = region.failures().len();
        match region.retry_failed(..) {
            Ok(()) => {
                Tally::count(&context.run.tally.retried, failed as u64);
                let mut read = vec![0; context.model.bytes.len()];
                region
                    .read_at(0, &mut read)
                    .map_err(|error| format!("fails after a successful retry: {error}"))?;
                context.verify(&read, &(0..read.len()))?;
                self.check_released()
            }
            // Before Linux 6.6 a failed page is unmapped for good.
            Err(_) if !Support::current().has(Features::POISON) => Ok(()),
            // Without memory for a poison marker the page was unmapped.
            Err(error) if self.any_page_may_fail() && is_unmapped(&error) => Ok(()),
            Err(error) => Err(format!("the retry fails: {error}")),
        }
    }

    /// All pages are present. The worker that has filled the last one may still release its sources.
    fn check_released(&self) -> Result<(), Failure> {
        let kept = || self.region.kept_source_bytes();
        if self.releases && !comes_true(Duration::from_secs(20), || kept() == 0) {
            return Err(format!("{} bytes of sources are kept, and the region has them all", kept()));
        }
        Ok(())
    }

    /// An error is right if a source or an answer of the kernel may fail these bytes.
    fn check(&self, done: Result<(), pagestitch::Error>, range: &Range<usize>) -> Result<(), Failure> {
        let Context { model, run: Run { tally, .. } } = self.context;
        match done {
            Ok(()) => {}
            Err(_) if self.any_page_may_fail() => Tally::count(&tally.errors_as_injected, 1),
            Err(_) if model.may_fail(range) => Tally::count(&tally.errors_as_declared, 1),
            Err(error) => return Err(format!("bytes {range:?} fail, but their source does not: {error}")),
        }
        Ok(())
    }
}

/// Keeps the calling thread on its CPU, where a worker may be pinned too.
fn pin(tally: &Tally) {
    let mut only = CpuSet::new();
    let set = sched_getcpu().and_then(|cpu| only.set(cpu));
    let pinned = set.and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    Tally::count(&tally.pinned_threads, pinned.is_ok().into());
}

fn is_unmapped(error: &pagestitch::Error) -> bool {
    error.failure().is_some_and(|failure| failure.reason() == FailureReason::Unmapped)
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

fn range(rng: &mut Rng, len: usize) -> Range<usize> {
    let start = rng.usize(..len);
    let most = if rng.u8(..8) == 0 { len } else { 20_000 };
    start..(start + rng.usize(1..=most)).min(len)
}
