//! The latency of a first touch.

use crate::affinity::Pinned;
use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, zero_pages};
use crate::team::first_touches_by;
use crate::touch::shuffled_pages;
use hdrhistogram::Histogram;
use pagestitch::{Inline, Placement, Pool, Readahead, Server};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let mut cases = Vec::new();
    for (threads, point) in options.thread_points(1) {
        for (system, touch) in SYSTEMS {
            // The handler can have the CPU of one thread only.
            if threads > 1 && system.ends_with(SAME_CPU) {
                continue;
            }
            let data = Arc::clone(&data);
            let run = move |seed| {
                let touches = Touches { threads, offsets: shuffled_pages(data.bytes(), seed) };
                Sample::of_touches(data.bytes(), || touch(&data, &touches))
            };
            let case = Case::new(system, run).at(point.as_str()).chunks_of(CHUNK).by(threads);
            cases.push(case.against(&["manual-page, same CPU", "manual-page"]));
        }
    }
    cases
}

/// The touches of a run.
struct Touches {
    threads: usize,
    offsets: Vec<usize>,
}

impl Touches {
    fn of(&self, bytes: &[u8]) -> Histogram<u64> {
        first_touches_by(self.threads, bytes, &self.offsets)
    }

    fn served(&self, data: &Data, server: impl Into<Server>) -> Histogram<u64> {
        self.of(data.region(Readahead::None, server).as_slice())
    }
}

/// Makes the bytes, and touches them.
type Touch = fn(&Data, &Touches) -> Histogram<u64>;

const SYSTEMS: [(&str, Touch); 7] = [
    ("inline", |data, touches| touches.served(data, Inline)),
    ("pool, defaults", |data, touches| touches.served(data, &Pool::new().expect("a pool"))),
    ("pool, same CPU", |data, touches| {
        let pinned = Pinned::here();
        let pool = Pool::builder().placement(Placement::Cpus(vec![pinned.cpu]));
        touches.served(data, &pool.start().expect("a pool"))
    }),
    ("pool of 1", |data, touches| touches.served(data, &Pool::builder().workers(1).start().expect("a pool"))),
    ("manual-page, same CPU", |data, touches| {
        let pinned = Pinned::here();
        touches.of(data.manual_page(Some(pinned.cpu)).bytes())
    }),
    ("manual-page", |data, touches| touches.of(data.manual_page(None).bytes())),
    ("kernel zero page", |data, touches| touches.of(&zero_pages(data.pages()))),
];
const SAME_CPU: &str = ", same CPU";
