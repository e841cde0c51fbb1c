//! The latency of a first touch.

use crate::runner::{Case, Options, Sample};
use crate::systems::{CHUNK, Data, PAGE, Pinned};
use crate::touch::{first_touches, shuffled_pages};
use crate::warm;
use hdrhistogram::Histogram;
use pagestitch::{Pool, Readahead, Server};
use pagestitch_kernel::{Access, PageSize, Reservation};
use std::num::NonZeroUsize;
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
        case("inline", |data, touches| served(data, touches, Server::Inline)),
        case("pool, defaults", |data, touches| served(data, touches, &Pool::new().expect("a pool"))),
        case("pool of 1", |data, touches| {
            served(data, touches, &Pool::builder().workers(1).start().expect("a pool"))
        }),
        case("manual-page, same CPU", |data, touches| {
            let pinned = Pinned::here();
            first_touches(data.manual_page(Some(pinned.cpu)).bytes(), touches)
        }),
        case("manual-page", |data, touches| first_touches(data.manual_page(None).bytes(), touches)),
        case("kernel zero page", |data, touches| zero_pages(data.pages(), touches)),
    ]
}

fn served(data: &Data, touches: &[usize], server: impl Into<Server>) -> Histogram<u64> {
    first_touches(data.region(Readahead::None, server).as_slice(), touches)
}

/// What the kernel takes for a page of its own: addresses of ours that nobody serves.
fn zero_pages(pages: usize, touches: &[usize]) -> Histogram<u64> {
    let page = PageSize::new(PAGE).expect("a power of two");
    let pages = NonZeroUsize::new(pages).expect("some pages");
    let (_reservation, view) = Reservation::new(pages, page, Access::ReadOnly).expect("addresses");
    let view = view.into_stable().expect("nothing is shown in it");
    first_touches(view.as_slice(), touches)
}
