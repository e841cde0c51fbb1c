//! Filling all pages at once.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data};
use pagestitch::{Pool, Readahead, Region};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(512 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let case = |system: &'static str, mut run: Box<dyn FnMut(&Data) -> Sample>| {
        let data = Arc::clone(&data);
        Case::new(system, move |_| run(&data))
            .chunks_of(CHUNK)
            .against(&["eager, 2 MiB pages", "eager, 4 KiB pages"])
    };
    let populate = move |data: &Data| {
        Sample::of(data.pages(), data.bytes(), || {
            let region: Region = data.region(Readahead::Adaptive, &pool);
            region.populate(..).expect("memory");
            region
        })
    };
    let eager = |copy: fn(&Data) -> pagestitch::source::Pages| {
        move |data: &Data| Sample::of(data.pages(), data.bytes(), || copy(data))
    };
    vec![
        case("populate", Box::new(populate)),
        case("eager, 2 MiB pages", Box::new(eager(Data::eager_huge))),
        case("eager, 4 KiB pages", Box::new(eager(Data::eager_small))),
    ]
}
