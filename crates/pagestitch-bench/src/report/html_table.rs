//! The rows of a workload as an HTML table, with a column for each baseline.

use super::columns::{self, Column, Kind};
use super::escaped;
use crate::row::Row;
use std::fmt::{self, Write};

/// A table with a heading for each column, and a bar for each ratio.
pub(super) fn html_table(rows: &[&Row]) -> Result<String, fmt::Error> {
    let (columns, baselines) = (columns::used(rows), baselines(rows));
    let mut html = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for column in &columns {
        write!(html, "<th scope=\"col\"{} title=\"{}\">{}</th>", class(column), column.about, column.head)?;
    }
    for baseline in &baselines {
        write!(html, "<th scope=\"col\" class=\"ratio\">{}</th>", escaped(&baseline.heading()))?;
    }
    html += "</tr></thead>\n<tbody>\n";
    for (index, row) in rows.iter().enumerate() {
        html += if begins_a_group(rows, index) { "<tr class=\"group\">" } else { "<tr>" };
        for column in &columns {
            let text = (column.cell)(row).unwrap_or_default().replace("..", " – ");
            write!(html, "<td{}>{}</td>", class(column), escaped(&text))?;
        }
        for baseline in &baselines {
            write!(html, "<td class=\"ratio\">{}</td>", baseline.cell(row))?;
        }
        html += "</tr>\n";
    }
    html += "</tbody></table></div>\n";
    Ok(html)
}

fn class(column: &Column) -> &'static str {
    match column.kind {
        Kind::Name => "",
        Kind::Number => " class=\"number\"",
        Kind::Detail => " class=\"number detail\"",
    }
}

/// True if a row differs from the one above in the name or point that the rows below share.
fn begins_a_group(rows: &[&Row], index: usize) -> bool {
    let shared = |key: fn(&Row) -> &str| {
        rows.windows(2).any(|pair| key(pair[0]) == key(pair[1]))
            && index.checked_sub(1).is_some_and(|above| key(rows[above]) != key(rows[index]))
    };
    shared(|row| &row.point) || shared(|row| &row.system)
}

/// A baseline of some rows.
#[derive(Debug, PartialEq, Eq)]
enum Baseline {
    /// Another system.
    Other(String),
    /// The system of the row at another point.
    Itself,
}

impl Baseline {
    fn of(row: &Row, name: &str) -> Self {
        let point = name.strip_prefix(row.system.as_str());
        let itself = point.is_some_and(|point| point.starts_with(' '));
        if itself { Self::Itself } else { Self::Other(name.to_owned()) }
    }

    fn heading(&self) -> String {
        match self {
            Self::Other(name) => format!("ratio to {name}"),
            Self::Itself => String::from("ratio to itself"),
        }
    }

    /// The ratio of a row to this baseline, if it has one.
    fn cell(&self, row: &Row) -> String {
        if matches!(self, Self::Other(name) if *name == row.system) {
            return String::from("<small>baseline</small>");
        }
        let ratio = others(row).find(|(name, _)| Self::of(row, name) == *self);
        let Some((name, ratio)) = ratio else { return String::new() };
        let at = match self {
            Self::Other(_) => String::new(),
            Self::Itself => format!(" <small>at {}</small>", escaped(name[row.system.len()..].trim_start())),
        };
        format!("<span>{ratio:.2}</span>{}{at}", bar(*ratio))
    }
}

/// The ratios of a row, without the one to itself, which is 1.
fn others(row: &Row) -> impl Iterator<Item = &(String, f64)> {
    row.ratios.iter().filter(|(name, _)| *name != row.system)
}

/// The baselines of all rows, in their order.
fn baselines(rows: &[&Row]) -> Vec<Baseline> {
    let mut all = Vec::new();
    for (row, (name, _)) in rows.iter().flat_map(|row| others(row).map(move |ratio| (row, ratio))) {
        let baseline = Baseline::of(row, name);
        if !all.contains(&baseline) {
            all.push(baseline);
        }
    }
    all
}

/// A bar from the middle: to the left if faster than the baseline, to the right if slower. Half of
/// the width is a factor of eight.
fn bar(ratio: f64) -> String {
    let length = ratio.max(f64::MIN_POSITIVE).log2().clamp(-3.0, 3.0);
    let class = if length < 0.0 { "faster" } else { "slower" };
    format!(
        "<svg class=\"bar {class}\" viewBox=\"-3 0 6 1\" preserveAspectRatio=\"none\"><path d=\"M0 0H{length:.1}V1H0z\"/></svg>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: &str, point: &str, ratios: &[(&str, f64)]) -> Row {
        let ratios = ratios.iter().map(|&(name, ratio)| (name.to_owned(), ratio)).collect();
        Row { system: system.to_owned(), point: point.to_owned(), ratios, ..Row::default() }
    }

    #[test]
    fn each_baseline_has_a_column_and_each_ratio_a_bar() {
        let rows = [
            row("lazy <1>", "5 %", &[("eager", 0.25), ("plain", 3.0)]),
            row("eager", "5 %", &[("eager", 1.0), ("plain", 2.0)]),
            row("plain", "5 %", &[("eager", 0.5), ("plain", 1.0)]),
        ];
        let html = html_table(&rows.iter().collect::<Vec<_>>()).unwrap();
        assert!(html.contains(">ratio to eager</th>") && html.contains(">ratio to plain</th>"), "{html}");
        assert!(html.contains("lazy &lt;1&gt;"), "{html}");
        assert_eq!(
            (html.matches("bar faster").count(), html.matches("bar slower").count()),
            (2, 2),
            "{html}"
        );
        let cells = |part: &str| part.matches("<td").count() + part.matches("<th scope").count();
        assert!(html.lines().filter(|line| cells(line) > 0).all(|line| cells(line) == 8), "{html}");
    }

    #[test]
    fn a_system_that_is_its_own_baseline_names_the_point() {
        let rows = [row("a", "1", &[("a", 1.0), ("a, more", 1.0)]), row("a", "10", &[("a 1", 2.0)])];
        let html = html_table(&rows.iter().collect::<Vec<_>>()).unwrap();
        assert!(html.contains(">ratio to itself</th>") && html.contains("<small>at 1</small>"), "{html}");
        assert!(
            html.contains(">ratio to a, more</th>"),
            "a name that begins alike is another system: {html}"
        );
    }

    #[test]
    fn rows_of_one_point_or_of_one_system_are_a_group() {
        let begins = |rows: &[(&str, &str)]| -> Vec<bool> {
            let rows: Vec<Row> = rows.iter().map(|(system, point)| row(system, point, &[])).collect();
            let rows: Vec<&Row> = rows.iter().collect();
            (0..rows.len()).map(|index| begins_a_group(&rows, index)).collect()
        };
        assert_eq!(begins(&[("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]), [false, false, true, false]);
        assert_eq!(begins(&[("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]), [false, false, true, false]);
        assert_eq!(begins(&[("a", ""), ("b", ""), ("c", "")]), [false; 3]);
    }
}
