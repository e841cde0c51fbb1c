//! The latency of a first touch.

use crate::affinity::Pinned;
use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, zero_pages};
use crate::touch::{first_touches, shuffled_pages};
use hdrhistogram::Histogram;
use pagestitch::{Inline, Placement, Pool, Readahead, Server};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let case = |system: &'static str, touch: fn(&Data, &[usize]) -> Histogram<u64>| {
        let data = Arc::clone(&data);
        let run = move |seed| {
            let touches = shuffled_pages(data.bytes(), seed);
            Sample::of_touches(data.bytes(), || touch(&data, &touches))
        };
        Case::new(system, run).chunks_of(CHUNK).against(&["manual-page, same CPU", "manual-page"])
    };
    vec![
        case("inline", |data, touches| served(data, touches, Inline)),
        case("pool, defaults", |data, touches| served(data, touches, &Pool::new().expect("a pool"))),
        case("pool, same CPU", |data, touches| {
            let pinned = Pinned::here();
            let pool = Pool::builder().placement(Placement::Cpus(vec![pinned.cpu]));
            served(data, touches, &pool.start().expect("a pool"))
        }),
        case("pool of 1", |data, touches| {
            served(data, touches, &Pool::builder().workers(1).start().expect("a pool"))
        }),
        case("manual-page, same CPU", |data, touches| {
            let pinned = Pinned::here();
            first_touches(data.manual_page(Some(pinned.cpu)).bytes(), touches)
        }),
        case("manual-page", |data, touches| first_touches(data.manual_page(None).bytes(), touches)),
        case("kernel zero page", |data, touches| {
            let (_reservation, view) = zero_pages(data.pages());
            first_touches(view.as_slice(), touches)
        }),
    ]
}

fn served(data: &Data, touches: &[usize], server: impl Into<Server>) -> Histogram<u64> {
    first_touches(data.region(Readahead::None, server).as_slice(), touches)
}
