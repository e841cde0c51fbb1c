//! The order in which pages are touched.

use crate::simulated::PerfectBits;
use crate::zipf::Zipf;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The pattern of the touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Pattern {
    /// Any page, all alike.
    Random,
    /// Few pages most of the time: page of rank `n` as often as `n` to the power -0.99.
    Zipf,
    /// Half of the touches as for Zipf, the other half in order.
    ScanAndHotSet,
    /// All words of all pages once, in order.
    Sequential,
    /// Pages that are not in memory, in any order, each once.
    Misses,
    /// Any page, all alike; every other touch writes too.
    HalfWriting,
}

/// The touches of a run, as page numbers.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The touches that fill the memory, in order.
    pub(crate) fill: Vec<u32>,
    /// The touches by which the pages in use come into memory, before the measurement.
    pub(crate) settle: Vec<u32>,
    pub(crate) touches: Vec<u32>,
}

impl Pattern {
    /// The name of its point.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Zipf => "zipf",
            Self::ScanAndHotSet => "scan + hot set",
            Self::Sequential => "sequential",
            Self::Misses => "misses",
            Self::HalfWriting => "half writing",
        }
    }

    /// The number of touches, if `touches` are asked for.
    pub(crate) const fn touches(self, pages: usize, touches: usize) -> usize {
        match self {
            Self::Sequential => pages,
            _ => touches,
        }
    }
}

impl Trace {
    /// The touches of `pages` pages of which `resident` fit into memory.
    pub(crate) fn new(
        pattern: Pattern,
        (pages, resident): (usize, usize),
        touches: usize,
        seed: u64,
    ) -> Self {
        if pattern == Pattern::Sequential {
            return Self { fill: Vec::new(), settle: Vec::new(), touches: (0..pages as u32).collect() };
        }
        // A little more than memory holds, so that pages leave from the first measured touch on.
        let filling = (resident + resident / 8).min(pages);
        let fill = (0..filling as u32).collect();
        if pattern == Pattern::Misses {
            return Self { fill, settle: Vec::new(), touches: misses(filling..pages, touches, seed) };
        }
        let mut draw =
            Draw { pattern, pages, scanned: pages / 2, count: 0, random: fastrand::Rng::with_seed(seed) };
        let is_uniform = matches!(pattern, Pattern::Random | Pattern::HalfWriting);
        let settling = if is_uniform { 0 } else { pages / 4 };
        let settle = (0..settling).map(|_| draw.page()).collect();
        Self { fill, settle, touches: (0..touches).map(|_| draw.page()).collect() }
    }

    /// The share of the touches that find their page in memory for so many pages, with perfect reference bits.
    /// None if all pages are used alike.
    pub(crate) fn hits_with_perfect_bits(&self, resident: usize) -> Option<f64> {
        if self.settle.is_empty() {
            return None;
        }
        let mut memory = PerfectBits::new(resident);
        let mut hits = |pages: &[u32]| pages.iter().filter(|&&page| memory.touch(u64::from(page))).count();
        hits(&self.fill);
        hits(&self.settle);
        Some(hits(&self.touches) as f64 / self.touches.len() as f64)
    }
}

/// So many of the pages, in any order, each once.
fn misses(pages: Range<usize>, touches: usize, seed: u64) -> Vec<u32> {
    let mut all: Vec<u32> = pages.map(|page| page as u32).collect();
    assert!(all.len() >= touches, "more misses than pages that are not in memory");
    fastrand::Rng::with_seed(seed).shuffle(&mut all);
    all.truncate(touches);
    all
}

struct Draw {
    pattern: Pattern,
    pages: usize,
    /// The next page of the scan.
    scanned: usize,
    count: usize,
    random: fastrand::Rng,
}

impl Draw {
    fn page(&mut self) -> u32 {
        self.count += 1;
        let page = match self.pattern {
            Pattern::Random | Pattern::HalfWriting => self.random.usize(..self.pages),
            Pattern::ScanAndHotSet if self.count.is_multiple_of(2) => self.scan(),
            _ => self.zipf(),
        };
        page as u32
    }

    fn scan(&mut self) -> usize {
        self.scanned = (self.scanned + 1) % self.pages;
        self.scanned
    }

    /// A rank, spread over all pages.
    fn zipf(&mut self) -> usize {
        let rank = Zipf::new(self.pages as u64, SKEW).rank(self.random.f64()) as usize;
        rank.wrapping_mul(SPREAD) % self.pages
    }
}

const SKEW: f64 = 0.99;
/// A prime, so that each rank has a page of its own.
const SPREAD: usize = 2_654_435_761;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_miss_touches_a_page_that_no_touch_before_has_brought() {
        let trace = Trace::new(Pattern::Misses, (4096, 1024), 2000, 1);
        let mut all = trace.fill;
        all.extend(&trace.touches);
        let touched = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!((all.len(), trace.touches.len()), (touched, 2000));
        assert!(!trace.touches.is_sorted());
    }

    #[test]
    fn few_pages_have_most_touches_of_zipf_and_none_is_outside() {
        let trace = Trace::new(Pattern::Zipf, (4096, 1024), 20_000, 1);
        let mut counts = vec![0; 4096];
        trace.touches.iter().for_each(|&page| counts[page as usize] += 1);
        counts.sort_unstable();
        let top: usize = counts[4096 - 41..].iter().sum();
        assert!((8_000..10_000).contains(&top), "the first of a hundred pages have {top} of 20000 touches");
        let both = Trace::new(Pattern::ScanAndHotSet, (4096, 1024), 1000, 1);
        let scan: Vec<u32> = both.touches.iter().skip(1).step_by(2).copied().collect();
        assert!(scan.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 4096), "{scan:?}");
    }

    #[test]
    fn the_hits_of_perfect_bits_are_those_of_the_measured_touches() {
        let trace = |pattern| Trace::new(pattern, (4096, 1024), 4000, 1);
        assert_eq!(trace(Pattern::Random).hits_with_perfect_bits(1024), None);
        let zipf = trace(Pattern::Zipf);
        let before: HashSet<u32> = zipf.fill.iter().chain(&zipf.settle).copied().collect();
        let new: HashSet<&u32> = zipf.touches.iter().filter(|page| !before.contains(page)).collect();
        assert_eq!(zipf.hits_with_perfect_bits(8192), Some((4000 - new.len()) as f64 / 4000.0));
        let scanned = trace(Pattern::ScanAndHotSet).hits_with_perfect_bits(1024).unwrap();
        assert!((0.3..0.5).contains(&scanned), "half of the touches scan, and few of them hit: {scanned}");
    }
}
