//! The cost of counting faults, and of timing their parts.

use crate::affinity::Pinned;
use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::Data;
use crate::touch::{first_touches, shuffled_pages};
use pagestitch::{Placement, Pool, Readahead};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let case = |system: &'static str, timed: bool| {
        let data = Arc::clone(&data);
        let run = move |seed| {
            let touches = shuffled_pages(data.bytes(), seed);
            let pinned = Pinned::here();
            let pool = Pool::builder().placement(Placement::Cpus(vec![pinned.cpu])).start().expect("a pool");
            let region = data.builder(Readahead::None);
            let region = if timed { region.record_latency() } else { region }.build(&pool).expect("a region");
            Sample::of_touches(data.bytes(), || first_touches(region.as_slice(), &touches))
        };
        Case::new(system, run).against(&["counted"])
    };
    vec![case("counted", false), case("counted and timed", true)]
}
