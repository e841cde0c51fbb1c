//! A run as one self-contained HTML page: tables, distributions, curves.

use super::chart::Chart;
use super::table::table;
use crate::environment::Environment;
use crate::format::seconds;
use crate::row::{Measured, Row};
use crate::workloads::Workload;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;

/// The page. It needs no script, no font and no network.
///
/// # Errors
///
/// If a chart cannot be drawn, which is not known to happen.
pub fn page(
    environment: &Environment,
    runs: &[(&Workload, Vec<Measured>)],
) -> Result<String, Box<dyn Error>> {
    let mut html = String::from(HEAD);
    write!(html, "<p class=\"machine\">{}</p>", escaped(&environment.to_string()))?;
    for (workload, measured) in runs {
        write!(html, "<h2>{}</h2><p>{}</p>", workload.name, escaped(workload.about))?;
        let text = table(workload, measured);
        // The first lines of the table repeat the heading.
        let body: Vec<&str> = text.trim_start().lines().skip(1).collect();
        write!(html, "<pre>{}</pre>", escaped(&body.join("\n")))?;
        for svg in charts(workload, measured)? {
            write!(html, "<figure>{svg}</figure>")?;
        }
    }
    html += "</main></body></html>\n";
    Ok(html)
}

fn charts(workload: &Workload, measured: &[Measured]) -> Result<Vec<String>, Box<dyn Error>> {
    let mut charts = Vec::new();
    let distributions: Vec<_> = measured.iter().filter_map(distribution).collect();
    if !distributions.is_empty() {
        let chart = Chart {
            title: "Share of touches by latency",
            x: "latency",
            y: "share of the touches",
            lines: distributions,
            x_label: |ns| seconds(ns / 1e9),
            y_label: |share| format!("{:.0} %", share * 100.0),
            y_logarithmic: false,
        };
        charts.push(chart.svg()?);
    }
    let Some(curve) = &workload.curve else { return Ok(charts) };
    for (group, lines) in curves(measured, curve.value) {
        let title = if group.is_empty() { curve.y.to_owned() } else { format!("{}, {group}", curve.y) };
        let chart = Chart {
            title: &title,
            x: curve.x,
            y: curve.y,
            lines,
            x_label: |x| format!("{x}"),
            y_label: curve.label,
            y_logarithmic: true,
        };
        charts.push(chart.svg()?);
    }
    Ok(charts)
}

/// The share of touches by latency, up to the 99.9th percentile. Rare longer latencies would
/// squeeze the rest of the chart.
fn distribution(Measured { row, latencies }: &Measured) -> Option<(String, Vec<(f64, f64)>)> {
    let latencies = latencies.as_ref()?;
    let shares = (1..=199).map(|step| f64::from(step) / 200.0).chain([0.999]);
    let points = shares.map(|share| (latencies.value_at_quantile(share) as f64, share)).collect();
    Some((format!("{} {}", row.system, row.point).trim_end().to_owned(), points))
}

/// A line for each system. The text behind the number of a point names its group.
type Groups = BTreeMap<String, Vec<(String, Vec<(f64, f64)>)>>;

fn curves(measured: &[Measured], value: fn(&Row) -> f64) -> Groups {
    let mut groups = Groups::new();
    for Measured { row, .. } in measured {
        let (x, group) = row.point.split_once(' ').unwrap_or((&row.point, ""));
        let Ok(x) = x.parse::<f64>() else { continue };
        let lines = groups.entry(group.trim_start_matches("% ").to_owned()).or_default();
        let point = (x, value(row));
        match lines.iter_mut().find(|(system, _)| *system == row.system) {
            Some((_, points)) => points.push(point),
            None => lines.push((row.system.clone(), vec![point])),
        }
    }
    groups
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const HEAD: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><title>pagestitch bench</title>
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 }
main { max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
pre { background: #f7f7f7; padding: .8rem; overflow-x: auto; font-size: 12.5px; line-height: 1.45 }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
.machine { color: #666 }
</style></head><body><main>
<h1>pagestitch bench</h1>
<p>Every system ran once in each round, right after the others, on warmed memory. The ratios are the lasting result: medians of
the ratios to the baseline of the same round. Times hold for this machine at that moment.</p>
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::ALL;

    #[test]
    fn points_are_grouped_into_curves() {
        let measured = ["1 % random", "5 % random", "1 % clustered"].map(|point| Measured {
            row: Row { point: point.to_owned(), system: String::from("s"), seconds: 2.0, ..Row::default() },
            latencies: None,
        });
        let groups = curves(&measured, |row| row.seconds);
        assert_eq!(groups["random"], [(String::from("s"), vec![(1.0, 2.0), (5.0, 2.0)])]);
        assert_eq!(groups["clustered"][0].1, [(1.0, 2.0)]);
    }

    #[test]
    fn a_page_refers_to_no_other_file() {
        let mut latencies = crate::touch::histogram();
        (1..1000).for_each(|ns| latencies.saturating_record(ns * 100));
        let row = Row { system: String::from("a <system>"), p50_ns: Some(5), rounds: 5, ..Row::default() };
        let runs = [(&ALL[0], vec![Measured { row, latencies: Some(latencies) }])];
        let html = page(&Environment::current(), &runs).unwrap();
        assert!(html.contains("<svg") && html.ends_with("</html>\n"), "{html}");
        assert!(!html.contains("src=") && !html.contains("<script") && !html.contains("href="), "{html}");
    }
}
