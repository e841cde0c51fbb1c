//! Reading all bytes once.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, sum};
use pagestitch::{Pool, Readahead};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(512 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let case = |system: &'static str, read: Box<dyn Fn(&Data) -> u64>| {
        let data = Arc::clone(&data);
        let run = move |_| Sample::of(data.pages(), data.bytes(), || read(&data));
        Case::new(system, run).chunks_of(CHUNK).against(&["eager, 2 MiB pages", "eager, 4 KiB pages"])
    };
    vec![
        case("pool, defaults", Box::new(move |data| sum(data.region(Readahead::Adaptive, &pool).as_slice()))),
        case("eager, 2 MiB pages", Box::new(|data| sum(&data.eager_huge()))),
        case("eager, 4 KiB pages", Box::new(|data| sum(&data.eager_small()))),
        case("manual-page", Box::new(|data| sum(data.manual_page(None).bytes()))),
    ]
}
