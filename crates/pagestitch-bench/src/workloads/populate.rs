//! Filling all pages at once.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, HUGE_PAGE};
use crate::team::{in_parts, part_length};
use pagestitch::{Pool, Readahead, Region};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(512 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (threads, point) in options.thread_points(1) {
        let mut case = |system: &'static str, run: Box<dyn Fn(&Data) -> Sample>| {
            let data = Arc::clone(&data);
            let case = Case::new(system, move |_| run(&data)).at(point.as_str()).chunks_of(CHUNK).by(threads);
            cases.push(case.against(&["eager, 2 MiB pages", "eager, 4 KiB pages"]));
        };
        let pool = pool.clone();
        let populate = move |data: &Data| {
            Sample::of(data.pages(), data.bytes(), || {
                let region = data.region(Readahead::Adaptive, &pool);
                populate_by(threads, &region, data.bytes());
                region
            })
        };
        case("populate", Box::new(populate));
        let eager = |copy: fn(&Data, usize) -> pagestitch::source::Pages| {
            move |data: &Data| Sample::of(data.pages(), data.bytes(), || copy(data, threads))
        };
        case("eager, 2 MiB pages", Box::new(eager(Data::eager_huge)));
        case("eager, 4 KiB pages", Box::new(eager(Data::eager_small)));
    }
    cases
}

/// Populates a region, a part by each thread.
fn populate_by(threads: usize, region: &Region, bytes: usize) {
    let length = part_length(bytes, threads, HUGE_PAGE);
    let parts = (0..bytes).step_by(length).map(|start| start as u64..(start + length).min(bytes) as u64);
    in_parts(parts.collect(), |part| region.populate(part).expect("memory"));
}
