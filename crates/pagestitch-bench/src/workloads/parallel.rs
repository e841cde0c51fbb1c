//! Several threads that touch at once.

use crate::runner::{Case, Options, Sample};
use crate::systems::{CHUNK, Data, touch_all};
use crate::touch::shuffled_pages;
use crate::warm;
use pagestitch::{Pool, Readahead, Region, Server};
use std::sync::{Arc, Barrier};
use std::thread;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (system, server) in [("inline", Server::Inline), ("pool, defaults", Server::from(&pool))] {
        for pages in ["disjoint", "contended"] {
            for threads in [1, 2, 4, 8] {
                let (data, server) = (Arc::clone(&data), server.clone());
                let run = move |seed| {
                    let touches = shuffled_pages(data.bytes(), seed);
                    let region = data.region(Readahead::None, server.clone());
                    match pages {
                        "disjoint" => {
                            all_at_once(&region, touches.chunks(touches.len() / threads), data.pages())
                        }
                        _ => all_at_once(&region, (0..threads).map(|_| touches.as_slice()), data.pages()),
                    }
                };
                let case =
                    Case::new(system, run).at(format!("{threads} {pages}")).chunks_of(CHUNK).by(threads);
                cases.push(case.against_point(format!("1 {pages}")));
            }
        }
    }
    cases
}

/// Has a thread touch each list of offsets; says how long the last one took.
fn all_at_once<'t>(
    region: &Region,
    lists: impl ExactSizeIterator<Item = &'t [usize]>,
    pages: usize,
) -> Sample {
    let start = Barrier::new(lists.len() + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = lists
            .map(|offsets| {
                let (region, start) = (&region, &start);
                scope.spawn(move || {
                    start.wait();
                    touch_all(region.as_slice(), offsets)
                })
            })
            .collect();
        Sample::of(pages, region.len(), || {
            start.wait();
            threads.into_iter().map(|thread| thread.join().expect("reads only")).sum::<u64>()
        })
    })
}
