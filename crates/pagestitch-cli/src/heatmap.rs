//! A map of a region as an SVG picture: a cell for each part of the region, with offsets at the
//! rows, a legend, and the counts of a group of cells while the pointer is over it.

use crate::density::Density;
use crate::files;
use crate::output::{bytes, count, offset};
use pagestitch::{Coverage, Meter, Support};
use std::path::Path;

pub(crate) fn write(path: &Path, meter: &Meter) -> Result<(), String> {
    files::write(path, heatmap(meter).as_bytes())
}

/// Draws the map of a region as an SVG picture that needs no other file.
fn heatmap(meter: &Meter) -> String {
    let page = Support::current().page_size().bytes() as u64;
    Map::new(meter.coverage(MOST_CELLS), page).svg(meter.region())
}

/// The cells of a map, row by row.
struct Map {
    cells: Vec<Coverage>,
    /// The first page of each cell.
    starts: Vec<u64>,
    columns: usize,
    /// The side of a cell with the gap after it.
    side: usize,
    page: u64,
}

impl Map {
    fn new(cells: Vec<Coverage>, page: u64) -> Self {
        let ends = cells.iter().scan(0, |end, cell| {
            *end += cell.pages;
            Some(*end)
        });
        let starts = std::iter::once(0).chain(ends).take(cells.len()).collect();
        // Few cells are drawn larger.
        let columns = if cells.len() <= MOST_CELLS / 4 { COLUMNS / 2 } else { COLUMNS };
        Self { cells, starts, columns, side: WIDTH / columns, page }
    }

    fn svg(&self, name: &str) -> String {
        let height = TOP + self.rows() * self.side + MARGIN;
        let name = escaped(name);
        let (width, about) = (LEFT + WIDTH + MARGIN, self.about());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\">\n\
             <style>{STYLE}.cells path {{ stroke-width: {cell}; stroke-dasharray: {cell} 1 }}</style>\n\
             <text x=\"{MARGIN}\" y=\"24\" class=\"name\">{name}</text>\n<text x=\"{MARGIN}\" y=\"44\">{about}</text>\n\
             {legend}<g class=\"offsets\">{offsets}</g>\n<g class=\"cells\">{cells}</g>\n<g class=\"counts\">{counts}</g>\n</svg>\n",
            cell = self.side - 1,
            legend = self.legend(),
            offsets = self.offsets(),
            cells = self.drawn(),
            counts = self.counts(),
        )
    }

    fn rows(&self) -> usize {
        self.cells.len().div_ceil(self.columns)
    }

    /// The counts of the whole region, and the scale of the map.
    fn about(&self) -> String {
        let all = sum(&self.cells);
        let largest = self.cells.iter().map(|cell| cell.pages).max().unwrap_or(0);
        let share = all.present as f64 * 100.0 / all.pages.max(1) as f64;
        let columns = self.columns as u64;
        format!(
            "{} in {}: {} present ({share:.1} %), {} lost{}. A cell is {}, a row {}.",
            bytes(all.pages * self.page),
            count(all.pages as usize, "page"),
            all.present,
            all.poisoned,
            left(&all),
            bytes(largest * self.page),
            bytes(largest * columns * self.page),
        )
    }

    fn legend(&self) -> String {
        let mut x = LEFT;
        let mut svg = String::from("<g class=\"legend\">");
        for density in Density::possible(&self.cells) {
            let (class, name) = (class(density), density.name());
            svg += &format!("<path class=\"key {class}\" d=\"{}\"/>", mark(density, x, 58, 1, KEY + 1));
            svg += &format!("<text x=\"{}\" y=\"69\">{name}</text>", x + KEY + 6);
            x += KEY + 20 + name.len() * LETTER;
        }
        svg + "</g>\n"
    }

    /// The offset of a row, at as many rows as have room for it.
    fn offsets(&self) -> String {
        let step = LINE.div_ceil(self.side).next_power_of_two();
        let labels = (0..self.rows()).step_by(step).map(|row| {
            let offset = offset(self.starts[row * self.columns] * self.page);
            let y = TOP + row * self.side + self.side / 2;
            format!("<text x=\"{}\" y=\"{y}\" dy=\".35em\">{offset}</text>", LEFT - 8)
        });
        labels.collect()
    }

    /// The cells, as a path for each density: the runs of its cells in all rows.
    fn drawn(&self) -> String {
        let mut paths = [const { String::new() }; Density::EACH.len()];
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            let mut column = 0;
            for run in cells.chunk_by(|a, b| Density::of(a) == Density::of(b)) {
                let density = Density::of(&run[0]);
                let (x, y) = (LEFT + column * self.side, TOP + row * self.side);
                paths[density as usize] += &mark(density, x, y, run.len(), self.side);
                if density == Density::Lost {
                    // The crosses stand on cells.
                    paths[Density::None as usize] += &mark(Density::None, x, y, run.len(), self.side);
                }
                column += run.len();
            }
        }
        let paths = Density::EACH.iter().zip(paths).filter(|(_, path)| !path.is_empty());
        paths.map(|(&density, path)| format!("<path class=\"{}\" d=\"{path}\"/>\n", class(density))).collect()
    }

    /// The counts of groups of cells, which a browser shows while the pointer is over a group.
    /// Neighbours that are all absent or all present are one group.
    fn counts(&self) -> String {
        let mut svg = String::new();
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            let groups: Vec<&[Coverage]> = cells.chunks(GROUP).collect();
            let mut column = 0;
            for same in groups.chunk_by(|a, b| uniform(a).is_some() && uniform(a) == uniform(b)) {
                let length = same.iter().map(|group| group.len()).sum::<usize>();
                svg += &self.count(row, column, length);
                column += length;
            }
        }
        svg
    }

    fn count(&self, row: usize, column: usize, length: usize) -> String {
        let first = row * self.columns + column;
        let all = sum(&self.cells[first..first + length]);
        let [start, end] = [0, all.pages].map(|pages| (self.starts[first] + pages) * self.page);
        let lost = if all.poisoned > 0 { format!(", {} lost", all.poisoned) } else { String::new() };
        let left = left(&all);
        let (x, y) = (LEFT + column * self.side, TOP + row * self.side);
        format!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\"><title>{start:#x}..{end:#x} ({}): {} of {} present{lost}{left}</title></rect>\n",
            length * self.side - 1,
            self.side - 1,
            offset(start),
            all.present,
            count(all.pages as usize, "page"),
        )
    }
}

/// A run of cells at a position: a dashed line, or a cross in each cell for a lost page, because
/// the reader may see no colours.
fn mark(density: Density, x: usize, y: usize, cells: usize, side: usize) -> String {
    let cell = side - 1;
    if density != Density::Lost {
        return format!("M{x} {}h{}", y as f64 + cell as f64 / 2.0, cells * side);
    }
    let cross = |column| format!("M{} {y}l{cell} {cell}m0-{cell}l-{cell} {cell}", x + column * side);
    (0..cells).map(cross).collect()
}

fn sum(cells: &[Coverage]) -> Coverage {
    cells.iter().fold(Coverage::default(), |mut all, cell| {
        all.pages += cell.pages;
        all.present += cell.present;
        all.poisoned += cell.poisoned;
        all.evicted += cell.evicted;
        all.returned += cell.returned;
        all
    })
}

/// The counts of pages that have left, if there are some.
fn left(part: &Coverage) -> String {
    match (part.evicted, part.returned) {
        (0, 0) => String::new(),
        (evicted, returned) => format!(", {evicted} evicted, {returned} back"),
    }
}

/// The density of cells that are all absent or all present.
fn uniform(cells: &[Coverage]) -> Option<Density> {
    let density = Density::of(&sum(cells));
    matches!(density, Density::None | Density::All).then_some(density)
}

const fn class(density: Density) -> &'static str {
    match density {
        Density::None => "none",
        Density::Few => "few",
        Density::Some => "some",
        Density::Most => "most",
        Density::All => "all",
        Density::Evicted => "evicted",
        Density::Returned => "returned",
        Density::Lost => "lost",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const COLUMNS: usize = 128;
const MOST_CELLS: usize = COLUMNS * 64;
/// The cells of a group that shows its counts.
const GROUP: usize = 8;
/// The sizes of the picture, in pixels at its natural size: all cells of a row, the offsets at
/// their left, the lines above them, the margins, a cell of the legend, a line, a letter.
const WIDTH: usize = COLUMNS * 7;
const LEFT: usize = 88;
const TOP: usize = 88;
const MARGIN: usize = 16;
const KEY: usize = 14;
const LINE: usize = 16;
const LETTER: usize = 7;
const STYLE: &str = "
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; background: #fff }
text { fill: #1f2328 } .name { font-size: 15px; font-weight: 600 }
.offsets text { text-anchor: end; fill: #59636e }
.cells path, .key { fill: none } .key { stroke-width: 13 }
.none { stroke: #e4e8ec } .few { stroke: #a6dcb5 } .some { stroke: #56b870 } .most { stroke: #1f8a43 } .all { stroke: #0b4f23 }
.evicted { stroke: #e3a008 } .returned { stroke: #5b5bd6 }
.cells .lost, .key.lost { stroke: #cf222e; stroke-width: 2; stroke-dasharray: none }
.counts rect { fill: transparent } .counts rect:hover { stroke: #0969da; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 } text { fill: #e6edf3 } .offsets text { fill: #9198a1 }
.none { stroke: #2d333b } .few { stroke: #14532d } .some { stroke: #1f7a3f } .most { stroke: #3fb85f } .all { stroke: #aff5b9 }
.evicted { stroke: #b8860b } .returned { stroke: #8b8bff }
.cells .lost, .key.lost { stroke: #ff6a63 }
}
";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::density::tests::{left, part};
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

    /// Parts of a region of a number of pages each, of which every part has some.
    fn parts(parts: usize, pages: u64, present: impl Fn(usize) -> u64) -> Vec<Coverage> {
        (0..parts).map(|each| part(present(each).min(pages), pages, 0)).collect()
    }

    #[test]
    fn a_heat_map_has_a_legend_offsets_counts_and_an_escaped_name() {
        let svg = heatmap(&half_present().meter());
        for part in [
            ">a &lt;b&gt;</text>",
            "1.6 MiB in 400 pages: 200 present (50.0 %), 1 lost. A cell is 4.0 KiB, a row 256.0 KiB.",
            ">0</text>",
            ">512.0 KiB</text>",
            "<title>0x0..0x40000 (0): 64 of 64 pages present</title>",
            "<title>0x128000..0x130000 (1.2 MiB): 0 of 8 pages present, 1 lost</title>",
            "viewBox=\"0 0 1000 ",
            "prefers-color-scheme: dark",
        ] {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
        assert_eq!(svg.matches("class=\"key ").count(), 3, "absent, present, lost");
        let lost = svg.split("<path class=\"lost\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(lost, "M704 144l13 13m0-13l-13 13", "a cross at column 44 of row 4");
    }

    #[test]
    fn pages_that_have_left_and_come_back_have_cells_counts_and_a_legend() {
        let mut cells = parts(3, 1, |_| 0);
        cells[0] = left(cells[0], 1, 0);
        cells[1] = left(part(1, 1, 0), 0, 1);
        let svg = Map::new(cells, 4096).svg("name");
        for part in [
            "1 present (33.3 %), 0 lost, 1 evicted, 1 back. A cell is",
            "<title>0x0..0x3000 (0): 1 of 3 pages present, 1 evicted, 1 back</title>",
            "<path class=\"evicted\" d=\"M88 ",
            "<path class=\"returned\" d=\"M102 ",
            ">mostly evicted</text>",
            ">mostly back</text>",
        ] {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
        assert!(!heatmap(&half_present().meter()).contains("class=\"key evicted\""), "without a budget");
    }

    #[test]
    fn every_density_of_a_map_is_in_its_legend() {
        let mut cells = parts(600, 500, |part| [0, 1, 200, 400, 500][part % 5]);
        cells[0] = left(cells[0], 1, 0);
        cells[1] = left(cells[1], 1, 1);
        let map = Map::new(cells, 4096);
        let svg = map.svg("name");
        for density in Density::EACH {
            let class = class(density);
            assert!(svg.contains(&format!("class=\"key {class}\"")), "{class}");
            assert!(svg.contains(&format!(".{class} {{")), "the style sheet has {class}");
            assert_eq!(
                svg.contains(&format!("<path class=\"{class}\" ")),
                density != Density::Lost,
                "{class}"
            );
        }
    }

    #[test]
    fn the_counts_cover_each_page_once() {
        for cells in [1, 7, 64, 65, 2048, 2049, 8192] {
            let map = Map::new(parts(cells, 3, |part| part as u64 % 4), 4096);
            let counts = map.counts();
            let mut end = 0;
            for title in counts.split("<title>").skip(1) {
                let range = title.split(' ').next().unwrap();
                let [from, to] = range
                    .split("..")
                    .map(|at| usize::from_str_radix(&at[2..], 16).unwrap())
                    .collect::<Vec<_>>()[..]
                else {
                    panic!("{range}")
                };
                assert_eq!(from, end, "{cells} cells: a group begins where the one before ends");
                end = to;
            }
            assert_eq!(end, cells * 3 * 4096);
        }
    }

    #[test]
    fn the_offsets_and_the_legend_do_not_overlap() {
        for cells in [1, 2048, 2049, 8192] {
            let has_left = parts(cells, 500, |_| 1).into_iter().map(|cell| left(cell, 1, 1)).collect();
            let map = Map::new(has_left, 4096);
            let offsets = map.offsets();
            let rows: Vec<usize> = offsets
                .split(" y=\"")
                .skip(1)
                .map(|text| text.split('"').next().unwrap().parse().unwrap())
                .collect();
            assert!(rows.windows(2).all(|pair| pair[1] - pair[0] >= LINE), "{rows:?}");
            let legend = map.legend();
            let at = |text: &str| {
                text.split("x=\"").nth(1).map(|x| x.split('"').next().unwrap().parse::<usize>().unwrap())
            };
            let entries: Vec<(usize, usize)> = legend
                .split("<path")
                .skip(1)
                .map(|entry| {
                    let name = entry.split('>').nth(2).unwrap().trim_end_matches("</text");
                    (at(entry).unwrap(), name.len() * LETTER)
                })
                .collect();
            assert!(entries.windows(2).all(|pair| pair[0].0 + pair[0].1 + KEY < pair[1].0), "{entries:?}");
            let (last, width) = entries.last().unwrap();
            assert!(last + width <= LEFT + WIDTH + MARGIN, "{entries:?}");
        }
    }

    #[test]
    fn a_map_of_scattered_pages_is_small() {
        let scattered = Map::new(parts(MOST_CELLS, 500, |part| (part as u64 * 7919) % 501), 4096).svg("name");
        assert!(scattered.len() < 250_000, "{} bytes", scattered.len());
        let sequential =
            Map::new(parts(MOST_CELLS, 500, |part| if part < 4000 { 500 } else { 0 }), 4096).svg("name");
        assert!(sequential.len() < 20_000, "{} bytes", sequential.len());
    }
}
