//! A process that is stopped and continued while its pool has a time limit. No page of a healthy
//! source may be given up.
//!
//! The process is a child that runs this command again, because a shell would take a stopped parent
//! for a suspended job.

use super::model::PAGE;
use super::tally::Tally;
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pagestitch::{Chunk, Pool, Readahead, Region, Source};
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Starts a child, and stops it several times for longer than its limit.
pub(super) fn run(seed: u64, tally: &Tally) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("a stopped process: {what}: {error}");
    let program = std::env::current_exe().map_err(|error| failed("cannot find this program", &error))?;
    let mut command = Command::new(program);
    command.args(["stress", "--stopped", "--seed", &seed.to_string()]).stdin(Stdio::null());
    let child = command.spawn().map_err(|error| failed("cannot start it", &error))?;
    let mut child = KillOnDrop(child);
    let pid = Pid::from_raw(child.0.id().cast_signed());
    for _ in 0..STOPS {
        thread::sleep(LIMIT / 2);
        kill(pid, Signal::SIGSTOP).map_err(|error| failed("cannot stop it", &error))?;
        thread::sleep(LIMIT * 2);
        kill(pid, Signal::SIGCONT).map_err(|error| failed("cannot continue it", &error))?;
        Tally::count(&tally.stopped, 1);
    }
    let ended = child.0.wait().map_err(|error| failed("cannot wait for it", &error))?;
    if ended.success() {
        Ok(())
    } else {
        Err(failed("its sources answered in time, but it ended with", &ended))
    }
}

/// A child that is killed at the end of the round.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs as the child: threads touch pages of a healthy source, under a time limit.
pub(super) fn run_child(seed: u64) -> Result<(), String> {
    let failed = |error: pagestitch::Error| error.to_string();
    let ended = Instant::now() + (LIMIT / 2 + LIMIT * 2) * STOPS + LIMIT;
    let pool = Pool::builder().workers(4).fault_timeout(LIMIT).start().map_err(failed)?;
    let mut rng = Rng::with_seed(seed);
    while Instant::now() < ended {
        let builder = Region::builder().name("stopped").readahead(Readahead::None);
        let region = builder.chunk(Chunk::source(Arc::new(Slow))).build(&pool).map_err(failed)?;
        thread::scope(|scope| {
            for _ in 0..THREADS {
                let (mut rng, region) = (rng.fork(), &region);
                scope.spawn(move || {
                    for _ in 0..TOUCHES {
                        let page = rng.usize(..PAGES);
                        assert_eq!(region.as_slice()[page * PAGE], byte_of(page), "page {page}");
                    }
                });
            }
        });
    }
    Ok(())
}

/// A source that takes a moment for each read.
struct Slow;

impl Source for Slow {
    fn size(&self) -> u64 {
        (PAGES * PAGE) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        thread::sleep(MOMENT);
        for (index, page) in into.chunks_mut(PAGE).enumerate() {
            page.fill(byte_of(offset as usize / PAGE + index));
        }
        Ok(())
    }
}

const fn byte_of(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

/// The time limit of a fault. A healthy fault takes a thirtieth of it.
const LIMIT: Duration = Duration::from_millis(300);
const MOMENT: Duration = Duration::from_millis(5);
const STOPS: u32 = 3;
const THREADS: usize = 4;
const TOUCHES: usize = 40;
const PAGES: usize = 1000;
