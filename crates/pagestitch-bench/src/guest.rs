//! A guest that is restored from a snapshot, in another process: the benchmark starts itself again.

use crate::child;
use crate::measure::timed;
use crate::ooc;
use crate::touch::{histogram, shuffled_pages, touches};
use hdrhistogram::Histogram;
use pagestitch::source::Pages;
use pagestitch_testkit::guest::Guest;
use serde::{Deserialize, Serialize};
use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Stdio, exit};
use std::thread;
use std::time::{Duration, Instant};

/// The task of a guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GuestTask {
    /// The origin of its memory.
    pub(crate) memory: GuestMemory,
    pub(crate) bytes: usize,
    pub(crate) touches: usize,
    pub(crate) threads: usize,
    pub(crate) seed: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum GuestMemory {
    /// A handler that listens at this socket fills the memory.
    Handler(PathBuf),
    /// The guest itself copies this file first.
    Eager(PathBuf),
}

/// The timing of a guest.
#[derive(Debug)]
pub(crate) struct Restored {
    /// The time until the first byte was read.
    pub(crate) first: Duration,
    /// The time until all bytes were read.
    pub(crate) all: Duration,
    pub(crate) latencies: Histogram<u64>,
}

/// Runs as a guest, or as the reader of a file in the workload `ooc`, and exits, if this process was
/// started as one. A program that measures calls this first.
pub fn run_as_guest_if_requested() {
    ooc::run_if_requested();
    let Ok(task) = env::var(TASK_VARIABLE) else { return };
    child::end_with_the_benchmark();
    let task: GuestTask = serde_json::from_str(&task).expect("a task");
    io::stdout().write_all(&run(&task).expect("a guest")).expect("a parent");
    exit(0);
}

/// Starts a guest.
pub(crate) fn spawn(task: &GuestTask) -> Child {
    let mut command = child::this_program();
    command.env(TASK_VARIABLE, serde_json::to_string(task).expect("a task")).stdout(Stdio::piped());
    command.spawn().expect("a guest")
}

/// Waits for the end of a guest.
pub(crate) fn wait(mut guest: Child) -> Restored {
    let mut said = Vec::new();
    guest.stdout.take().expect("a pipe").read_to_end(&mut said).expect("a guest that speaks");
    guest.wait().expect("a guest that ends");
    let mut words = said.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let mut duration = || Duration::from_nanos(words.next().expect("a guest that has done its task"));
    let (first, all) = (duration(), duration());
    let mut latencies = histogram();
    words.for_each(|ns| latencies.saturating_record(ns));
    Restored { first, all, latencies }
}

/// Runs the task. Returns nanoseconds as words: until the first touch, until the last, and of each
/// touch.
fn run(task: &GuestTask) -> io::Result<Vec<u8>> {
    let mut order = shuffled_pages(task.bytes, task.seed);
    order.truncate(task.touches);
    let started = Instant::now();
    let (first, latencies) = match &task.memory {
        GuestMemory::Handler(socket) => {
            let guest = Guest::new(&[task.bytes], false)?;
            let _stream = guest.hand_over(socket)?;
            touch(&order, task.threads, started, |offset| guest.read(offset))
        }
        GuestMemory::Eager(file) => {
            let mut pages = Pages::new(task.bytes)?;
            File::open(file)?.read_exact(&mut pages)?;
            touch(&order, task.threads, started, |offset| pages[offset])
        }
    };
    let all = started.elapsed();
    let words = [first, all].map(|time| time.as_nanos() as u64).into_iter().chain(latencies);
    Ok(words.flat_map(u64::to_le_bytes).collect())
}

/// Touches pages from several threads. Returns the time until the first byte, and the duration of
/// each touch.
fn touch(
    order: &[usize],
    threads: usize,
    started: Instant,
    read: impl Fn(usize) -> u8 + Sync,
) -> (Duration, Vec<u64>) {
    let (ns, _) = timed(|| read(order[0]));
    let first = started.elapsed();
    let mut latencies = vec![ns];
    let read = &read;
    thread::scope(|scope| {
        let parts = order[1..].chunks(order.len().div_ceil(threads));
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || touches(part, read))).collect();
        for thread in threads {
            let touched = thread.join().expect("a virtual CPU");
            latencies.extend(touched.iter_recorded().flat_map(|value| {
                std::iter::repeat_n(value.value_iterated_to(), value.count_at_value() as usize)
            }));
        }
    });
    (first, latencies)
}

const TASK_VARIABLE: &str = "PAGESTITCH_BENCH_GUEST";
