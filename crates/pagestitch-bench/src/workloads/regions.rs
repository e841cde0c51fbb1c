//! Many regions on one pool.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{Data, PAGE};
use crate::touch::{shuffled_pages, touches};
use pagestitch::{Chunk, Pool, Readahead, Region};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let case = |count: usize| {
        let (data, pool) = (Arc::clone(&data), pool.clone());
        let run = move |seed| {
            let bytes = data.bytes() / count / PAGE * PAGE;
            let regions: Vec<Region> =
                (0..count).map(|index| part(&data, index * bytes, bytes, &pool)).collect();
            let offsets = shuffled_pages(count * bytes, seed);
            Sample::of_touches(count * bytes, || {
                touches(&offsets, |offset| regions[offset / bytes].as_slice()[offset % bytes])
            })
        };
        Case::new("pool, defaults", run).at(count.to_string()).against_point("1")
    };
    [1, 10, 100, 1000].map(case).into()
}

/// A region of `bytes` of the data, from `start` on.
fn part(data: &Data, start: usize, bytes: usize, pool: &Pool) -> Region {
    let size = data.bytes() / data.chunks.len();
    let chunks = (start / size..(start + bytes).div_ceil(size)).map(|index| {
        let (from, to) = (start.max(index * size), (start + bytes).min((index + 1) * size));
        Chunk::from(data.chunks[index].clone())
            .range((from - index * size) as u64..(to - index * size) as u64)
    });
    Region::builder().chunks(chunks).readahead(Readahead::None).build(pool).expect("a region")
}
