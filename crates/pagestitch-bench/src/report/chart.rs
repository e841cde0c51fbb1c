//! A line chart as HTML with an inline SVG.
//!
//! ```text
//!   ┌ figure ──────────────────────────────────┐
//!   │ title                                    │
//!   │ ── one system   ╌╌ another   ┄┄ a third  │  the legend: text that wraps, beside no line
//!   │ 1 ms ┤    ╭──                            │  the plot: as wide as the page; its lines are
//!   │ 1 us ┼──╯─────────────                   │  stretched, its text is not
//!   │      1      10     100  x                │
//!   └──────────────────────────────────────────┘
//! ```

use super::axis::{Axis, Room, Shown, Tick};
use super::escaped;
use std::fmt::{self, Write};

/// The content of a chart. Both axes are logarithmic.
pub(super) struct Chart<'a> {
    /// The title, which names the quantity of the vertical axis.
    pub(super) title: &'a str,
    /// The quantity of the horizontal axis.
    pub(super) x: &'a str,
    pub(super) lines: Vec<Line>,
    /// The ticks of the horizontal axis, in ascending order. A point of a line at one of them has a
    /// mark.
    pub(super) x_ticks: Vec<f64>,
    pub(super) x_label: fn(f64) -> String,
    pub(super) y_label: fn(f64) -> String,
}

/// A named line. Its points are in the order of their `x`.
pub(super) type Line = (String, Vec<(f64, f64)>);

impl Chart<'_> {
    /// The chart as a `<figure>` element, or nothing if no value is above zero.
    pub(super) fn html(&self) -> Result<String, fmt::Error> {
        let values: Vec<f64> =
            self.lines.iter().flat_map(|(_, points)| points).map(|point| point.1).collect();
        let values: Vec<f64> = values.into_iter().filter(|&value| value > 0.0).collect();
        if values.is_empty() || self.x_ticks.is_empty() {
            return Ok(String::new());
        }
        let x = Axis::at(&self.x_ticks, self.x_label, &ROOM_ACROSS);
        let y = Axis::around(&values, self.y_label, &ROOM_UP);
        let mut html = String::new();
        write!(html, "<figure><figcaption>{}</figcaption>\n<ul class=\"legend\">", escaped(self.title))?;
        for (index, (name, _)) in self.lines.iter().enumerate() {
            html += &key(index, name);
        }
        write!(html, "</ul>\n<div class=\"plot\">")?;
        writeln!(
            html,
            "<svg width=\"100%\" height=\"{HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escaped(self.title)
        )?;
        html += &grid(&x, &y);
        self.draw_lines(&mut html, &x, &y)?;
        self.draw_marks(&mut html, &x, &y)?;
        writeln!(html, "</svg></div>\n<div class=\"x\">{}</div></figure>", escaped(self.x))?;
        Ok(html)
    }

    /// The lines, in a coordinate system that is stretched to the size of the plot.
    fn draw_lines(&self, html: &mut String, x: &Axis, y: &Axis) -> fmt::Result {
        writeln!(html, "<svg viewBox=\"0 0 {UNITS} {UNITS}\" preserveAspectRatio=\"none\">")?;
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let points = points.iter().filter(|point| point.1 > 0.0);
            let points =
                points.map(|point| (x.position(point.0) * UNITS, (1.0 - y.position(point.1)) * UNITS));
            let path: Vec<String> = points.map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
            let (style, name, path) = (style(index), escaped(name), path.join(" "));
            // A wide invisible line shows the name while the pointer is near.
            writeln!(
                html,
                "<g class=\"{style}\"><title>{name}</title><path class=\"near\" d=\"M{path}\"/><path d=\"M{path}\"/></g>"
            )?;
        }
        writeln!(html, "</svg>")
    }

    /// A mark at each tick, with its values.
    fn draw_marks(&self, html: &mut String, x: &Axis, y: &Axis) -> fmt::Result {
        for (index, (name, points)) in self.lines.iter().enumerate() {
            write!(html, "<g class=\"marks {}\">", style(index))?;
            for &(at, value) in points.iter().filter(|point| point.1 > 0.0 && self.x_ticks.contains(&point.0))
            {
                write!(
                    html,
                    "<use href=\"#m{}\" x=\"{}\" y=\"{}\"><title>{}, {}: {}</title></use>",
                    index % MARKS,
                    percent(x.position(at)),
                    percent(1.0 - y.position(value)),
                    escaped(name),
                    escaped(&(self.x_label)(at)),
                    escaped(&(self.y_label)(value)),
                )?;
            }
            writeln!(html, "</g>")?;
        }
        Ok(())
    }
}

/// The entry of a line in the legend.
fn key(index: usize, name: &str) -> String {
    format!(
        "<li class=\"{}\"><svg width=\"34\" height=\"12\"><path d=\"M1 6h32\"/><use href=\"#m{}\" x=\"17\" y=\"6\"/></svg>{}</li>",
        style(index),
        index % MARKS,
        escaped(name)
    )
}

/// Colour, dashes and mark tell lines apart, because a reader may see no colours.
fn style(index: usize) -> String {
    format!("c{} d{}", index % COLORS, index % DASHES)
}

/// The lines and labels of both axes.
fn grid(x: &Axis, y: &Axis) -> String {
    let mut svg = String::from("<g class=\"grid\">");
    let class = |tick: &Tick| if tick.shown == Shown::InWideCharts { " class=\"wide\"" } else { "" };
    for tick in &x.ticks {
        let at = percent(tick.at);
        svg += &format!("<line x1=\"{at}\" x2=\"{at}\" y2=\"100%\"/>");
        if tick.shown != Shown::Never {
            let label = escaped(&tick.label);
            svg += &format!(
                "<text x=\"{at}\" y=\"100%\" dy=\"1.4em\" text-anchor=\"middle\"{}>{label}</text>",
                class(tick)
            );
        }
    }
    for tick in &y.ticks {
        let at = percent(1.0 - tick.at);
        svg += &format!("<line x2=\"100%\" y1=\"{at}\" y2=\"{at}\"/>");
        if tick.shown != Shown::Never {
            let label = escaped(&tick.label);
            svg += &format!("<text x=\"-8\" y=\"{at}\" dy=\".35em\" text-anchor=\"end\">{label}</text>");
        }
    }
    svg + "</g>\n"
}

fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

/// The shapes of marks, which a page has once.
pub(super) const SHAPES: &str = "<svg width=\"0\" height=\"0\" class=\"shapes\"><defs>\
    <circle id=\"m0\" r=\"3.5\"/><rect id=\"m1\" x=\"-3\" y=\"-3\" width=\"6\" height=\"6\"/>\
    <path id=\"m2\" d=\"M0-4.5 4.2 3H-4.2z\"/><path id=\"m3\" d=\"M0-4.5 4.5 0 0 4.5-4.5 0z\"/>\
    <path id=\"m4\" d=\"M0 4.5 4.2-3H-4.2z\"/></defs></svg>\n";

const HEIGHT: f64 = 320.0;
/// The side of the stretched square in which lines are drawn.
const UNITS: f64 = 1000.0;
/// The number of colours, of patterns of dashes, and of shapes in the style sheet and in `SHAPES`.
/// They have no common factor, so that two lines differ.
const COLORS: usize = 7;
const DASHES: usize = 4;
const MARKS: usize = 5;
/// A wide chart is one above 600 pixels: see the style sheet. The labels at its left take 76.
const ROOM_ACROSS: Room =
    Room { wide: 500.0, narrow: 220.0, of_label: |label| 10.0 + 7.0 * label.chars().count() as f64 };
const ROOM_UP: Room = Room { wide: HEIGHT, narrow: HEIGHT, of_label: |_| 17.0 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_names_every_line_and_both_axes() {
        let line =
            |name: &str, by: f64| (name.to_owned(), vec![(1.0, 2.0 * by), (2.0, 0.0), (4.0, 3.0 * by)]);
        let chart = Chart {
            title: "a <title>",
            x: "the x",
            lines: vec![line("one & only", 1.0), line("other", 10.0)],
            x_ticks: vec![1.0, 2.0, 4.0],
            x_label: |x| format!("x{x}"),
            y_label: |y| format!("y{y}"),
        };
        let html = chart.html().unwrap();
        for part in
            ["a &lt;title&gt;", "the x", "one &amp; only</li>", "other</li>", ">x1<", ">x4<", ">y2<", ">y50<"]
        {
            assert!(html.contains(part), "{part} is not in\n{html}");
        }
        assert!(html.contains("<title>other, x4: y30</title>"), "{html}");
        assert_eq!(html.matches("<use").count(), 2 + 4, "a key each, and a mark for each value above zero");
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        let empty = Chart { lines: vec![(String::from("none"), vec![(1.0, 0.0)])], ..chart };
        assert_eq!(empty.html().unwrap(), "");
    }
}
