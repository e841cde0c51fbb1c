//! One region and several threads: random first touches and sequential sums, beside prototypes that do
//! the least, and beside the kernel's own pages. Every byte is checked after each run.

use super::curve::{CPU_BY_THREADS, Curve, THREADS};
use crate::affinity::allowed;
use crate::case::{Case, Options, Sample};
use crate::format::round_count;
use crate::hot::{Hot, Touches, first_word};
use crate::measure::warm;
use crate::prototypes::{Prototype, Setting};
use crate::systems::{CHUNK, Data, HUGE_PAGE, PAGE, sum_by, zero_pages};
use crate::threads::{Threads, cpus};
use pagestitch::source::Pages;
use pagestitch::{Builder, Chunk, Inline, Placement, Pool, Readahead, Region, Server};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let threads = options.threads_or(Threads::up_to_the_cpus().counts());
    let mut cases = Vec::new();
    random(options, &threads, &mut cases);
    sequential(options, &threads, &mut cases);
    cases
}

/// Random first touches of memory that repeats hot bytes.
fn random(options: &Options, threads: &[usize], cases: &mut Vec<Case>) {
    let pages = options.size(256 << 20) / PAGE;
    warm(2 * pages * PAGE);
    let pool = Pool::new().expect("a pool");
    let (hot, shards) = (Hot::new(options.seed), options.shards);
    for &threads in threads {
        let touched = Touched { hot: Arc::clone(&hot), pages, threads, seed: 0, shards };
        let mut case = |system: &'static str, limits: &[&'static str], run: Box<Run>| {
            let touched = touched.clone();
            let run = move |seed| run(&Touched { seed, ..touched.clone() });
            let case = Case::new(system, run).at(format!("{threads} {RANDOM}")).chunks_of(HUGE_PAGE);
            cases.push(case.by(threads).against(&[limits, &[ZERO]].concat()));
        };
        let of_pool = |readahead: Readahead| {
            let pool = pool.clone();
            Box::new(move |touched: &Touched| touched.pooled(readahead, &pool))
        };
        case(BARE, &["prototype pool", "prototype pool1"], of_pool(Readahead::None));
        case(DEFAULTS, &["prototype pool"], of_pool(Readahead::Adaptive));
        case(OWN_CPUS, &["prototype poollocal"], Box::new(Touched::on_own_cpus));
        case(INLINE, &["prototype inline"], Box::new(Touched::inline));
        case(EAGER, &["prototype copy"], Box::new(Touched::copied));
        case(ZERO, &["prototype zero"], Box::new(Touched::zeros));
        for (system, prototype, shards) in PROTOTYPES {
            let shards = match shards {
                Shards::One => 1,
                Shards::ForEachThread => threads,
                Shards::ForEachCpu => cpus(),
            };
            let run = move |touched: &Touched| {
                let &Touched { pages, threads, seed, ref hot, .. } = touched;
                prototype.measure(hot, &Setting { pages, threads, shards, seed })
            };
            case(system, &[], Box::new(run));
        }
    }
}

/// Measures a system.
type Run = dyn Fn(&Touched) -> Sample;

/// The touches of a run.
#[derive(Debug, Clone)]
struct Touched {
    hot: Arc<Hot>,
    pages: usize,
    threads: usize,
    seed: u64,
    /// The shards of a region on a pool, if the caller has asked for a number.
    shards: Option<usize>,
}

impl Touched {
    fn anywhere(&self) -> Touches {
        Touches::anywhere(self.pages, self.threads, self.seed)
    }

    fn region(&self) -> Builder {
        let blocks = self.pages * PAGE / HUGE_PAGE;
        Region::builder().chunks((0..blocks).map(|_| Chunk::from(self.hot.memory())))
    }

    fn pooled(&self, readahead: Readahead, pool: &Pool) -> Sample {
        let region = with_shards(self.region(), self.shards).readahead(readahead);
        self.served(region, pool)
    }

    fn inline(&self) -> Sample {
        self.served(self.region().readahead(Readahead::None), Inline)
    }

    fn served(&self, region: Builder, server: impl Into<Server>) -> Sample {
        let region = region.build(server).expect("a region");
        self.read(&self.anywhere(), region.as_slice())
    }

    /// Each thread touches its own part, which is a shard, on the CPU of the shard's worker.
    fn on_own_cpus(&self) -> Sample {
        let cpus = allowed();
        let pool = Pool::builder().workers(self.threads).placement(Placement::Cpus(cpus.clone()));
        let pool = pool.start().expect("a pool");
        let region = with_shards(self.region(), self.shards.or(Some(self.threads)));
        let region = region.readahead(Readahead::None).build(&pool).expect("a region");
        self.read(&Touches::in_own_parts(self.pages, self.threads, self.seed).on(cpus), region.as_slice())
    }

    fn read(&self, touches: &Touches, bytes: &[u8]) -> Sample {
        let sample = touches.read(&self.hot, |page| first_word(&bytes[page * PAGE..]));
        self.hot.check(bytes);
        sample
    }

    /// Copies all pages first, a part by each thread.
    fn copied(&self) -> Sample {
        let mut memory = Pages::without_huge_pages(self.pages * PAGE).expect("memory");
        let touches = Touches::in_order(self.pages, self.threads);
        let mut rest = &mut *memory;
        let parts = touches.lists.iter().map(|list| rest.split_off_mut(..list.len() * PAGE).expect("pages"));
        let sample = touches.each(parts.collect(), |part: &mut [u8]| {
            part.chunks_mut(PAGE)
                .enumerate()
                .for_each(|(page, into)| into.copy_from_slice(self.hot.page(page)));
        });
        self.hot.check(&memory);
        sample
    }

    /// The kernel's page of zeros at each touch.
    fn zeros(&self) -> Sample {
        let memory = zero_pages(self.pages);
        let touches = self.anywhere();
        touches.each(touches.lists.iter().collect(), |list: &Vec<usize>| {
            assert!(
                list.iter().all(|page| first_word(&memory[page * PAGE..]) == 0),
                "a page is not of zeros"
            );
        })
    }
}

fn with_shards(region: Builder, shards: Option<usize>) -> Builder {
    match shards {
        Some(shards) => region.shards(shards),
        None => region,
    }
}

/// Sums of all words, a part by each thread, with the time to build or copy.
fn sequential(options: &Options, threads: &[usize], cases: &mut Vec<Case>) {
    let data = Data::new(options.size(2 << 30), options.seed);
    warm(2 * data.bytes());
    let sum = sum_by(cpus(), &data.eager_huge(cpus()));
    let (pool, shards) = (Pool::new().expect("a pool"), options.shards);
    for &threads in threads {
        let mut case = |system: &'static str, run: Box<dyn Fn(&Data) -> Sample>| {
            let data = Arc::clone(&data);
            let case = Case::new(system, move |_| run(&data)).at(format!("{threads} {SEQUENTIAL}"));
            cases.push(case.chunks_of(CHUNK).by(threads).against(&[EAGER_HUGE, EAGER, ZERO]));
        };
        let (pool, summed) = (pool.clone(), Summed { sum, threads });
        case(
            DEFAULTS,
            Box::new(move |data| {
                let region = || with_shards(data.builder(Readahead::Adaptive), shards).build(&pool);
                summed.of(data, || region().expect("a region"), |region| region.as_slice())
            }),
        );
        case(EAGER_HUGE, Box::new(move |data| summed.of(data, || data.eager_huge(threads), |pages| pages)));
        case(EAGER, Box::new(move |data| summed.of(data, || data.eager_small(threads), |pages| pages)));
        case(
            ZERO,
            Box::new(move |data| {
                let mut sum = 0;
                let sample = Sample::of(data.pages(), data.bytes(), || {
                    sum = sum_by(threads, &zero_pages(data.pages()));
                });
                assert_eq!(sum, 0, "a page is not of zeros");
                sample
            }),
        );
    }
}

/// A sum, and the number of its threads.
#[derive(Debug, Clone, Copy)]
struct Summed {
    sum: u64,
    threads: usize,
}

impl Summed {
    /// Makes the bytes and sums them up; then checks them.
    fn of<M>(self, data: &Data, make: impl Fn() -> M, bytes: impl Fn(&M) -> &[u8]) -> Sample {
        let mut made = None;
        let sample = Sample::of(data.pages(), data.bytes(), || {
            let sum = sum_by(self.threads, bytes(made.insert(make())));
            assert_eq!(sum, self.sum, "the bytes have another sum than their source");
        });
        made.iter().for_each(|made| data.check(bytes(made)));
        sample
    }
}

/// The number of parts of a prototype.
#[derive(Debug, Clone, Copy)]
enum Shards {
    One,
    ForEachThread,
    ForEachCpu,
}

const PROTOTYPES: [(&str, Prototype, Shards); 9] = [
    ("prototype copy", Prototype::Copy, Shards::One),
    ("prototype copy, in parts", Prototype::Copy, Shards::ForEachCpu),
    ("prototype inline", Prototype::Inline, Shards::One),
    ("prototype inlinelocal", Prototype::InlineLocal, Shards::ForEachThread),
    ("prototype inlinemasked", Prototype::InlineMasked, Shards::One),
    ("prototype pool", Prototype::Pool, Shards::ForEachCpu),
    ("prototype poollocal", Prototype::PoolLocal, Shards::ForEachThread),
    ("prototype pool1", Prototype::Pool1, Shards::ForEachCpu),
    ("prototype zero", Prototype::Zero, Shards::One),
];

/// The curves.
pub(super) static CURVES: [Curve; 4] = [
    Curve {
        group: Some(RANDOM),
        x: THREADS,
        y: "pages per second",
        value: |row| row.faults_per_s,
        label: round_count,
    },
    Curve { group: Some(RANDOM), ..CPU_BY_THREADS },
    Curve {
        group: Some(SEQUENTIAL),
        x: THREADS,
        y: "GiB per second",
        value: |row| row.gib_per_s,
        label: round_count,
    },
    Curve { group: Some(SEQUENTIAL), ..CPU_BY_THREADS },
];

pub(crate) const RANDOM: &str = "random";
pub(crate) const SEQUENTIAL: &str = "sequential";
pub(crate) const BARE: &str = "pool, no readahead";
pub(crate) const DEFAULTS: &str = "pool, defaults";
pub(crate) const OWN_CPUS: &str = "pool, on the CPUs of the threads";
pub(crate) const INLINE: &str = "inline";
pub(crate) const EAGER: &str = "eager, 4 KiB pages";
pub(crate) const EAGER_HUGE: &str = "eager, 2 MiB pages";
pub(crate) const ZERO: &str = "kernel zero page";
