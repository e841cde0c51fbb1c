//! A region with a budget that is read only: its pages leave and come back, because of the budget or on
//! request.

use super::context::{Context, Failure, Run, join_all};
use super::limit;
use super::model::{Kind, Model};
use super::server::RunningServer;
use super::tally::Tally;
use fastrand::Rng;
use pagestitch::{Budget, Readahead, Region};
use pagestitch_testkit::memory::{Split, discard};
use std::error::Error;
use std::ops::Range;
use std::thread;

/// A region with the conditions of its round.
struct Bounded<'a> {
    region: &'a Region,
    budget: &'a Budget,
    /// Pages are locked at times. Not beside a region whose pages cannot be written, because there would be no
    /// room.
    locks: bool,
    context: Context<'a>,
}

pub(super) fn run(
    rng: &mut Rng,
    run: Run<'_>,
    budget: &Budget,
    server: &RunningServer,
    locks: bool,
) -> Result<(), Box<dyn Error>> {
    let builder = Region::builder().name("bounded").budget(budget);
    let builder = if rng.bool() { builder.readahead(Readahead::None) } else { builder };
    let (model, builder) = Model::random(rng, run.tally, Kind::Bounded, builder)?;
    let region = builder.build(server.server())?;
    Tally::count(&run.tally.bounded, 1);
    let bounded = Bounded { region: &region, budget, locks, context: Context { model: &model, run } };
    bounded.run(rng)?;
    Ok(())
}

impl Bounded<'_> {
    /// Touches the region from several threads, repairs its sources, and checks all bytes.
    fn run(&self, rng: &mut Rng) -> Result<(), Failure> {
        let threads = rng.usize(1..6);
        thread::scope(|scope| {
            let start = |_| {
                let mut rng = rng.fork();
                scope.spawn(move || self.touch_at_random(&mut rng))
            };
            join_all((0..threads).map(start).collect())
        })?;
        self.context.model.repair();
        self.region.retry_failed(..).map_err(|error| format!("the retry fails: {error}"))?;
        self.read(&(0..self.region.len()))?;
        limit::check(self.budget)?;
        self.context.add(&self.region.metrics());
        Ok(())
    }

    fn touch_at_random(&self, rng: &mut Rng) -> Result<(), Failure> {
        let Self { region, budget, context, .. } = self;
        for _ in 0..rng.usize(10..150) {
            context.run.beat();
            let range = range(rng, region.len());
            let pages = range.start as u64..range.end as u64;
            match rng.u8(..16) {
                0..7 if !context.model.may_fail(&range) => {
                    context.verify(&region.as_slice()[range.clone()], &range)?;
                }
                7 if range.len() <= 20_000 => self.check(region.populate(pages), &range)?,
                8 | 9 => {
                    region.evict(pages).map_err(|error| format!("evict fails: {error}"))?;
                }
                10 => {
                    Tally::count(&context.run.tally.pins, 1);
                    match region.pin(pages) {
                        // Other pages are pinned.
                        Err(error) if limit::is_full(&error) => {}
                        pinned => self.check(pinned, &range)?,
                    }
                }
                11 => region.unpin(..).map_err(|error| format!("unpin fails: {error}"))?,
                12 => {
                    discard(region, range);
                    Tally::count(&context.run.tally.discards, 1);
                }
                13 => {
                    self.split(rng).region(region, range);
                    Tally::count(&context.run.tally.splits, 1);
                }
                _ => self.read(&range)?,
            }
            limit::check(budget)?;
        }
        Ok(())
    }

    /// A random call that splits a mapping.
    fn split(&self, rng: &mut Rng) -> Split {
        match rng.u8(..7) {
            0 => Split::Protect,
            1 | 2 if self.locks => Split::Lock(rng.bool()),
            3 => Split::PageOut,
            _ => Split::Advise(rng.bool()),
        }
    }

    fn read(&self, range: &Range<usize>) -> Result<(), Failure> {
        let mut read = vec![0; range.len()];
        let done = self.region.read_at(range.start as u64, &mut read);
        if done.is_ok() {
            self.context.verify(&read, range)?;
        }
        self.check(done, range)
    }

    /// An error is right if a source may fail these bytes.
    fn check(&self, done: Result<(), pagestitch::Error>, range: &Range<usize>) -> Result<(), Failure> {
        match done {
            Ok(()) => Ok(()),
            Err(_) if self.context.model.may_fail(range) => {
                Tally::count(&self.context.run.tally.errors_as_declared, 1);
                Ok(())
            }
            Err(error) => Err(format!("bytes {range:?} fail, but their source does not: {error}")),
        }
    }
}

fn range(rng: &mut Rng, len: usize) -> Range<usize> {
    let start = rng.usize(..len);
    let most = if rng.u8(..8) == 0 { len } else { 20_000 };
    start..(start + rng.usize(1..=most)).min(len)
}
