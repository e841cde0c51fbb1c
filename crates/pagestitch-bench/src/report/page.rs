//! A run as one self-contained HTML page: charts and tables.

use super::chart::{Chart, Line, SHAPES};
use super::columns::COLUMNS;
use super::compare::{Comparison, HEAD};
use super::escaped;
use super::html_table::html_table;
use super::table::notes;
use crate::date::today;
use crate::environment::Environment;
use crate::format::{count, round_count, round_seconds};
use crate::row::{Measured, Row};
use crate::workloads::{BY_THREADS, Curve, THREADS, Workload};
use std::collections::BTreeMap;
use std::fmt::{self, Write};

/// The page. It needs no script, no font and no network. `comparisons`: those with an earlier run.
///
/// # Errors
///
/// If a part cannot be formatted, which is not known to happen.
pub fn page(
    environment: &Environment,
    runs: &[(&Workload, Vec<Measured>)],
    comparisons: &[Comparison],
) -> Result<String, fmt::Error> {
    let mut html =
        format!("{HEAD_BEGIN}{STYLE}{HEAD_END}{SHAPES}<main><header>\n<h1>pagestitch bench</h1>\n");
    let machine = escaped(&environment.to_string());
    write!(html, "<p class=\"machine\">pagestitch {VERSION}, {}. {machine}</p>\n{METHOD}", today())?;
    html += &contents(runs, comparisons);
    html += &meanings()?;
    html += "</header>\n";
    for (workload, measured) in runs {
        html += &section(workload, measured)?;
    }
    html += &comparison(comparisons)?;
    html += "</main></body></html>\n";
    Ok(html)
}

/// Links to the sections.
fn contents(runs: &[(&Workload, Vec<Measured>)], comparisons: &[Comparison]) -> String {
    let names = runs.iter().map(|(workload, _)| workload.name);
    let names = names.chain((!comparisons.is_empty()).then_some(COMPARISON));
    let links: Vec<String> = names.map(|name| format!("<a href=\"#{name}\">{name}</a>")).collect();
    format!("<nav>{}</nav>\n", links.join(" "))
}

/// The meanings of all columns.
fn meanings() -> Result<String, fmt::Error> {
    let mut html = String::from("<details><summary>the columns of the tables</summary><dl>");
    for column in &COLUMNS {
        write!(html, "<dt>{}</dt><dd>{}</dd>", column.head, column.about)?;
    }
    writeln!(html, "<dt>ratio</dt><dd>{RATIO}</dd></dl></details>")?;
    Ok(html)
}

fn section(workload: &Workload, measured: &[Measured]) -> Result<String, fmt::Error> {
    let name = workload.name;
    let mut html = format!("<section id=\"{name}\"><h2>{name}</h2>\n<p>{}</p>\n", escaped(workload.about));
    let rows: Vec<&Row> = measured.iter().map(|measured| &measured.row).collect();
    let Some(first) = rows.first() else {
        return Ok(html + "<p>no complete round</p></section>\n");
    };
    let charts = charts(workload, measured)?;
    if !charts.is_empty() {
        writeln!(html, "<div class=\"charts\">{charts}</div>")?;
    }
    html += &html_table(&rows)?;
    write!(html, "<p class=\"rounds\">medians of {}, interleaved", count(first.rounds, "round"))?;
    for note in notes(workload, &rows) {
        write!(html, "<br>{}", escaped(&note))?;
    }
    html += "</p></section>\n";
    Ok(html)
}

fn charts(workload: &Workload, measured: &[Measured]) -> Result<String, fmt::Error> {
    let mut html = String::new();
    let lines: Vec<Line> = measured.iter().filter_map(percentiles).collect();
    let curves = curves_of(workload, measured);
    // A median alone, of regions for example, is a curve below.
    if !lines.is_empty() && curves.is_empty() {
        html += &latencies(lines).html()?;
    }
    for curve in curves {
        html += &curve_charts(curve, measured)?;
    }
    Ok(html)
}

/// The curves of the workload, or those by threads if there are several numbers of threads.
fn curves_of(workload: &Workload, measured: &[Measured]) -> &'static [Curve] {
    let differ = measured.windows(2).any(|pair| pair[0].row.threads != pair[1].row.threads);
    if workload.curves.is_empty() && differ { &BY_THREADS } else { workload.curves }
}

/// A chart for each group of points that the curve shows.
fn curve_charts(curve: &Curve, measured: &[Measured]) -> Result<String, fmt::Error> {
    let mut html = String::new();
    let shared = measured.iter().find(|measured| measured.row.has_more_threads_than_cpus());
    let x = match shared {
        Some(measured) if curve.x == THREADS => {
            format!("{}; above {} they share a CPU", curve.x, measured.row.cpus)
        }
        _ => curve.x.to_owned(),
    };
    let groups = curves(measured, curve.value).into_iter();
    for (group, lines) in groups.filter(|(group, _)| curve.group.is_none_or(|shown| shown == group)) {
        let title = if group.is_empty() { curve.y.to_owned() } else { format!("{}, {group}", curve.y) };
        let mut x_ticks: Vec<f64> =
            lines.iter().flat_map(|(_, points)| points).map(|point| point.0).collect();
        x_ticks.sort_by(f64::total_cmp);
        x_ticks.dedup();
        let chart =
            Chart { title: &title, x: &x, lines, x_ticks, x_label: round_count, y_label: curve.label };
        html += &chart.html()?;
    }
    Ok(html)
}

fn latencies(lines: Vec<Line>) -> Chart<'static> {
    Chart {
        title: "latency by percentile",
        x: "share of the touches that take no longer",
        lines,
        x_ticks: PERCENTILES.to_vec(),
        x_label: |x| format!("{:.1}", 100.0 - 100.0 / x).trim_end_matches(".0").to_owned() + " %",
        y_label: |ns| round_seconds(ns / 1e9),
    }
}

/// The latencies in nanoseconds by percentile. A percentile is a number x: one touch of x takes
/// longer.
fn percentiles(Measured { row, latencies }: &Measured) -> Option<Line> {
    let latencies = latencies.as_ref().filter(|latencies| !latencies.is_empty())?;
    let at = |x: f64| (x, latencies.value_at_quantile(1.0 - 1.0 / x) as f64);
    let between = PERCENTILES.windows(2).flat_map(|pair| {
        (0..STEPS).map(move |step| pair[0] * (pair[1] / pair[0]).powf(f64::from(step) / f64::from(STEPS)))
    });
    let points = between.chain(PERCENTILES.last().copied()).map(at).collect();
    Some((format!("{}, {}", row.system, row.point).trim_end_matches(", ").to_owned(), points))
}

/// A line for each system. The text behind the number of a point names its group.
type Groups = BTreeMap<String, Vec<Line>>;

fn curves(measured: &[Measured], value: fn(&Row) -> f64) -> Groups {
    let mut groups = Groups::new();
    for Measured { row, .. } in measured {
        let (x, group) = row.point.split_once(' ').unwrap_or((&row.point, ""));
        // A logarithmic axis has no zero.
        let Some(x) = x.parse::<f64>().ok().filter(|&x| x > 0.0) else { continue };
        let lines = groups.entry(group.trim_start_matches("% ").to_owned()).or_default();
        let point = (x, value(row));
        match lines.iter_mut().find(|(system, _)| *system == row.system) {
            Some((_, points)) => points.push(point),
            None => lines.push((row.system.clone(), vec![point])),
        }
    }
    groups
}

/// A section with the comparisons, if there are some.
fn comparison(comparisons: &[Comparison]) -> Result<String, fmt::Error> {
    if comparisons.is_empty() {
        return Ok(String::new());
    }
    let mut html = format!(
        "<section id=\"{COMPARISON}\"><h2>{COMPARISON}</h2>\n<p>Each ratio is to the baseline of its own run.</p>\n\
         <div class=\"scroll\"><table>\n<thead><tr>"
    );
    let class = |column: usize| if column < 3 { "" } else { " class=\"number\"" };
    for (column, head) in HEAD.iter().enumerate() {
        write!(html, "<th scope=\"col\"{}>{head}</th>", class(column))?;
    }
    html += "</tr></thead>\n<tbody>\n";
    for comparison in comparisons {
        html += "<tr>";
        for (column, cell) in comparison.cells().iter().enumerate() {
            write!(html, "<td{}>{}</td>", class(column), escaped(cell))?;
        }
        html += "</tr>\n";
    }
    html += "</tbody></table></div></section>\n";
    Ok(html)
}

/// One touch of 1, 2, 10, 100 and 1000 takes longer: 0, 50, 90, 99 and 99.9 %. Rare longer
/// latencies would squeeze the rest of the chart.
const PERCENTILES: [f64; 5] = [1.0, 2.0, 10.0, 100.0, 1000.0];
/// The points of a line between two of them.
const STEPS: u32 = 40;
const COMPARISON: &str = "comparison";
const HEAD_BEGIN: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><title>pagestitch bench</title>
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<style>
";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const STYLE: &str = include_str!("page.css");
const HEAD_END: &str = "</style></head><body>\n";
const METHOD: &str = "<p>Every system ran once in each round, right after the others, on warmed memory. The ratios are the lasting result: medians of
the ratios to the baseline of the same round. Times hold for this machine at that moment. Both axes of the charts are logarithmic.</p>
";
const RATIO: &str = "the time, or the median latency, divided by that of a baseline: below 1 is faster. The bar reaches to the left if faster,
to the right if slower; half of its width is a factor of eight";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::ALL;

    fn measured(system: &str, point: &str, latencies: bool) -> Measured {
        let mut histogram = crate::touch::histogram();
        (1..2000).for_each(|ns| histogram.saturating_record(ns * 100));
        let (system, point) = (system.to_owned(), point.to_owned());
        let p50_ns = latencies.then_some(100_000);
        let ratios = vec![(String::from("eager"), 0.5)];
        let row = Row { system, point, seconds: 2.0, p50_ns, rounds: 5, pages: 1, ratios, ..Row::default() };
        Measured { row, latencies: latencies.then_some(histogram) }
    }

    fn workload(name: &str) -> &'static Workload {
        ALL.iter().find(|workload| workload.name == name).unwrap()
    }

    #[test]
    fn points_are_grouped_into_curves() {
        let measured = ["1 % random", "5 % random", "1 % clustered"].map(|point| measured("s", point, false));
        let groups = curves(&measured, |row| row.seconds);
        assert_eq!(groups["random"], [(String::from("s"), vec![(1.0, 2.0), (5.0, 2.0)])]);
        assert_eq!(groups["clustered"][0].1, [(1.0, 2.0)]);
    }

    #[test]
    fn a_page_refers_to_no_other_file_and_has_tables_and_both_modes() {
        let comparisons = super::super::compare::compare(&[Row::default()], &[Row::default()]);
        let runs = [
            (workload("latency"), vec![measured("a <system>", "", true)]),
            (
                workload("sparse"),
                vec![measured("pool", "1 % random", false), measured("pool", "5 % random", false)],
            ),
            (workload("scan"), Vec::new()),
        ];
        let html = page(&Environment::current(), &runs, &comparisons).unwrap();
        assert!(html.ends_with("</html>\n") && html.contains("prefers-color-scheme: dark"), "{html}");
        assert_eq!(html.matches("<table>").count(), 3, "latency, sparse, and the comparison");
        assert_eq!(html.matches("<figure>").count(), 2);
        assert!(
            html.contains("a &lt;system&gt;") && !html.contains("<pre") && html.contains("no complete round")
        );
        for foreign in ["src=", "<script", "http:", "https:", "@import", "url("] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        let links = html.matches("href=\"").count();
        assert_eq!(links, html.matches("href=\"#").count(), "links lead into the page");
        for link in html.split("href=\"#").skip(1) {
            let id = link.split('"').next().unwrap();
            assert!(html.contains(&format!("id=\"{id}\"")), "no element {id}");
        }
    }

    #[test]
    fn every_mark_and_label_of_a_percentile_is_there() {
        let (_, points) = percentiles(&measured("s", "", true)).unwrap();
        assert!(points.is_sorted_by_key(|point| point.0) && points.is_sorted_by_key(|point| point.1));
        assert!(PERCENTILES.iter().all(|x| points.iter().any(|point| point.0 == *x)));
        let html = latencies(vec![percentiles(&measured("s", "", true)).unwrap()]).html().unwrap();
        for label in ["0 %", "50 %", "90 %", "99 %", "99.9 %"] {
            assert!(html.contains(&format!(">{label}</text>")), "{label} is not in\n{html}");
        }
    }

    #[test]
    fn an_element_is_closed_as_often_as_it_is_opened() {
        let runs = [(workload("latency"), vec![measured("s", "", true)])];
        let html = page(&Environment::current(), &runs, &[]).unwrap();
        for element in
            ["svg", "g", "figure", "section", "table", "tr", "td", "th", "text", "title", "use", "div"]
        {
            let opened =
                html.matches(&format!("<{element} ")).count() + html.matches(&format!("<{element}>")).count();
            assert_eq!(
                opened,
                html.matches(&format!("</{element}>")).count() + if element == "use" { 1 } else { 0 },
                "{element}"
            );
        }
    }
}
