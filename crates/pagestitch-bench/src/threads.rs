//! The numbers of threads of a measurement.

use crate::affinity::allowed;
use std::str::FromStr;

/// Numbers of threads, each of which is a point of a workload: `1,2,4`.
///
/// ```
/// use pagestitch_bench::threads::Threads;
///
/// let threads: Threads = "1,2,4".parse()?;
/// assert_eq!(threads.counts(), [1, 2, 4]);
/// assert!("1,zero".parse::<Threads>().is_err());
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Threads(Vec<usize>);

impl Threads {
    /// The powers of two up to the number of CPUs that this process may use, and that number.
    #[must_use]
    pub fn up_to_the_cpus() -> Self {
        Self(up_to(cpus()))
    }

    /// The numbers, ascending.
    #[must_use]
    pub fn counts(&self) -> &[usize] {
        &self.0
    }
}

impl FromStr for Threads {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let mut counts = list.split(',').map(count).collect::<Result<Vec<_>, _>>()?;
        counts.sort_unstable();
        match counts.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("{} threads are named twice: name each number once", pair[0])),
            None => Ok(Self(counts)),
        }
    }
}

fn count(text: &str) -> Result<usize, String> {
    let count = text.trim().parse().map_err(|_| {
        format!(
            "`{}` is no number of threads: name numbers with commas between them, such as 1,2,4",
            text.trim()
        )
    })?;
    match count {
        1..=MOST => Ok(count),
        _ => Err(format!("{count} threads cannot be measured: name numbers from 1 to {MOST}")),
    }
}

fn up_to(cpus: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1), |count| Some(count * 2));
    powers.take_while(|&count| count < cpus).chain([cpus]).collect()
}

/// The number of CPUs that this process may use.
pub(crate) fn cpus() -> usize {
    allowed().len()
}

/// Every thread has a stack, and a part of the memory.
const MOST: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_threads_is_sorted_and_has_no_number_twice() {
        let counts = |list: &str| list.parse::<Threads>().map(|threads| threads.counts().to_vec());
        assert_eq!(counts("1"), Ok(vec![1]));
        assert_eq!(counts("8, 1,1024"), Ok(vec![1, 8, 1024]));
        let no_number = |text: &str| {
            format!("`{text}` is no number of threads: name numbers with commas between them, such as 1,2,4")
        };
        let out_of_range =
            |count: usize| format!("{count} threads cannot be measured: name numbers from 1 to 1024");
        for (list, refusal) in [
            ("", no_number("")),
            ("1,,2", no_number("")),
            ("1;2", no_number("1;2")),
            ("-1", no_number("-1")),
            ("1.5", no_number("1.5")),
            ("99999999999999999999999", no_number("99999999999999999999999")),
            ("0", out_of_range(0)),
            ("1,1025", out_of_range(1025)),
            ("2,1,2", String::from("2 threads are named twice: name each number once")),
        ] {
            assert_eq!(counts(list), Err(refusal), "{list}");
        }
    }

    #[test]
    fn the_last_default_number_is_that_of_the_cpus() {
        assert_eq!([1, 2, 6, 16].map(up_to), [vec![1], vec![1, 2], vec![1, 2, 4, 6], vec![1, 2, 4, 8, 16]]);
    }
}
