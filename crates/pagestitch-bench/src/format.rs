//! Times and counts in few characters.

/// `0.0015` as `1.50 ms`.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s if s >= 1e-6 => format!("{:.2} us", s * 1e6),
        s => format!("{:.0} ns", s * 1e9),
    }
}

/// `0.0015` as `1.5 ms`, for the ticks of an axis: without zeros at the end.
pub(crate) fn round_seconds(seconds: f64) -> String {
    scaled(seconds, &[(1.0, " s"), (1e-3, " ms"), (1e-6, " us"), (1e-9, " ns")])
}

/// `20000` as `20 k`.
pub(crate) fn round_count(count: f64) -> String {
    scaled(count, &[(1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")])
}

/// At most three digits and a unit. The last unit is that of all smaller values.
fn scaled(value: f64, units: &[(f64, &str)]) -> String {
    // 999.9 has three digits in the next unit.
    let unit = units.iter().find(|(unit, _)| value >= unit * 0.9995).or_else(|| units.last());
    let (unit, name) = unit.copied().unwrap_or((1.0, ""));
    let number = value / unit;
    let decimals = 2_usize.saturating_sub(number.max(1.0).log10().floor() as usize);
    let text = format!("{number:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{name}")
}

/// `1` and `round` as `1 round`, `2` and `round` as `2 rounds`.
pub(crate) fn count(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// Three digits.
pub(crate) fn digits(figure: f64) -> String {
    match figure {
        figure if figure >= 99.95 => format!("{figure:.0}"),
        figure if figure >= 9.995 => format!("{figure:.1}"),
        figure if figure >= 0.9995 => format!("{figure:.2}"),
        figure => format!("{figure:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        assert_eq!([2.0, 0.0015, 2.5e-6, 9e-9].map(seconds), ["2.00 s", "1.50 ms", "2.50 us", "9 ns"]);
    }

    #[test]
    fn the_labels_of_ticks_have_no_zeros_at_the_end() {
        let times = [5.0, 0.1, 0.0015, 2e-5, 1e-6, 9.999e-7, 0.999_99, 9e-9, 5e-10].map(round_seconds);
        assert_eq!(times, ["5 s", "100 ms", "1.5 ms", "20 us", "1 us", "1 us", "1 s", "9 ns", "0.5 ns"]);
        let counts = [0.1, 25.0, 100.0, 1000.0, 65_000.0, 1e7, 500.0, 1234.0].map(round_count);
        assert_eq!(counts, ["0.1", "25", "100", "1 k", "65 k", "10 M", "500", "1.23 k"]);
    }

    #[test]
    fn a_count_has_its_plural() {
        assert_eq!([0, 1, 2].map(|rounds| count(rounds, "round")), ["0 rounds", "1 round", "2 rounds"]);
    }

    #[test]
    fn a_figure_has_three_digits() {
        assert_eq!(
            [0.0421, 0.99949, 1.5, 9.99, 34.06, 278.4].map(digits),
            ["0.042", "0.999", "1.50", "9.99", "34.1", "278"]
        );
    }
}
