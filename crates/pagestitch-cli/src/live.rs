//! `--live`: a heat map of each region, its faults per second, and the duration of their parts.

use crate::log;
use crate::output::{bytes, nanoseconds};
use crate::scene::{Content, Scene, Watched};
use pagestitch::{Coverage, Histogram};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};
use ratatui::{DefaultTerminal, Frame};
use std::io::{self, IsTerminal};
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
            return Err(String::from("--live needs a terminal, but standard output is none: omit --live"));
        }
        if log::is_dumb() {
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
    terminal.draw(|frame| paint(frame, &mut scene.lock())).map(drop)
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
    let [regions, log, help] =
        Layout::vertical([Constraint::Min(3), Constraint::Length(lines), Constraint::Length(1)])
            .areas(frame.area());
    // The first regions are drawn; the last line counts the others.
    let room = usize::from(regions.height / LEAST_HEIGHT).max(1);
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
    let beyond = content.regions.len() - shown;
    let beyond = if beyond > 0 { format!("  {beyond} more regions") } else { String::new() };
    frame.render_widget(Paragraph::new(format!("q quits{beyond}")).dim(), help);
}

impl Watched {
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
        let Self { metrics, faults_per_second: faults, pages_per_second: pages, .. } = self;
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

/// A part of a region: dark if absent, bright if present, red if a page is poisoned.
fn cell(part: &Coverage) -> Span<'static> {
    let (glyph, color) = match part {
        // A glyph of its own, because some terminals have no colours.
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

const FRAME: Duration = Duration::from_millis(100);
const LINES_SHOWN: usize = 5;
const LEAST_HEIGHT: u16 = 6;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heatmap::tests::half_present;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn shown(scene: &Scene) -> String {
        let mut terminal = Terminal::new(TestBackend::new(80, 20)).unwrap();
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
        assert!(seen.contains("a <b>: 50.0 % of 400 pages"), "{seen}");
        assert!(seen.contains("1 pages lost") && seen.contains("something happened"), "{seen}");
        assert!(seen.contains("fill p50"), "{seen}");
        let count = |glyph: char| seen.chars().filter(|&c| c == glyph).count();
        assert!((195..=205).contains(&count('█')) && count('·') > 190, "{seen}");
        scene.remove("a <b>");
        assert!(shown(&scene).contains("no region yet"));
    }

    #[test]
    fn regions_beyond_the_screen_are_counted() {
        let (scene, region) = (Scene::default(), half_present());
        (0..10).for_each(|_| scene.add(region.meter()));
        assert!(shown(&scene).contains("q quits  7 more regions"), "{}", shown(&scene));
    }
}
