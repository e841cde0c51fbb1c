//! Hit ratios of replacement policies on generated traces: the shares of touches that need no read of a
//! source. A policy of a budget gets no reference bits: a page that leaves waits in standby for a while,
//! and a touch that brings it back, a soft fault, is the only sign of use. So the share of soft faults
//! stands beside each hit ratio.
//!
//! | policy | signs of use |
//! |---|---|
//! | `S3-FIFO` | soft faults, with an eighth of the memory in standby, and less while few pages come back: as a budget has it |
//! | `S3-FIFO, all`, `FIFO` | soft faults; all pages pass through standby |
//! | `S3-FIFO, bits` | a perfect reference bit for each page |
//! | `LRU` | each touch |

use pagestitch_bench::simulated::PerfectBits;
use replacement::{Fifo, PageKey, ReplacementPolicy, S3Fifo};
use sampling::Sampling;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

#[expect(dead_code, unreachable_pub, reason = "the benchmark calls a part of the library's own file")]
#[path = "../crates/pagestitch/src/policy/replacement.rs"]
mod replacement;
#[cfg_attr(test, expect(dead_code, reason = "the benchmark has no unit tests"))]
#[path = "../crates/pagestitch/src/reclaim/sampling.rs"]
mod sampling;

fn main() {
    let touches = if std::env::args().any(|argument| argument == "--quick") { 40_000 } else { 600_000 };
    println!("{MEMORY} pages of memory, {PAGES} pages, {touches} touches");
    println!("{:<16} {:<14} {:>7} {:>7}", "trace", "policy", "hits", "soft");
    for (name, draw) in TRACES {
        let mut random = fastrand::Rng::with_seed(1);
        let trace: Vec<PageKey> = (0..touches).map(|step| draw(step, &mut random)).collect();
        let policy = || S3Fifo::new(2 * MEMORY);
        let caches: [(&str, Box<dyn Cache>); 5] = [
            ("S3-FIFO", Box::new(Standby::new(policy(), Some(Sampling::new(WAITING))))),
            ("S3-FIFO, all", Box::new(Standby::new(policy(), None))),
            ("FIFO", Box::new(Standby::new(Fifo::new(2 * MEMORY), None))),
            ("S3-FIFO, bits", Box::new(PerfectBits::new(MEMORY))),
            ("LRU", Box::new(Lru::default())),
        ];
        for (policy, mut cache) in caches {
            // The first half fills the memory.
            let (mut hits, mut soft) = (0, 0);
            for (step, &page) in trace.iter().enumerate() {
                let touched = cache.touch(page);
                if step >= touches / 2 {
                    hits += usize::from(touched != Touched::Missing);
                    soft += usize::from(touched == Touched::Standby);
                }
            }
            let percent = |count: usize| count as f64 * 200.0 / touches as f64;
            println!("{name:<16} {policy:<14} {:>5.1} % {:>5.1} %", percent(hits), percent(soft));
        }
    }
}

/// The next page of a trace.
type Draw = fn(usize, &mut fastrand::Rng) -> PageKey;

const TRACES: [(&str, Draw); 5] = [
    ("uniform", |_, random| random.u64(..PAGES as u64)),
    ("zipf 0.99", |_, random| zipf(random)),
    ("hot set", |step, random| random.u64(..if step % 20 == 0 { PAGES } else { MEMORY * 4 / 5 } as u64)),
    ("scan", |step, _| step as u64 % PAGES as u64),
    ("scan + hot set", |step, random| if step % 2 == 0 { zipf(random) } else { (PAGES + step) as u64 }),
];

/// A rank by the inverse of the continuous distribution.
fn zipf(random: &mut fastrand::Rng) -> PageKey {
    const FLAT: f64 = 0.01;
    let most = (PAGES as f64 + 1.0).powf(FLAT);
    (1.0 + random.f64() * (most - 1.0)).powf(1.0 / FLAT) as PageKey - 1
}

/// The place at which a touch has found its page.
#[derive(Debug, PartialEq, Eq)]
enum Touched {
    Resident,
    Standby,
    Missing,
}

trait Cache {
    fn touch(&mut self, page: PageKey) -> Touched;
}

/// Memory of which an eighth is standby at most.
struct Standby<P> {
    policy: P,
    resident: HashSet<PageKey>,
    /// The standby list, with the pages that have come back, and the number of those that have not.
    queue: VecDeque<PageKey>,
    waiting: HashSet<PageKey>,
    /// `None`: all pages pass through the list.
    sampling: Option<Sampling>,
    /// The victims that are left of a batch, and true if they pass through the list.
    batch: (usize, bool),
    returned: u64,
}

impl<P: ReplacementPolicy> Standby<P> {
    fn new(policy: P, sampling: Option<Sampling>) -> Self {
        let (resident, queue, waiting) = (HashSet::new(), VecDeque::new(), HashSet::new());
        Self { policy, resident, queue, waiting, sampling, batch: (0, true), returned: 0 }
    }

    /// True if the next victim passes through the list.
    fn takes_next(&mut self) -> bool {
        let Some(sampling) = &mut self.sampling else { return true };
        if self.batch.0 == 0 {
            self.batch = (BATCH, sampling.takes_next(self.returned));
            sampling.note_chosen(BATCH);
        }
        self.batch.0 -= 1;
        self.batch.1
    }
}

impl<P: ReplacementPolicy> Cache for Standby<P> {
    fn touch(&mut self, page: PageKey) -> Touched {
        if self.resident.contains(&page) {
            return Touched::Resident;
        }
        let returned = self.waiting.remove(&page);
        if returned {
            self.queue.retain(|&other| other != page);
            self.returned += 1;
        }
        self.resident.insert(page);
        self.policy.admit(page, returned);
        let waiting = self.sampling.as_ref().map_or(WAITING, Sampling::waiting);
        while self.resident.len() > MEMORY - waiting {
            let victim = self.policy.victim().expect("a page is resident");
            self.resident.remove(&victim);
            if self.takes_next() {
                self.queue.push_back(victim);
                self.waiting.insert(victim);
            } else {
                self.policy.dropped(victim);
            }
        }
        while self.queue.len() > waiting {
            let dropped = self.queue.pop_front().expect("the list is long");
            self.waiting.remove(&dropped);
            self.policy.dropped(dropped);
        }
        if returned { Touched::Standby } else { Touched::Missing }
    }
}

impl Cache for PerfectBits {
    fn touch(&mut self, page: PageKey) -> Touched {
        if Self::touch(self, page) { Touched::Resident } else { Touched::Missing }
    }
}

/// The page that was not touched for the longest time leaves.
#[derive(Debug, Default)]
struct Lru {
    last: HashMap<PageKey, usize>,
    order: BTreeMap<usize, PageKey>,
    now: usize,
}

impl Cache for Lru {
    fn touch(&mut self, page: PageKey) -> Touched {
        self.now += 1;
        self.order.insert(self.now, page);
        if let Some(before) = self.last.insert(page, self.now) {
            self.order.remove(&before);
            return Touched::Resident;
        }
        if self.last.len() > MEMORY {
            let (_, oldest) = self.order.pop_first().expect("pages are there");
            self.last.remove(&oldest);
        }
        Touched::Missing
    }
}

const PAGES: usize = 32_768;
/// A quarter of the pages.
const MEMORY: usize = PAGES / 4;
/// The most pages that wait on the standby list.
const WAITING: usize = MEMORY / 8;
/// The pages that leave at once.
const BATCH: usize = 64;
