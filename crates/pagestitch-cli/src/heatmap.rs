//! A map of a region as an SVG picture.

use crate::files;
use pagestitch::{Coverage, Meter};
use std::path::Path;

pub(crate) fn write(path: &Path, meter: &Meter) -> Result<(), String> {
    files::write(path, heatmap(meter).as_bytes())
}

/// Draws the map of a region as an SVG picture that needs no other file.
fn heatmap(meter: &Meter) -> String {
    let parts = meter.coverage(COLUMNS * ROWS);
    let rows = parts.len().div_ceil(COLUMNS);
    let (width, height) = (COLUMNS * SIDE, rows * SIDE + 24);
    let all = meter.coverage(1).first().copied().unwrap_or_default();
    let title =
        format!("{}: {} of {} pages present, {} lost", meter.region(), all.present, all.pages, all.poisoned);
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"4\" y=\"16\">{title}</text>\n"
    );
    for (index, part) in parts.iter().enumerate() {
        let (x, y) = (index % COLUMNS * SIDE, index / COLUMNS * SIDE + 24);
        let fill = match part {
            Coverage { poisoned: 1.., .. } => String::from("#d62728"),
            Coverage { present: 0, .. } => String::from("#eee"),
            Coverage { present, pages, .. } => {
                // From light to dark, so that a few present pages are visible.
                format!("hsl(140,60%,{}%)", 80 - 50 * present / pages.max(&1))
            }
        };
        let side = SIDE - 1;
        svg += &format!("<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\"/>\n");
    }
    svg + "</svg>\n"
}

const COLUMNS: usize = 128;
const ROWS: usize = 64;
const SIDE: usize = 8;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use pagestitch::{Chunk, Pool, Region};
    use pagestitch_testkit::scripted::Scripted;
    use std::sync::Arc;

    /// A region whose first half is present, with one poisoned page.
    pub(crate) fn half_present() -> Region {
        let source = Scripted::new(400 * 4096).failing(300 * 4096..301 * 4096);
        let builder = Region::builder().name("a <b>").chunk(Chunk::source(Arc::new(source))).record_latency();
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        region.populate(0..200 * 4096).unwrap();
        region.populate(300 * 4096..301 * 4096).unwrap_err();
        region
    }

    #[test]
    fn a_heat_map_has_a_cell_for_each_part_and_an_escaped_title() {
        let svg = heatmap(&half_present().meter());
        assert_eq!(svg.matches("<rect x=").count(), 400);
        assert_eq!(svg.matches("#d62728").count(), 1);
        assert_eq!(svg.matches("#eee").count(), 199);
        assert!(svg.contains("a &lt;b>: 200 of 400 pages present, 1 lost"));
    }
}
