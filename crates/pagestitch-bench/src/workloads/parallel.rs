//! Several threads that touch pages at the same time.

use crate::case::{Case, Options, Sample};
use crate::measure::warm;
use crate::systems::{CHUNK, Data, PAGE, touch_all, zero_pages};
use crate::team::{at_once, parts};
use crate::touch::shuffled_pages;
use pagestitch::{Inline, Pool, Readahead, Server};
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let data = Data::new(options.size(64 << 20), options.seed);
    warm(3 * data.bytes());
    let pool = Pool::new().expect("a pool");
    let counts = options.threads_or(&THREADS);
    let first = counts[0];
    let mut cases = Vec::new();
    for (system, server) in [("inline", Server::from(Inline)), ("pool, defaults", Server::from(&pool))] {
        for pages in ["disjoint", "contended"] {
            for &threads in &counts {
                let (data, server) = (Arc::clone(&data), server.clone());
                let run = move |seed| {
                    let touches = shuffled_pages(data.bytes(), seed);
                    let region = data.region(Readahead::None, server.clone());
                    let lists = match pages {
                        "disjoint" => disjoint(&touches, threads),
                        _ => vec![touches.as_slice(); threads],
                    };
                    all_at_once(region.as_slice(), lists)
                };
                let case =
                    Case::new(system, run).at(format!("{threads} {pages}")).chunks_of(CHUNK).by(threads);
                cases.push(case.against_point(format!("{first} {pages}")));
            }
        }
    }
    // The kernel's own scaling with threads on this machine.
    for &threads in &counts {
        let bytes = data.bytes();
        let run = move |seed| {
            let touches = shuffled_pages(bytes, seed);
            all_at_once(&zero_pages(bytes / PAGE), disjoint(&touches, threads))
        };
        let case = Case::new("kernel zero page", run).at(format!("{threads} disjoint")).by(threads);
        cases.push(case.against_point(format!("{first} disjoint")));
    }
    cases
}

fn disjoint(touches: &[usize], threads: usize) -> Vec<&[usize]> {
    parts(touches, threads, 1).collect()
}

/// Touches each list of offsets in a thread of its own; measures until the last thread ends.
fn all_at_once(bytes: &[u8], lists: Vec<&[usize]>) -> Sample {
    at_once((bytes.len() / PAGE, bytes.len()), &[], lists, |offsets| touch_all(bytes, offsets)).0
}

const THREADS: [usize; 4] = [1, 2, 4, 8];
