//! `--live`: what happens, while it happens. A heat map of each region, faults a second, and how long their parts take.

use crate::log;
use crate::output::{bytes, nanoseconds};
use pagestitch::{Coverage, Histogram, Meter, Metrics};
use parking_lot::Mutex;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};
use ratatui::{DefaultTerminal, Frame};
use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What there is to be seen: whoever works adds regions, and says what happens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scene(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    regions: Vec<Watched>,
    lines: VecDeque<String>,
}

/// A region, and its numbers at the last look.
#[derive(Debug)]
struct Watched {
    meter: Meter,
    before: (Instant, Metrics),
    /// Faults, and pages, a second.
    rates: (f64, f64),
}

impl Scene {
    pub(crate) fn add(&self, meter: Meter) {
        let before = (Instant::now(), meter.metrics());
        self.0.lock().regions.push(Watched { meter, before, rates: (0.0, 0.0) });
    }

    pub(crate) fn remove(&self, name: &str) {
        self.0.lock().regions.retain(|watched| watched.meter.region() != name);
    }

    pub(crate) fn say(&self, line: String) {
        let lines = &mut self.0.lock().lines;
        lines.push_back(line);
        lines.drain(..lines.len().saturating_sub(LINES_KEPT));
    }
}

/// Gives the terminal back and ends the program, as Ctrl-C would have.
pub(crate) fn quit() {
    ratatui::restore();
    exit(130);
}

/// The terminal, until it is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Live {
    /// Shows the scene. `quit` is called when the user has had enough: q, Escape or Ctrl-C.
    pub(crate) fn show(scene: &Scene, quit: impl Fn() + Send + 'static) -> Result<Self, String> {
        if !io::stdout().is_terminal() {
            return Err(String::from("--live needs a terminal: standard output is none"));
        }
        if log::is_dumb() {
            return Err(String::from(
                "--live needs a terminal that can move its cursor: TERM is dumb or not set",
            ));
        }
        let mut terminal =
            ratatui::try_init().map_err(|error| format!("--live cannot have the terminal: {error}"))?;
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
            // The last state is seen, also of what was over in a moment.
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
    terminal.draw(|frame| paint(frame, &mut scene.0.lock())).map(drop)
}

/// Waits for a key until it is time for the next picture.
fn wants_to_quit() -> bool {
    if !event::poll(EACH).unwrap_or(false) {
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

fn paint(frame: &mut Frame<'_>, inner: &mut Inner) {
    let lines = inner.lines.len().min(LINES_SHOWN) as u16;
    let [regions, log, help] =
        Layout::vertical([Constraint::Min(3), Constraint::Length(lines), Constraint::Length(1)])
            .areas(frame.area());
    // Those that came first; how many there are beyond is said.
    let room = usize::from(regions.height / LEAST_HEIGHT).max(1);
    let shown = inner.regions.len().min(room);
    let areas = Layout::vertical(vec![Constraint::Fill(1); shown.max(1)]).split(regions);
    if shown == 0 {
        frame.render_widget(Paragraph::new("no region yet").dim(), areas[0]);
    }
    for (watched, &area) in inner.regions.iter_mut().zip(areas.iter()) {
        watched.look();
        watched.paint(frame, area);
    }
    let last = inner.lines.iter().skip(inner.lines.len().saturating_sub(LINES_SHOWN));
    frame.render_widget(Paragraph::new(last.map(|line| Line::raw(line.as_str())).collect::<Vec<_>>()), log);
    let beyond = inner.regions.len() - shown;
    let beyond = if beyond > 0 { format!("  {beyond} more regions") } else { String::new() };
    frame.render_widget(Paragraph::new(format!("q quits{beyond}")).dim(), help);
}

impl Watched {
    fn look(&mut self) {
        let (now, metrics) = (Instant::now(), self.meter.metrics());
        let (then, before) = &self.before;
        let seconds = (now - *then).as_secs_f64();
        if seconds > EACH.as_secs_f64() / 2.0 {
            let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
            self.rates = (
                rate(metrics.faults, before.faults),
                rate(metrics.pages_installed(), before.pages_installed()),
            );
            self.before = (now, metrics);
        }
    }

    fn paint(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(self.title());
        let inside = block.inner(area);
        frame.render_widget(block, area);
        let [numbers, map] = Layout::vertical([Constraint::Length(2), Constraint::Min(1)]).areas(inside);
        frame.render_widget(Paragraph::new(self.numbers()), numbers);
        let coverage = self.meter.coverage(usize::from(map.width) * usize::from(map.height));
        let rows = coverage.chunks(usize::from(map.width).max(1));
        let rows: Vec<Line<'_>> = rows.map(|row| row.iter().map(cell).collect()).collect();
        frame.render_widget(Paragraph::new(rows), map);
    }

    fn title(&self) -> String {
        let parts = self.meter.coverage(1);
        let all = parts.first().copied().unwrap_or_default();
        let share = all.present as f64 * 100.0 / all.pages.max(1) as f64;
        format!(" {}: {:.1} % of {} pages ", self.meter.region(), share, all.pages)
    }

    fn numbers(&self) -> Vec<Line<'static>> {
        let (metrics, (faults, pages)) = (&self.before.1, self.rates);
        let oldest =
            self.meter.oldest().map_or_else(String::new, |(_, age)| format!(", the oldest {}", time(age)));
        let mut first = vec![Span::raw(format!(
            "{faults:.0} faults/s, {pages:.0} pages/s; {} faults, {} copied; {} in flight{oldest}",
            metrics.faults,
            bytes(metrics.bytes_copied),
            self.meter.in_flight(),
        ))];
        if metrics.pages_poisoned > 0 {
            first.push(Span::styled(
                format!("; {} pages lost", metrics.pages_poisoned),
                Style::new().red().bold(),
            ));
        }
        let second = self.meter.latency().map_or_else(String::new, |latency| {
            format!(
                "queue {}   fill {}   resolve {}",
                quantiles(&latency.queue),
                quantiles(&latency.fill),
                quantiles(&latency.resolve)
            )
        });
        vec![Line::from(first), Line::raw(second)]
    }
}

fn quantiles(histogram: &Histogram) -> String {
    format!("p50 {} p99 {}", time(histogram.quantile(0.5)), time(histogram.quantile(0.99)))
}

fn time(time: Duration) -> String {
    nanoseconds(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// A part of a region: dark for absent, bright for present, red where something was lost.
fn cell(part: &Coverage) -> Span<'static> {
    let (glyph, color) = match part {
        // A glyph of its own: not every terminal has colours.
        Coverage { poisoned: 1.., .. } => ("×", Color::Red),
        Coverage { present: 0, .. } => ("·", Color::DarkGray),
        Coverage { present, pages, .. } => {
            let ramp = [
                Color::Indexed(22),
                Color::Indexed(28),
                Color::Indexed(34),
                Color::Indexed(40),
                Color::Indexed(46),
            ];
            ("█", ramp[(present * (ramp.len() as u64 - 1) / pages.max(&1)) as usize])
        }
    };
    Span::styled(glyph, Style::new().fg(color))
}

/// Writes the map of a region as a picture that needs nothing else.
pub(crate) fn heatmap(meter: &Meter) -> String {
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
                // From light to dark, so that a little is seen too.
                format!("hsl(140,60%,{}%)", 80 - 50 * present / pages.max(&1))
            }
        };
        let side = SIDE - 1;
        svg += &format!("<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\"/>\n");
    }
    svg + "</svg>\n"
}

const EACH: Duration = Duration::from_millis(100);
const LINES_KEPT: usize = 100;
const LINES_SHOWN: usize = 5;
const LEAST_HEIGHT: u16 = 6;
const COLUMNS: usize = 128;
const ROWS: usize = 64;
const SIDE: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch::{Chunk, Pool, Region};
    use pagestitch_testkit::scripted::Scripted;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    /// Half of it is there, and one page is lost.
    fn region() -> Region {
        let source = Scripted::new(400 * 4096).failing(300 * 4096..301 * 4096);
        let builder = Region::builder().name("a <b>").chunk(Chunk::source(Arc::new(source))).timed();
        let region = builder.build(&Pool::new().unwrap()).unwrap();
        region.populate(0..200 * 4096).unwrap();
        region.populate(300 * 4096..301 * 4096).unwrap_err();
        region
    }

    fn shown(scene: &Scene) -> String {
        let mut terminal = Terminal::new(TestBackend::new(80, 20)).unwrap();
        terminal.draw(|frame| paint(frame, &mut scene.0.lock())).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn regions_are_shown_with_their_maps_and_what_happens() {
        let scene = Scene::default();
        assert!(shown(&scene).contains("no region yet"));
        let region = region();
        scene.add(region.meter());
        scene.say(String::from("something happened"));
        let seen = shown(&scene);
        assert!(seen.contains("a <b>: 50.0 % of 400 pages"), "{seen}");
        assert!(seen.contains("1 pages lost") && seen.contains("something happened"), "{seen}");
        assert!(seen.contains("fill p50"), "{seen}");
        let count = |glyph: char| seen.chars().filter(|&c| c == glyph).count();
        assert!((195..=205).contains(&count('█')) && count('·') > 190, "{seen}");
        scene.remove("a <b>");
        assert!(shown(&scene).contains("no region yet"));
    }

    #[test]
    fn more_regions_than_fit_are_counted() {
        let (scene, region) = (Scene::default(), region());
        (0..10).for_each(|_| scene.add(region.meter()));
        assert!(shown(&scene).contains("q quits  7 more regions"), "{}", shown(&scene));
    }

    #[test]
    fn a_picture_has_a_cell_for_each_part_and_a_title_that_is_text() {
        let svg = heatmap(&region().meter());
        assert_eq!(svg.matches("<rect x=").count(), 400);
        assert_eq!(svg.matches("#d62728").count(), 1);
        assert_eq!(svg.matches("#eee").count(), 199);
        assert!(svg.contains("a &lt;b>: 200 of 400 pages present, 1 lost"));
    }
}
