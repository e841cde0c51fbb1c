//! The runner: runs the cases of a workload in turn, round by round, and sums up.

use crate::case::{Case, Sample};
use crate::measure::median;
use crate::row::{Measured, Row};
use crate::threads::cpus;
use crate::touch::histogram;
use crate::workloads::Workload;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

pub use crate::case::Options;

/// Observes the progress of a measurement, and may end it.
pub trait Watcher {
    /// Called before run `done` of `of`. Returns false to end the measurement after its complete
    /// rounds.
    fn next(&mut self, done: usize, of: usize, case: &str) -> bool;
}

/// A watcher that never ends the measurement, and prints nothing.
#[derive(Debug)]
pub struct Silent;

impl Watcher for Silent {
    fn next(&mut self, _done: usize, _of: usize, _case: &str) -> bool {
        true
    }
}

/// Measures a workload. Returns fewer rounds, or none, if the watcher ends it.
pub fn run(workload: &Workload, options: &Options, watcher: &mut dyn Watcher) -> Vec<Measured> {
    let started = Instant::now();
    let mut cases = (workload.cases)(options);
    cases.retain(|case| (options.keep)(case.system, &case.point));
    let mut samples: Vec<Vec<Sample>> = cases.iter().map(|_| Vec::new()).collect();
    let count = cases.len();
    'rounds: for round in 0..options.rounds {
        if !has_time(options, started.elapsed(), round) {
            break;
        }
        for turn in 0..count {
            let index = case_at(turn, round, count);
            let name = format!("{} {} {}", workload.name, cases[index].system, cases[index].point);
            if !watcher.next(round * count + turn, options.rounds * count, name.trim_end()) {
                // Every case keeps the same number of rounds.
                samples.iter_mut().for_each(|samples| samples.truncate(round));
                break 'rounds;
            }
            samples[index].push((cases[index].run)(options.seed + round as u64));
        }
    }
    let complete = samples.iter().all(|samples| !samples.is_empty());
    if complete {
        (0..count).map(|index| sum_up(workload, &cases, &samples, index)).collect()
    } else {
        Vec::new()
    }
}

/// The case at a place of a round. Each round begins with another case, so that no case is always the first after
/// a pause, and every other round runs backwards, so that no case always finds the memory that one other leaves.
const fn case_at(turn: usize, round: usize, count: usize) -> usize {
    let place = (turn + round) % count;
    if round.is_multiple_of(2) { place } else { count - 1 - place }
}

/// True if the time limit lets another round begin after so many.
fn has_time(options: &Options, elapsed: Duration, rounds: usize) -> bool {
    let next = elapsed + elapsed.checked_div(rounds as u32).unwrap_or_default();
    rounds == 0 || options.time_limit.is_none_or(|limit| next <= limit)
}

fn sum_up(workload: &Workload, cases: &[Case], samples: &[Vec<Sample>], index: usize) -> Measured {
    let (case, own) = (&cases[index], &samples[index]);
    let seconds: Vec<f64> = own.iter().map(|sample| sample.time.as_secs_f64()).collect();
    let (pages, bytes) = (own[0].pages, own[0].bytes);
    let middle = median(seconds.clone());
    let of_rounds = round_ratios(cases, samples, index, |sample| Some(cost(sample)));
    let of_processor = round_ratios(cases, samples, index, processor_each);
    let medians = |ratios: &[(String, Vec<f64>)]| -> Vec<(String, f64)> {
        ratios.iter().map(|(name, rounds)| (name.clone(), median(rounds.clone()))).collect()
    };
    let (ratios, cpu_ratios) = (medians(&of_rounds), medians(&of_processor));
    let latencies = own.iter().filter_map(|sample| sample.latencies.as_ref()).fold(None, |all, one| {
        let mut all: Histogram<u64> = all.unwrap_or_else(histogram);
        all += one;
        Some(all)
    });
    let at = |quantile: f64| latencies.as_ref().map(|latencies| latencies.value_at_quantile(quantile));
    let cpu = median(own.iter().map(|sample| sample.processor.as_secs_f64()).collect());
    // The maximum, because later rounds reuse memory that the allocator kept from earlier ones.
    let bytes_each = own.iter().filter_map(|sample| sample.bytes_each).max_by(f64::total_cmp);
    let row = Row {
        workload: workload.name.to_owned(),
        system: case.system.to_owned(),
        point: case.point.clone(),
        page_size: pagestitch::Support::current().page_size().bytes(),
        chunk_size: case.chunk_size,
        threads: case.threads,
        cpus: cpus(),
        bytes,
        pages,
        rounds: own.len(),
        seconds: middle,
        seconds_min: seconds.iter().copied().fold(f64::MAX, f64::min),
        seconds_max: seconds.iter().copied().fold(0.0, f64::max),
        faults_per_s: pages as f64 / middle,
        gib_per_s: bytes as f64 / f64::from(1 << 30) / middle,
        cpu_ns_per_fault: cpu * 1e9 / pages.max(1) as f64,
        p50_ns: latencies.is_some().then(|| median(own.iter().map(cost).collect()) as u64),
        p90_ns: at(0.9),
        p99_ns: at(0.99),
        p999_ns: at(0.999),
        max_ns: latencies.as_ref().map(Histogram::max),
        bytes_each,
        descriptors: own.iter().filter_map(|sample| sample.descriptors).max(),
        reads: median_of(own, |sample| sample.reads),
        soft_faults: median_of(own, |sample| sample.soft_faults),
        of_perfect_bits: median_of(own, |sample| sample.of_perfect_bits),
        resident_bytes: own.iter().filter_map(|sample| sample.resident_bytes).max(),
        resident_limit: own.iter().filter_map(|sample| sample.resident_limit).max(),
        baseline: ratios.first().map(|(name, _)| name.clone()),
        ratio: ratios.first().map(|(_, ratio)| *ratio),
        round_ratios: of_rounds.into_iter().next().map_or_else(Vec::new, |(_, rounds)| rounds),
        ratios,
        cpu_ratios,
    };
    Measured { row, latencies }
}

/// The median of the rounds, if there is a figure.
fn median_of(samples: &[Sample], figure: fn(&Sample) -> Option<f64>) -> Option<f64> {
    let figures: Vec<f64> = samples.iter().filter_map(figure).collect();
    (!figures.is_empty()).then(|| median(figures))
}

/// The ratios of a cost to that of each baseline in the same round.
fn round_ratios(
    cases: &[Case],
    samples: &[Vec<Sample>],
    index: usize,
    cost: impl Fn(&Sample) -> Option<f64>,
) -> Vec<(String, Vec<f64>)> {
    let case = &cases[index];
    let to = |(system, point): &(&'static str, String)| {
        let other = cases.iter().position(|other| other.system == *system && other.point == *point)?;
        let of_rounds = samples[index].iter().zip(&samples[other]);
        let of_rounds: Option<Vec<f64>> =
            of_rounds.map(|(own, other)| Some(cost(own)? / cost(other)?)).collect();
        let name = if *point == case.point { (*system).to_owned() } else { format!("{system} {point}") };
        Some((name, of_rounds?))
    };
    case.baselines.iter().filter_map(to).collect()
}

/// The processor time of a page, if it was measured.
fn processor_each(sample: &Sample) -> Option<f64> {
    let each = sample.processor.as_secs_f64() / sample.pages.max(1) as f64;
    (each > 0.0).then_some(each)
}

/// The compared figure: the median latency if each touch was timed, else the time.
fn cost(sample: &Sample) -> f64 {
    match &sample.latencies {
        Some(latencies) => latencies.value_at_quantile(0.5) as f64,
        // For each page, because points may differ in their number of pages.
        None => sample.time.as_secs_f64() / sample.pages.max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_that_would_end_too_late_does_not_begin() {
        let options = Options { time_limit: Some(Duration::from_secs(10)), ..Options::default() };
        let may_begin = |seconds, rounds| has_time(&options, Duration::from_secs(seconds), rounds);
        assert!(may_begin(60, 0), "the first round always begins");
        assert!(may_begin(5, 1) && may_begin(8, 4) && !may_begin(6, 1) && !may_begin(9, 4));
        assert!(has_time(&Options::default(), Duration::from_secs(1000), 3), "without a limit");
    }

    #[test]
    fn each_round_has_all_cases_and_each_case_follows_others() {
        let round = |round| (0..5).map(|turn| case_at(turn, round, 5)).collect::<Vec<_>>();
        assert_eq!([round(0), round(1), round(2)], [[0, 1, 2, 3, 4], [3, 2, 1, 0, 4], [2, 3, 4, 0, 1]]);
        assert_eq!((0..3).map(|turn| case_at(turn, 7, 3)).sum::<usize>(), 3);
    }
}
