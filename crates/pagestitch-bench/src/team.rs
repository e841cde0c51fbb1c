//! Work of several threads at once, a part for each.

use crate::affinity::pin;
use crate::case::Sample;
use crate::touch::{first_touches, histogram};
use hdrhistogram::Histogram;
use std::panic::resume_unwind;
use std::sync::Barrier;
use std::thread::{self, ScopedJoinHandle};

/// Runs `work` on each part in a thread of its own. A single part has the calling thread.
pub(crate) fn in_parts<P: Send, T: Send>(parts: Vec<P>, work: impl Fn(P) -> T + Sync) -> Vec<T> {
    if parts.len() == 1 {
        return parts.into_iter().map(work).collect();
    }
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || work(part))).collect();
        threads.into_iter().map(|thread| result_of(thread)).collect()
    })
}

/// Runs `work` as [`in_parts`] does, in threads that have started before. Measures from their common
/// start to the last end. Thread `n` stays on CPU `n` of `cpus`, modulo their number, if there are
/// any.
pub(crate) fn at_once<P: Send, T: Send>(
    (pages, bytes): (usize, usize),
    cpus: &[usize],
    parts: Vec<P>,
    work: impl Fn(P) -> T + Sync,
) -> (Sample, Vec<T>) {
    let (ready, start) = (Barrier::new(parts.len() + 1), Barrier::new(parts.len() + 1));
    let (ready, start, work) = (&ready, &start, &work);
    thread::scope(|scope| {
        let run = |(number, part)| {
            scope.spawn(move || {
                if !cpus.is_empty() {
                    pin(cpus[number % cpus.len()]);
                }
                ready.wait();
                start.wait();
                work(part)
            })
        };
        let threads: Vec<_> = parts.into_iter().enumerate().map(run).collect();
        ready.wait();
        let mut results = Vec::with_capacity(threads.len());
        let sample = Sample::of(pages, bytes, || {
            start.wait();
            results.extend(threads.into_iter().map(|thread| result_of(thread)));
        });
        (sample, results)
    })
}

/// The result of a thread; or its panic goes on here.
fn result_of<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// The first touches of so many threads, a part of the offsets each.
pub(crate) fn first_touches_by(threads: usize, bytes: &[u8], offsets: &[usize]) -> Histogram<u64> {
    let parts = parts(offsets, threads, 1).collect();
    let mut all = histogram();
    in_parts(parts, |part: &[usize]| first_touches(bytes, part)).into_iter().for_each(|one| all += one);
    all
}

/// Cuts `items` into as many parts as there are threads, each a multiple of `unit` but the last. There
/// are fewer parts if there are too few items.
pub(crate) fn parts<T>(items: &[T], threads: usize, unit: usize) -> impl Iterator<Item = &[T]> {
    items.chunks(part_length(items.len(), threads, unit))
}

/// The length of each part but the last.
pub(crate) fn part_length(items: usize, threads: usize, unit: usize) -> usize {
    items.div_ceil(threads).next_multiple_of(unit).max(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_items() {
        for (items, threads, unit) in [(10, 3, 1), (10, 1, 4), (2, 8, 1), (100, 7, 16)] {
            let items: Vec<usize> = (0..items).collect();
            let parts: Vec<&[usize]> = parts(&items, threads, unit).collect();
            assert!(parts.len() <= threads && parts.concat() == items, "{parts:?}");
            let inner = &parts[..parts.len() - 1];
            assert!(inner.iter().all(|part| part.len() % unit == 0), "{parts:?}");
        }
    }

    #[test]
    fn threads_return_their_results_in_order() {
        assert_eq!(in_parts(vec![1, 2, 3], |part| part * 2), [2, 4, 6]);
        let (sample, results) = at_once((3, 30), &[], vec![1, 2, 3], |part| part * 2);
        assert_eq!((results, sample.pages, sample.bytes), (vec![2, 4, 6], 3, 30));
    }
}
