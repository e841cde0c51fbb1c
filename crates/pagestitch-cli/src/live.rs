//! `--live`: a heat map of each region, its faults per second, and the duration of their parts.

use crate::density::Density;
use crate::log;
use crate::output::{self, bytes, count, nanoseconds, offset};
use crate::scene::{Content, Limit, Scene, Watched};
use pagestitch::{Coverage, Histogram, Support};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};
use ratatui::{DefaultTerminal, Frame};
use std::io::{self, IsTerminal};
use std::mem;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Restores the terminal and ends the program, as Ctrl-C would.
pub(crate) fn quit() {
    ratatui::restore();
    exit(130);
}

/// The terminal in drawing mode, until this is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Live {
    /// Draws the scene. Calls `quit` when the user presses q, Escape or Ctrl-C.
    pub(crate) fn show(scene: &Scene, quit: impl Fn() + Send + 'static) -> Result<Self, String> {
        if !io::stdout().is_terminal() {
            return Err(String::from("--live needs a terminal, but standard output is not one: omit --live"));
        }
        if output::is_dumb() {
            return Err(String::from(
                "--live needs a terminal that can move its cursor, but TERM is dumb or unset: omit --live",
            ));
        }
        let mut terminal =
            ratatui::try_init().map_err(|error| format!("--live cannot open the terminal: {error}"))?;
        log::show_in(Some(scene));
        let over = Arc::new(AtomicBool::new(false));
        let (scene, ended) = (scene.clone(), Arc::clone(&over));
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if draw(&mut terminal, &scene).is_err() {
                    break;
                }
                if wants_to_quit() {
                    quit();
                }
            }
            // The final state is drawn even if the work took a moment only.
            let _ = draw(&mut terminal, &scene);
            ratatui::restore();
        });
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
        log::show_in(None);
    }
}

fn draw(terminal: &mut DefaultTerminal, scene: &Scene) -> io::Result<()> {
    let paint = |frame: &mut Frame<'_>| {
        paint(frame, &mut scene.lock());
        if !output::may_color() {
            frame.buffer_mut().content.iter_mut().for_each(|cell| cell.fg = Color::Reset);
        }
    };
    terminal.draw(paint).map(drop)
}

/// Waits for a key until the next frame is due. True if the key ends the program.
fn wants_to_quit() -> bool {
    if !event::poll(FRAME).unwrap_or(false) {
        return false;
    }
    match event::read() {
        Ok(Event::Key(key)) => match key.code {
            KeyCode::Char('q') | KeyCode::Esc => true,
            KeyCode::Char('c') => key.modifiers.contains(KeyModifiers::CONTROL),
            _ => false,
        },
        _ => false,
    }
}

fn paint(frame: &mut Frame<'_>, content: &mut Content) {
    let lines = content.lines.len().min(LINES_SHOWN) as u16;
    let width = usize::from(frame.area().width);
    let has_budget = content.regions.iter().any(|watched| watched.budget.is_some());
    let help_for = |beyond| help_lines(beyond, has_budget, width);
    // At least one region is drawn.
    let most = help_for(content.regions.len().saturating_sub(1)).len() as u16;
    let heights = [Constraint::Min(3), Constraint::Length(lines), Constraint::Length(most)];
    let [regions, log, help] = Layout::vertical(heights).areas(frame.area());
    // The first regions are drawn; the last line counts the others.
    let heights = content
        .regions
        .iter()
        .map(|watched| watched.numbers(width.saturating_sub(BORDERS)).len() + LEAST_MAP);
    let room = (usize::from(regions.height) / heights.max().unwrap_or(1)).max(1);
    let shown = content.regions.len().min(room);
    let areas = Layout::vertical(vec![Constraint::Fill(1); shown.max(1)]).split(regions);
    if shown == 0 {
        frame.render_widget(Paragraph::new("no region yet").dim(), areas[0]);
    }
    for (watched, &area) in content.regions.iter_mut().zip(areas.iter()) {
        watched.update(FRAME / 2);
        watched.paint(frame, area);
    }
    let last = content.lines.iter().skip(content.lines.len().saturating_sub(LINES_SHOWN));
    frame.render_widget(Paragraph::new(last.map(|line| Line::raw(line.as_str())).collect::<Vec<_>>()), log);
    frame.render_widget(Paragraph::new(help_for(content.regions.len() - shown)), help);
}

/// The key that quits, the number of regions that are not drawn, and the legend of the maps, on which
/// pages may have left.
fn help_lines(beyond: usize, has_left: bool, width: usize) -> Vec<Line<'static>> {
    let beyond = if beyond > 0 { format!("; {} more", count(beyond, "region")) } else { String::new() };
    let mut pieces = vec![vec![Span::raw(format!("q quits{beyond}   ")).dim()]];
    let leave = |density| matches!(density, Density::Evicted | Density::Returned);
    for density in Density::EACH.into_iter().filter(|&density| has_left || !leave(density)) {
        pieces.push(vec![glyph(density), Span::raw(format!(" {}  ", short_name(density))).dim()]);
    }
    wrapped(pieces, width)
}

/// Puts pieces into lines of a width, without a break inside a piece. A space at the end of a piece may be
/// past the width.
fn wrapped(pieces: Vec<Vec<Span<'static>>>, width: usize) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = Vec::new();
    for piece in pieces {
        let piece = Line::from(piece);
        let text = piece.to_string();
        let seen = piece.width() - (text.len() - text.trim_end().len());
        match lines.last_mut() {
            Some(line) if line.width() + seen <= width => line.spans.extend(piece.spans),
            _ => lines.push(piece),
        }
    }
    lines
}

/// The parts of a list, each of which ends with its comma, colon or semicolon.
fn pieces(text: &str) -> Vec<Vec<Span<'static>>> {
    let (mut pieces, mut piece) = (Vec::new(), String::new());
    for word in text.split_inclusive(' ') {
        piece += word;
        if [", ", ": ", "; "].iter().any(|end| word.ends_with(end)) {
            pieces.push(vec![Span::raw(mem::take(&mut piece))]);
        }
    }
    pieces.push(vec![Span::raw(piece)]);
    pieces
}

impl Watched {
    fn paint(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(self.title());
        let inside = block.inner(area);
        frame.render_widget(block, area);
        let lines = self.numbers(inside.width.into());
        let heights = [Constraint::Length(lines.len() as u16), Constraint::Min(1)];
        let [numbers, map] = Layout::vertical(heights).areas(inside);
        frame.render_widget(Paragraph::new(lines), numbers);
        frame.render_widget(Paragraph::new(self.map(map.width.into(), map.height.into())), map);
    }

    /// The rows of the map, with offsets at their left if there is room.
    fn map(&self, width: usize, height: usize) -> Vec<Line<'static>> {
        let columns = if width >= 2 * OFFSET_WIDTH { width - OFFSET_WIDTH } else { width };
        let coverage = self.meter.coverage(columns * height);
        // Many labels would hide the map.
        let step = if height > 8 { 4 } else { 1 };
        let (mut lines, mut start) = (Vec::new(), 0);
        for (row, cells) in coverage.chunks(columns.max(1)).enumerate() {
            let label = if row.is_multiple_of(step) { offset(start * page()) } else { String::new() };
            let label = Span::raw(format!("{label:>width$} ", width = OFFSET_WIDTH - 1)).dim();
            let label = Some(label).filter(|_| columns < width);
            lines.push(label.into_iter().chain(cells.iter().map(cell)).collect());
            start += cells.iter().map(|cell| cell.pages).sum::<u64>();
        }
        lines
    }

    fn title(&self) -> String {
        let parts = self.meter.coverage(1);
        let all = parts.first().copied().unwrap_or_default();
        let share = all.present as f64 * 100.0 / all.pages.max(1) as f64;
        let pages = count(all.pages as usize, "page");
        format!(" {}: {share:.1} % of {pages}, {} ", self.meter.region(), bytes(all.pages * page()))
    }

    /// The counters, in lines of a width.
    fn numbers(&self, width: usize) -> Vec<Line<'static>> {
        let Self { metrics, faults_per_second: faults, pages_per_second: pages, .. } = self;
        let oldest =
            self.meter.oldest().map_or_else(String::new, |(_, age)| format!(", the oldest {}", time(age)));
        let lost = metrics.pages_poisoned;
        let mut first = pieces(&format!(
            "{faults:.0} faults/s, {pages:.0} pages/s; {}, {} copied; {} in flight{oldest}{}",
            count(metrics.faults as usize, "fault"),
            bytes(metrics.bytes_copied),
            self.meter.in_flight(),
            if lost > 0 { "; " } else { "" },
        ));
        if lost > 0 {
            let lost = format!("{} lost", count(lost as usize, "page"));
            first.push(vec![Span::styled(lost, Style::new().red().bold())]);
        }
        let second = self.meter.latency().map_or_else(String::new, |latency| {
            format!(
                "p50/p99: queue {}, fill {}, resolve {}",
                quantiles(&latency.queue),
                quantiles(&latency.fill),
                quantiles(&latency.resolve)
            )
        });
        let mut lines = vec![first, pieces(&second)];
        lines.extend(self.budget.iter().flat_map(Limit::lines).map(|line| pieces(&line)));
        lines.into_iter().flat_map(|pieces| wrapped(pieces, width)).collect()
    }
}

impl Limit {
    /// The memory of the budget, and the pages that have left and come back.
    fn lines(&self) -> [String; 2] {
        let (metrics, [resident, standby, dirty]) = (&self.metrics, self.sizes().map(bytes));
        let memory = format!(
            "{resident} of {} in memory: {standby} standby, {dirty} dirty; stalled {}",
            bytes(self.budget.limit()),
            time(metrics.stalled),
        );
        let pages = format!(
            "{:.0} evictions/s: {} evicted, {} soft faults, {} refaults, {} written back",
            self.evictions_per_second,
            metrics.evictions,
            metrics.soft_faults,
            metrics.refaults,
            metrics.write_backs,
        );
        [memory, pages]
    }

    const fn sizes(&self) -> [u64; 3] {
        [self.metrics.resident_bytes, self.metrics.standby_bytes, self.metrics.dirty_bytes]
    }
}

fn quantiles(histogram: &Histogram) -> String {
    format!("{}/{}", time(histogram.quantile(0.5)), time(histogram.quantile(0.99)))
}

fn time(time: Duration) -> String {
    nanoseconds(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// A part of a region.
fn cell(part: &Coverage) -> Span<'static> {
    glyph(Density::of(part))
}

/// The glyph of a density. Its shape tells the density, because some terminals have no colours.
fn glyph(density: Density) -> Span<'static> {
    let present = Style::new().fg(Color::Green);
    match density {
        Density::None => Span::styled("·", Style::new().dim()),
        Density::Few => Span::styled("░", present),
        Density::Some => Span::styled("▒", present),
        Density::Most => Span::styled("▓", present),
        Density::All => Span::styled("█", present),
        Density::Evicted => Span::styled("○", Style::new().fg(Color::Yellow)),
        Density::Returned => Span::styled("●", Style::new().fg(Color::Blue)),
        Density::Lost => Span::styled("×", Style::new().red().bold()),
    }
}

/// The entry of the legend, which has one line for all on a terminal of 80 columns.
const fn short_name(density: Density) -> &'static str {
    match density {
        Density::None => "absent",
        Density::Few => "≤10 %",
        Density::Some => "≤50 %",
        Density::Most => ">50 %",
        Density::All => "all",
        Density::Evicted => "evicted",
        Density::Returned => "back",
        Density::Lost => "lost",
    }
}

fn page() -> u64 {
    Support::current().page_size().bytes() as u64
}

/// The room of an offset: `1023.9 MiB` and a space.
const OFFSET_WIDTH: usize = 11;
const FRAME: Duration = Duration::from_millis(100);
const LINES_SHOWN: usize = 5;
/// The columns of the left and the right border.
const BORDERS: usize = 2;
/// The lines of the borders and of the least map.
const LEAST_MAP: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heatmap::tests::half_present;
    use pagestitch::{Budget, Pool, Region};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn shown(scene: &Scene) -> String {
        shown_at(scene, 80, 20)
    }

    fn shown_at(scene: &Scene, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| paint(frame, &mut scene.lock())).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_scene_shows_regions_with_maps_and_lines() {
        let scene = Scene::default();
        assert!(shown(&scene).contains("no region yet"));
        let region = half_present();
        scene.add(region.meter());
        scene.say(String::from("something happened"));
        let seen = shown(&scene);
        assert!(seen.contains("a <b>: 50.0 % of 400 pages, 1.6 MiB"), "{seen}");
        assert!(seen.contains("1 page lost") && seen.contains("something happened"), "{seen}");
        assert!(seen.contains("p50/p99: queue "), "{seen}");
        let count = |glyph: char| seen.chars().filter(|&c| c == glyph).count();
        assert!((195..=205).contains(&count('█')) && count('·') > 190, "{seen}");
        scene.remove("a <b>");
        assert!(shown(&scene).contains("no region yet"));
    }

    #[test]
    fn a_map_tells_densities_by_shape_and_has_offsets_and_a_legend() {
        let (scene, region) = (Scene::default(), half_present());
        scene.add(region.meter());
        let seen = shown_at(&scene, 80, 9);
        let legend = "· absent  ░ ≤10 %  ▒ ≤50 %  ▓ >50 %  █ all  × lost";
        assert!(seen.contains(legend), "{seen}");
        // Two or three pages a cell: one cell has present and absent pages, or none has.
        let (map, _) = seen.split_once(legend).unwrap();
        let count = |glyph: char| map.chars().filter(|&c| c == glyph).count();
        assert!(count('█') > 60 && count('·') > 60 && count('×') == 1, "{seen}");
        assert!(seen.contains("         0 █") && seen.contains(" KiB "), "{seen}");
        assert!(!shown_at(&scene, 20, 9).contains("  0 █"), "a narrow picture has no room for offsets");
        let glyphs: Vec<_> = Density::EACH.iter().map(|&density| glyph(density).content).collect();
        assert!(glyphs.iter().enumerate().all(|(nth, glyph)| !glyphs[..nth].contains(glyph)), "{glyphs:?}");
    }

    #[test]
    fn a_budget_has_lines_and_pages_that_have_left_are_on_the_map() {
        let budget = Budget::bytes(6 << 20).unwrap();
        let pool = Pool::builder().workers(1).start().unwrap();
        let builder = Region::builder().chunk(vec![7; 12 << 20]).budget(&budget);
        let region = builder.build(&pool).unwrap();
        // Each page comes after the eviction of others, and the first ones come back after theirs.
        for page in (0..3072).chain(0..256) {
            assert_eq!(region.as_slice()[page * 4096], 7);
        }
        let scene = Scene::default();
        scene.add_limited(region.meter(), budget.clone());
        let seen = shown_at(&scene, 80, 20);
        // Those of the picture, because workers may still evict.
        let metrics = scene.lock().regions[0].budget.as_ref().unwrap().metrics;
        assert!(metrics.evictions > 1_500 && metrics.refaults + metrics.soft_faults > 0, "{metrics:?}");
        for part in [
            &format!("{} evicted, ", metrics.evictions),
            "of 6.0 MiB in memory: ",
            " dirty;",
            "stalled ",
            "○ evicted  ● back",
        ] {
            assert!(seen.contains(part), "{part} is not in\n{seen}");
        }
        let (map, _) = seen.split_once("○ evicted").unwrap();
        assert!(map.contains('○') && map.contains('●'), "{seen}");
    }

    #[test]
    fn a_narrow_picture_has_all_counters_and_the_whole_legend() {
        let budget = Budget::bytes(6 << 20).unwrap();
        let pool = Pool::builder().workers(1).start().unwrap();
        let region = Region::builder().chunk(vec![7; 4096]).budget(&budget).record_latency();
        let region = region.build(&pool).unwrap();
        assert_eq!(region.as_slice()[0], 7);
        let scene = Scene::default();
        scene.add_limited(region.meter(), budget.clone());
        for width in [48, 60, 80] {
            let seen = shown_at(&scene, width, 20);
            for part in [
                " pages/s;",
                " copied;",
                " in flight",
                "queue ",
                "fill ",
                "resolve ",
                " in memory:",
                " standby,",
                " dirty;",
                "stalled ",
                " evicted,",
                " soft faults,",
                " refaults,",
                " written back",
                "· absent",
                ">50 %",
                "○ evicted",
                "● back",
                "× lost",
            ] {
                assert!(seen.contains(part), "{part:?} is not in {width} columns:\n{seen}");
            }
            assert!(seen.contains('█'), "the map has room:\n{seen}");
        }
    }

    #[test]
    fn regions_beyond_the_screen_are_counted() {
        let (scene, region) = (Scene::default(), half_present());
        (0..10).for_each(|_| scene.add(region.meter()));
        assert!(shown(&scene).contains("q quits; 7 regions more"), "{}", shown(&scene));
    }
}
