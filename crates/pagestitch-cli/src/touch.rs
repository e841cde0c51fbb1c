//! The touched pages and their order: `sequential`, `random`, `random:10%`, `zipf:0.99:1000000`.

use pagestitch_bench::zipf::Zipf;
use std::str::FromStr;

/// The pages to touch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Touch {
    /// A share of the pages, each of them once.
    Once { random: bool, percent: f64 },
    /// Few pages most of the time.
    Zipf { skew: f64, touches: u64 },
}

impl Touch {
    /// Parses touches of each page once.
    pub(crate) fn once(text: &str) -> Result<Self, String> {
        match text.parse()? {
            touch @ Self::Once { .. } => Ok(touch),
            Self::Zipf { .. } => Err(String::from("zipf touches pages again: say sequential or random")),
        }
    }

    /// An offset in each page to touch, in order. The order is computed, not stored, because a
    /// tebibyte has 268 million pages.
    pub(crate) fn offsets(self, len: usize, page: usize, seed: u64) -> impl Iterator<Item = usize> {
        let pages = len.div_ceil(page) as u64;
        let touches = match self {
            Self::Once { percent, .. } => {
                ((pages as f64 * percent / 100.0).ceil() as u64).clamp(1, pages.max(1))
            }
            Self::Zipf { touches, .. } => touches,
        };
        let shuffled = Permutation::new(pages, seed);
        let nth = move |index| match self {
            Self::Once { random: false, .. } => index,
            Self::Once { random: true, .. } => shuffled.at(index),
            Self::Zipf { skew, .. } => shuffled.at(Zipf::new(pages, skew).rank(fraction(seed, index))),
        };
        (0..if pages == 0 { 0 } else { touches }).map(move |index| nth(index) as usize * page)
    }
}

/// The number from 0 to 1 that a seed has at an index.
fn fraction(seed: u64, index: u64) -> f64 {
    (mix(mix(seed).wrapping_add(index)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// The numbers below `count` in a random order that the seed decides: a Feistel network over the
/// next power of four, applied until the result is below `count`.
#[derive(Debug, Clone, Copy)]
struct Permutation {
    count: u64,
    /// The bits in each half of a number.
    half: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    fn new(count: u64, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let half = (u64::BITS - count.saturating_sub(1).leading_zeros()).div_ceil(2);
        Self { count, half, keys: std::array::from_fn(|_| random.u64(..)) }
    }

    /// The number at an index below `count`.
    fn at(&self, index: u64) -> u64 {
        // The network permutes at most four times as many numbers, so a few steps lead to one below
        // `count`.
        let mut number = self.step(index);
        while number >= self.count {
            number = self.step(number);
        }
        number
    }

    fn step(&self, number: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (number >> self.half, number & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half | right
    }
}

/// Spreads each bit over all others (the finaliser of SplitMix64).
const fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

const ROUNDS: usize = 4;

impl FromStr for Touch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (order, rest) = text.split_once(':').map_or((text, None), |(order, rest)| (order, Some(rest)));
        match order {
            "sequential" | "random" => once(order == "random", rest.unwrap_or("100%")),
            "zipf" => zipf(rest.unwrap_or_default()),
            _ => Err(String::from(
                "say sequential or random, with an optional share of the pages, or zipf:SKEW:TOUCHES: random:10%, zipf:0.99:1000000",
            )),
        }
    }
}

fn once(random: bool, share: &str) -> Result<Touch, String> {
    let percent = share.strip_suffix('%').and_then(|digits| digits.parse::<f64>().ok());
    let percent = percent.filter(|&percent| percent > 0.0 && percent <= 100.0);
    let percent = percent.ok_or_else(|| format!("'{share}' is not a share above 0% and up to 100%"))?;
    Ok(Touch::Once { random, percent })
}

fn zipf(rest: &str) -> Result<Touch, String> {
    let (skew, touches) = rest.split_once(':').unwrap_or((rest, ""));
    let skew = skew.parse().ok().filter(|skew| (0.0..=MOST_SKEW).contains(skew));
    let touches = touches.parse().ok().filter(|&touches| touches > 0);
    let parts = skew.zip(touches).map(|(skew, touches)| Touch::Zipf { skew, touches });
    parts.ok_or_else(|| {
        format!("'{rest}' is not a skew from 0 to {MOST_SKEW} and a number of touches: zipf:0.99:1000000")
    })
}

/// At this skew nearly all touches are of one page.
const MOST_SKEW: f64 = 10.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_shares_are_parsed() {
        assert_eq!("sequential".parse(), Ok(Touch::Once { random: false, percent: 100.0 }));
        assert_eq!("random:0.5%".parse(), Ok(Touch::Once { random: true, percent: 0.5 }));
        assert_eq!("zipf:0.99:1000".parse(), Ok(Touch::Zipf { skew: 0.99, touches: 1000 }));
        assert!(Touch::once("zipf:0.99:1000").is_err() && Touch::once("random:10%").is_ok());
        let shares = ["", "10", "0%", "101%", "NaN%", "-1%"].map(|share| format!("random:{share}"));
        let skews = ["", "0.99", "0.99:", "0.99:0", "0.99:-1", "-1:10", "NaN:10", "11:10", ":10", "1:2:3"];
        let skews = skews.map(|skew| format!("zipf:{skew}"));
        for bad in shares.iter().chain(&skews).map(String::as_str).chain(["", "backwards", "zipf"]) {
            assert!(bad.parse::<Touch>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_touches_each_of_its_pages_once() {
        let touch: Touch = "random:10%".parse().unwrap();
        let mut offsets: Vec<usize> = touch.offsets(1000 * 4096 + 1, 4096, 7).collect();
        assert_eq!(offsets.len(), 101);
        assert!(!offsets.is_sorted());
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len(), 101);
        let sequential: Touch = "sequential:50%".parse().unwrap();
        assert_eq!(sequential.offsets(4 * 4096, 4096, 7).collect::<Vec<_>>(), [0, 4096]);
    }

    #[test]
    fn zipf_touches_few_pages_most_of_the_time_and_none_outside() {
        let touch: Touch = "zipf:0.99:20000".parse().unwrap();
        let mut counts = vec![0; 4096];
        touch.offsets(4096 * 4096, 4096, 7).for_each(|offset| counts[offset / 4096] += 1);
        assert_eq!(counts.iter().sum::<usize>(), 20_000);
        assert!(touch.offsets(4096 * 4096, 4096, 7).eq(touch.offsets(4096 * 4096, 4096, 7)));
        assert_ne!(counts.iter().max(), Some(&counts[0]), "the pages are in no order");
        counts.sort_unstable();
        let top: usize = counts[4096 - 41..].iter().sum();
        assert!((8_000..10_000).contains(&top), "the first of a hundred pages have {top} of 20000 touches");
        assert_eq!(touch.offsets(1, 4096, 7).filter(|offset| *offset == 0).count(), 20_000);
    }

    #[test]
    fn a_random_order_has_every_page_once_and_depends_on_the_seed() {
        let touch: Touch = "random".parse().unwrap();
        for pages in (1..70).chain([255, 256, 257, 1000, 4096, 4097]) {
            let order = |seed| touch.offsets(pages * 4096, 4096, seed).map(|offset| offset / 4096);
            let mut all: Vec<usize> = order(pages as u64).collect();
            assert!(order(pages as u64).eq(all.iter().copied()), "the same seed, the same order");
            assert!(pages < 20 || !order(1).eq(order(2)), "{pages} pages: another seed, another order");
            all.sort_unstable();
            assert!(all.into_iter().eq(0..pages), "{pages} pages");
        }
    }

    #[test]
    fn the_first_pages_of_a_random_order_are_spread_over_a_tebibyte() {
        let touch: Touch = "random".parse().unwrap();
        let mut seen = [0; 16];
        touch.offsets(1 << 40, 4096, 3).take(1600).for_each(|offset| seen[offset >> 36] += 1);
        assert!(seen.iter().all(|count| (50..200).contains(count)), "{seen:?}");
    }
}
