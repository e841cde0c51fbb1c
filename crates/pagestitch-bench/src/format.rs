//! Times in few characters.

/// `0.0015` as `1.50 ms`.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s if s >= 1e-6 => format!("{:.2} us", s * 1e6),
        s => format!("{:.0} ns", s * 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        assert_eq!([2.0, 0.0015, 2.5e-6, 9e-9].map(seconds), ["2.00 s", "1.50 ms", "2.50 us", "9 ns"]);
    }
}
