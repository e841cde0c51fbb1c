//! In which order to touch a region's pages, and how many: `sequential`, `random`, `random:10%`.

use std::str::FromStr;

/// What to touch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Touch {
    random: bool,
    percent: f64,
}

impl Touch {
    /// An offset in each page to touch, in order.
    pub(crate) fn offsets(self, len: usize, page: usize, seed: u64) -> Vec<usize> {
        let mut offsets: Vec<usize> = (0..len).step_by(page).collect();
        if self.random {
            fastrand::Rng::with_seed(seed).shuffle(&mut offsets);
        }
        let wanted = (offsets.len() as f64 * self.percent / 100.0).ceil() as usize;
        offsets.truncate(wanted.max(1));
        offsets
    }
}

impl FromStr for Touch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (order, share) = text.split_once(':').unwrap_or((text, "100%"));
        let random = match order {
            "sequential" => false,
            "random" => true,
            _ => {
                return Err(String::from(
                    "say sequential or random, with a share of the pages if you like: random:10%",
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
    fn orders_and_shares_are_read() {
        assert_eq!("sequential".parse(), Ok(Touch { random: false, percent: 100.0 }));
        assert_eq!("random:0.5%".parse(), Ok(Touch { random: true, percent: 0.5 }));
        for bad in
            ["", "backwards", "random:", "random:10", "random:0%", "random:101%", "random:NaN%", "random:-1%"]
        {
            assert!(bad.parse::<Touch>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_is_that_many_pages_once_each() {
        let touch: Touch = "random:10%".parse().unwrap();
        let mut offsets = touch.offsets(1000 * 4096 + 1, 4096, 7);
        assert_eq!(offsets.len(), 101);
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len(), 101);
    }
}
