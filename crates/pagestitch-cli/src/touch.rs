//! The order and the share of touched pages: `sequential`, `random`, `random:10%`.

use std::str::FromStr;

/// The pages to touch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Touch {
    random: bool,
    percent: f64,
}

impl Touch {
    /// An offset in each page to touch, in order. The order is computed, not stored, because a
    /// tebibyte has 268 million pages.
    pub(crate) fn offsets(self, len: usize, page: usize, seed: u64) -> impl Iterator<Item = usize> {
        let pages = len.div_ceil(page) as u64;
        let wanted = ((pages as f64 * self.percent / 100.0).ceil() as u64).clamp(1, pages.max(1));
        let shuffled = Permutation::new(pages, seed);
        let nth = move |index| if self.random { shuffled.at(index) } else { index };
        (0..wanted.min(pages)).map(move |index| nth(index) as usize * page)
    }
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
        let (order, share) = text.split_once(':').unwrap_or((text, "100%"));
        let random = match order {
            "sequential" => false,
            "random" => true,
            _ => {
                return Err(String::from(
                    "say sequential or random, with an optional share of the pages: random:10%",
                ));
            }
        };
        let percent = share.strip_suffix('%').and_then(|digits| digits.parse::<f64>().ok());
        let percent = percent.filter(|&percent| percent > 0.0 && percent <= 100.0);
        let percent = percent.ok_or_else(|| format!("'{share}' is not a share above 0% and up to 100%"))?;
        Ok(Self { random, percent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_shares_are_parsed() {
        assert_eq!("sequential".parse(), Ok(Touch { random: false, percent: 100.0 }));
        assert_eq!("random:0.5%".parse(), Ok(Touch { random: true, percent: 0.5 }));
        for bad in
            ["", "backwards", "random:", "random:10", "random:0%", "random:101%", "random:NaN%", "random:-1%"]
        {
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
