//! A line chart as SVG.

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, LineSeries, PathElement, RGBColor, Ranged,
    SVGBackend, SeriesLabelPosition, WHITE,
};
use std::error::Error;
use std::ops::Range;

/// The content of a chart. The points of a line are in the order of their `x`.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) lines: Vec<(String, Vec<(f64, f64)>)>,
    /// Formats a value of the horizontal axis, which is logarithmic.
    pub(super) x_label: fn(f64) -> String,
    /// Formats a value of the vertical axis.
    pub(super) y_label: fn(f64) -> String,
    pub(super) y_logarithmic: bool,
}

impl Chart<'_> {
    /// The chart as an `<svg>` element.
    pub(super) fn svg(&self) -> Result<String, Box<dyn Error>> {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let x = range(points().map(|point| point.0));
        let y = range(points().map(|point| point.1));
        let mut svg = String::new();
        if self.y_logarithmic {
            self.draw(&mut svg, x, (y.start * 0.8..y.end * 1.25).log_scale())?;
        } else {
            self.draw(&mut svg, x, 0.0..y.end * 1.02)?;
        }
        Ok(svg)
    }

    fn draw<Y>(&self, svg: &mut String, x: Range<f64>, y: Y) -> Result<(), Box<dyn Error>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(x.log_scale(), y)?;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(245, 245, 245))
            .bold_line_style(RGBColor(225, 225, 225))
            .x_labels(if self.y_logarithmic { 12 } else { 8 })
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| (self.x_label)(*value))
            .y_label_formatter(&|value| (self.y_label)(*value))
            .label_style(("sans-serif", 12))
            .draw()?;
        for ((name, points), color) in self.lines.iter().zip(COLORS.iter().cycle()) {
            let style = color.stroke_width(2);
            let line = chart.draw_series(
                LineSeries::new(points.iter().copied(), style).point_size(if points.len() < 20 {
                    2
                } else {
                    0
                }),
            )?;
            line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .label_font(("sans-serif", 12))
            .draw()?;
        area.present()?;
        Ok(())
    }
}

fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::MAX, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    // The two ends of an axis must differ.
    if low < high { low..high } else { low * 0.5..low * 2.0 }
}

const SIZE: (u32, u32) = (760, 420);
/// Colours that differ for colour-blind readers, too.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];
