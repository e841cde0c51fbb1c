//! Reading all bytes once.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, sum_by};
use pagestitch::{Pool, Readahead};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(512 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (threads, point) in options.thread_points(1) {
        let mut case = |system: &'static str, read: Box<dyn Fn(&Data) -> u64>| {
            let data = Arc::clone(&data);
            let run = move |_| Sample::of(data.pages(), data.bytes(), || read(&data));
            let case = Case::new(system, run).at(point.as_str()).chunks_of(CHUNK).by(threads);
            cases.push(case.against(&["eager, 2 MiB pages", "eager, 4 KiB pages"]));
        };
        let pool = pool.clone();
        case(
            "pool, defaults",
            Box::new(move |data| sum_by(threads, data.region(Readahead::Adaptive, &pool).as_slice())),
        );
        case("eager, 2 MiB pages", Box::new(move |data| sum_by(threads, &data.eager_huge(threads))));
        case("eager, 4 KiB pages", Box::new(move |data| sum_by(threads, &data.eager_small(threads))));
        case("manual-page", Box::new(move |data| sum_by(threads, data.manual_page(None).bytes())));
    }
    cases
}
