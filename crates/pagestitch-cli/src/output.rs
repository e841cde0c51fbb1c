//! Output for people: its form, sizes, times, tables, progress.

use crate::number;
use clap::builder::TypedValueParser;
use comfy_table::{ContentArrangement, LineStyle, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use std::env;
use std::time::{Duration, Instant};

/// The form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Text for a person.
    Text,
    /// Objects for a program.
    Json,
    /// Only what an option requests.
    Quiet,
}

/// The width of the output: that of COLUMNS or of the terminal, or of a page of text without one.
pub(crate) fn width() -> usize {
    let asked = env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let asked = asked.filter(|&columns: &u16| columns > 0);
    asked.or_else(|| Table::new().width()).unwrap_or(WIDTH_OF_A_FILE).into()
}

/// True if the terminal ignores escape sequences.
pub(crate) fn is_dumb() -> bool {
    env::var_os("TERM").is_none_or(|terminal| terminal.is_empty() || terminal == "dumb")
}

/// True if the user accepts colours, wherever a terminal shows them: see <https://no-color.org> and
/// <https://bixense.com/clicolors>.
pub(crate) fn may_color() -> bool {
    let refuses = env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
    !is_dumb() && !refuses && env::var_os("CLICOLOR").is_none_or(|set| set != "0")
}

/// A table of left-aligned columns, as wide as the output.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    let style = presets::NOTHING.header_separator(LineStyle::new('─', '─', '─', '─'));
    table.load_style(style).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(u16::try_from(width()).unwrap_or(u16::MAX));
    table.set_header(header);
    table
}

/// `1` and `page` as `1 page`, `2` and `page` as `2 pages`.
pub(crate) fn count(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// `1536` as `1.5 KiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let exponent = (u64::BITS - bytes.leading_zeros()).saturating_sub(1) / 10;
    match ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].get(exponent as usize) {
        Some(unit) if exponent > 0 => {
            format!("{:.1} {unit}", bytes as f64 / f64::from(1 << 10).powi(exponent as i32))
        }
        _ => count(bytes as usize, "byte"),
    }
}

/// `1536` as `1.5 KiB`, and `0` without a unit: a position among bytes.
pub(crate) fn offset(offset: u64) -> String {
    if offset == 0 { String::from("0") } else { bytes(offset) }
}

/// `1500` as `1.5 us`.
pub(crate) fn nanoseconds(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// Parses a number of handler threads.
pub(crate) fn workers() -> impl TypedValueParser<Value = usize> {
    number::up_to(WORKERS)
}

/// A progress bar that appears on a terminal after a second of work, unless another picture is
/// drawn there.
pub(crate) struct Progress {
    task: &'static str,
    total: u64,
    done: u64,
    started: Instant,
    hidden: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar for so many bytes. `hidden`: another picture is on the terminal.
    pub(crate) fn new(task: &'static str, total: u64, hidden: bool) -> Self {
        Self { task, total, done: 0, started: Instant::now(), hidden, bar: None }
    }

    /// Counts `bytes` more as done.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if self.bar.is_none() && !self.hidden && self.started.elapsed() > SHOWN_AFTER {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}")
                .expect("a template that indicatif takes");
            let bar = ProgressBar::new(self.total).with_style(style).with_message(self.task);
            self.bar = Some(bar.with_elapsed(self.started.elapsed()));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The most handler threads on the command line.
const WORKERS: u64 = 65_535;
const WIDTH_OF_A_FILE: u16 = 120;
const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// Bytes as hexadecimal digits.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_has_its_plural() {
        assert_eq!([0, 1, 2].map(|pages| count(pages, "page")), ["0 pages", "1 page", "2 pages"]);
    }

    #[test]
    fn sizes_and_times_have_few_digits() {
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!((bytes(1), bytes(1023)), ("1 byte".into(), "1023 bytes".into()));
        assert_eq!((bytes(1536), offset(1536), offset(0)), ("1.5 KiB".into(), "1.5 KiB".into(), "0".into()));
        assert_eq!(bytes(1 << 40), "1.0 TiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(nanoseconds(999), "999 ns");
        assert_eq!(nanoseconds(1_500), "1.5 us");
        assert_eq!(nanoseconds(2_500_000), "2.5 ms");
        assert_eq!(nanoseconds(3_210_000_000), "3.21 s");
    }
}
