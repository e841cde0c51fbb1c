//! `pagestitch stress`: random regions, sources, servers and threads, with random failures, while
//! every byte is checked.
//!
//! A file uses only files of later rows:
//!
//! | file | content |
//! |---|---|
//! | `round` | the choices of one round |
//! | `owned` | a region of this process: touched from several threads, discarded in parts, forked |
//! | `guest` | a guest in this process: its virtual CPUs touch and discard pages |
//! | `bounded` | a region with a budget: its pages leave and come back |
//! | `written` | a region whose written pages go back to their sources |
//! | `replaced` | a region whose pages get other bytes |
//! | `grown` | a region to which chunks are appended |
//! | `stopped` | a process that is stopped and continued while its faults have a time limit |
//! | `context` | the parts of a round that all its threads share |
//! | `limit` | the budget of a round |
//! | `server` | the server of a round |
//! | `model` | a random list of chunks, with its expected bytes and the parts that may fail |
//! | `sources` | sources that fail, panic, drop requests or delay, as announced |
//! | `store` | sources that take bytes back, and whose writes fail, as announced |
//! | `kernel` | injected answers of the kernel, in a build for that |
//! | `locked` | memory that the process locks before or during the round |
//! | `tally` | the counters of a run |

mod bounded;
mod context;
mod grown;
mod guest;
mod kernel;
mod limit;
mod locked;
mod model;
mod owned;
mod replaced;
mod round;
mod server;
mod sources;
mod stopped;
mod store;
mod tally;
mod written;

use crate::log;
use crate::number;
use crate::output::Form;
use clap::Args;
use kernel::Injection;
use serde_json::json;
use std::error::Error;
use std::io::{Write, stdout};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tally::Tally;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The duration of the run
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 10, value_parser = number::up_to::<u64>(u32::MAX.into()))]
    seconds: u64,
    /// Decides everything except the scheduling of threads [default: the time]
    #[arg(long, allow_negative_numbers = true, value_parser = number::any)]
    seed: Option<u64>,
    /// Repeat this one round of an earlier run
    #[arg(long, value_name = "N", allow_negative_numbers = true, requires = "seed", value_parser = number::any)]
    round: Option<u64>,
    /// Run as the process that is stopped and continued: started by this command itself
    #[arg(long, hide = true, requires = "seed")]
    stopped: bool,
}

pub(crate) fn run(options: &Options, form: Form) -> Result<(), Box<dyn Error>> {
    pagestitch::Support::probe().features()?;
    let time = || std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
    let seed = options.seed.unwrap_or_else(time);
    if options.stopped {
        return Ok(stopped::run_child(seed)?);
    }
    // Panics on purpose are not printed.
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref() != Some(&sources::ON_PURPOSE) {
            log::defect(form, &panic.to_string());
        }
    }));
    let (tally, started) = (Arc::new(Tally::default()), Instant::now());
    let heartbeat = Arc::new(AtomicU64::new(0));
    watch_heartbeat(seed, Arc::clone(&heartbeat), form);
    let mut round = options.round.unwrap_or(0);
    while started.elapsed() < Duration::from_secs(options.seconds) {
        heartbeat.store(round << 32, Ordering::Relaxed);
        round::run(seed, round, &tally, &heartbeat).map_err(|failure| {
            format!("{failure}\n  to repeat it: pagestitch stress --seed {seed} --round {round}")
        })?;
        round += u64::from(options.round.is_none());
    }
    report(&tally, seed, started.elapsed(), form)?;
    Ok(())
}

/// Ends the process if no thread has made progress for long, because then a thread is stuck.
fn watch_heartbeat(seed: u64, heartbeat: Arc<AtomicU64>, form: Form) {
    thread::spawn(move || {
        let mut last = (0, Instant::now());
        loop {
            thread::sleep(Duration::from_secs(1));
            let now = heartbeat.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            } else if last.1.elapsed() > STUCK_AFTER {
                let round = now >> 32;
                log::defect(
                    form,
                    &format!(
                        "pagestitch: a thread is stuck: no progress for {STUCK_AFTER:?}\n{}  to repeat it: pagestitch stress --seed {seed} --round {round}",
                        wait_channels()
                    ),
                );
                exit(1);
            }
        }
    });
}

/// A line for each thread with the kernel function in which it waits, as far as the kernel reveals it.
fn wait_channels() -> String {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().filter_map(Result::ok);
    let lines = tasks.map(|task| {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        format!("  {} waits in {}\n", read("comm").trim_end(), read("wchan").trim_end())
    });
    lines.collect()
}

fn report(tally: &Tally, seed: u64, took: Duration, form: Form) -> std::io::Result<()> {
    let mut out = stdout().lock();
    let counts = tally.all().into_iter().map(|(name, count)| (name.to_owned(), count));
    let counts = counts.chain(Injection::counts());
    if form == Form::Quiet {
        return Ok(());
    }
    if form == Form::Json {
        let mut all = json!({"seed": seed, "seconds": took.as_secs_f64()});
        counts.for_each(|(name, count)| all[name] = count.into());
        return writeln!(out, "{all}");
    }
    writeln!(out, "seed {seed}, {:.1} s: no wrong byte, no stuck thread", took.as_secs_f64())?;
    counts
        .into_iter()
        .try_for_each(|(name, count)| writeln!(out, "  {count:>14}  {}", name.replace('_', " ")))
}

const STUCK_AFTER: Duration = Duration::from_secs(30);
