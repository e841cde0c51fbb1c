//! Zipf's law: few items are asked for most of the time.

/// Ranks of which `n`, counted from 1, comes as often as `n` to the power `-skew`.
#[derive(Debug, Clone, Copy)]
pub struct Zipf {
    items: u64,
    skew: f64,
}

impl Zipf {
    /// Ranks of `items` items. A skew of 0 makes all alike; 0.99 is that of the YCSB benchmarks.
    #[must_use]
    pub const fn new(items: u64, skew: f64) -> Self {
        Self { items, skew }
    }

    /// The rank, from 0 on, that belongs to a number from 0 to 1: the inverse of the continuous distribution.
    #[must_use]
    pub fn rank(&self, uniform: f64) -> u64 {
        let (most, flat) = (self.items as f64 + 1.0, 1.0 - self.skew);
        let rank = match flat.abs() < f64::EPSILON {
            true => most.powf(uniform),
            false => (1.0 + uniform * (most.powf(flat) - 1.0)).powf(1.0 / flat),
        };
        (rank as u64 - 1).min(self.items.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranks_come_as_often_as_the_law_says() {
        const DRAWS: u32 = 100_000;
        let share = |skew, ranks: u64| {
            let zipf = Zipf::new(10_000, skew);
            let drawn = (0..DRAWS).map(|draw| zipf.rank((f64::from(draw) + 0.5) / f64::from(DRAWS)));
            drawn.inspect(|rank| assert!(*rank < 10_000)).filter(|rank| *rank < ranks).count() as f64
                / f64::from(DRAWS)
        };
        assert!((share(0.0, 100) - 0.01).abs() < 0.001, "{}", share(0.0, 100));
        // ln(101) / ln(10,001)
        assert!((share(1.0, 100) - 0.501).abs() < 0.005, "{}", share(1.0, 100));
        assert!(share(0.99, 100) < share(1.0, 100) && share(1.5, 100) > 0.9, "{}", share(1.5, 100));
        assert_eq!((Zipf::new(1, 0.99).rank(0.0), Zipf::new(1, 0.99).rank(1.0)), (0, 0));
    }
}
