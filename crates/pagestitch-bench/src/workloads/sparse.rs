//! Touching a share of the pages: the curve on which lazy and eager cross.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, PAGE, touch_all};
use pagestitch::{Pool, Readahead};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(1 << 30), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (pattern, run_length) in [("random", 1), ("clustered", CLUSTER)] {
        for share in SHARES {
            let mut case = |system: &'static str, touch: Box<Touch>| {
                let data = Arc::clone(&data);
                let run = move |seed| {
                    let offsets = share_of(data.bytes(), share, run_length, seed);
                    Sample::of(offsets.len(), data.bytes(), || touch(&data, &offsets))
                };
                let case = Case::new(system, run).at(format!("{share} % {pattern}")).chunks_of(CHUNK);
                cases.push(case.against(&["eager, 2 MiB pages", "eager, 4 KiB pages"]));
            };
            let pool = pool.clone();
            case(
                "pool, defaults",
                Box::new(move |data, offsets| {
                    touch_all(data.region(Readahead::Adaptive, &pool).as_slice(), offsets)
                }),
            );
            case("eager, 2 MiB pages", Box::new(|data, offsets| touch_all(&data.eager_huge(1), offsets)));
            case("eager, 4 KiB pages", Box::new(|data, offsets| touch_all(&data.eager_small(1), offsets)));
        }
    }
    cases
}

/// Makes the bytes, and touches them at these offsets.
type Touch = dyn Fn(&Data, &[usize]) -> u64;

/// One offset in each page of a share of all pages: runs of `length` pages, in an order that
/// depends on the seed alone.
fn share_of(bytes: usize, share: f64, length: usize, seed: u64) -> Vec<usize> {
    let mut runs: Vec<usize> = (0..bytes / PAGE / length).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut runs);
    runs.truncate((runs.len() as f64 * share / 100.0).ceil() as usize);
    runs.iter().flat_map(|run| (0..length).map(move |page| (run * length + page) * PAGE)).collect()
}

const SHARES: [f64; 7] = [0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0];
const CLUSTER: usize = 16;
