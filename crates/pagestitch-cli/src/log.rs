//! Events on standard error, or among the lines of `--live` while that has the terminal.

use crate::output::{self, Form};
use crate::scene::Scene;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::panic;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// The choice and the form of events.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) verbose: u8,
    /// The level of events without --verbose.
    pub(crate) least: LevelFilter,
    /// True if each event has its time, because the command runs for days.
    pub(crate) times: bool,
    /// True if an event is an object, and so is a panic.
    pub(crate) json: bool,
    /// True if sources fail on purpose, so that their failures are no errors.
    pub(crate) injects_failures: bool,
}

/// Starts the log.
pub(crate) fn start(events: &Events) {
    let &Events { least, times, json, injects_failures, .. } = events;
    let level = match events.verbose {
        0 => least,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| Log)
        .with_ansi(io::stderr().is_terminal() && output::may_color())
        .with_target(false);
    if json {
        panic::set_hook(Box::new(|panic| defect(Form::Json, &panic.to_string())));
    }
    match (json, times) {
        (true, _) => init(log.event_format(Objects { times }).finish(), injects_failures),
        (false, true) => init(log.finish(), injects_failures),
        (false, false) => init(log.without_time().finish(), injects_failures),
    }
}

/// Takes the events, except for errors of sources that fail on purpose.
fn init<S: Subscriber + Send + Sync + for<'a> LookupSpan<'a>>(log: S, injects_failures: bool) {
    let is_wanted = move |event: &Metadata<'_>| {
        let is_of_source = *event.level() == Level::ERROR && event.fields().field("failure").is_some();
        !(injects_failures && is_of_source)
    };
    log.with(filter_fn(is_wanted)).init();
}

/// Events as JSON objects: the level, the message, and the fields.
struct Objects {
    times: bool,
}

impl<S, N> FormatEvent<S, N> for Objects
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields(Map::new());
        if self.times {
            fields.add("time", time());
        }
        fields.add("level", event.metadata().level().as_str().to_lowercase());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

/// The fields of an event. Values without a JSON type are text.
struct Fields(Map<String, Value>);

impl Fields {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), value);
    }
}

/// Writes a note about the work to standard error, in the form of the log.
pub(crate) fn note(form: Form, message: &str) {
    if form != Form::Quiet {
        say(form, "info", message);
    }
}

/// Writes a description of a defect to standard error, in the form of the log.
pub(crate) fn defect(form: Form, message: &str) {
    say(form, "error", message);
}

fn say(form: Form, level: &str, message: &str) {
    let line = match form {
        Form::Json => json!({"level": level, "message": message}).to_string(),
        Form::Text | Form::Quiet => message.to_owned(),
    };
    let _ = writeln!(io::stderr(), "{line}");
}

/// The current time, as events show it: `2026-11-28T07:22:26.123456Z`.
pub(crate) fn time() -> String {
    let mut time = String::new();
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

/// Shows events in the scene from now on, if standard error is a terminal. `None` ends that.
pub(crate) fn show_in(scene: Option<&Scene>) {
    *SCENE.lock() = scene.filter(|_| io::stderr().is_terminal()).cloned();
}

static SCENE: Mutex<Option<Scene>> = Mutex::new(None);

/// The writer of events. The subscriber writes each event in one piece.
struct Log;

impl Write for Log {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        match &*SCENE.lock() {
            Some(scene) => scene.say(plain(&String::from_utf8_lossy(event))),
            None => io::stderr().write_all(event)?,
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line without its end and its escape sequences, which the picture would show as text.
fn plain(event: &str) -> String {
    let mut parts = event.trim_end().split('\x1b');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    parts.for_each(|part| plain += part.split_once('m').map_or(part, |(_, text)| text));
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logged_line_loses_its_escape_sequences() {
        assert_eq!(plain("\x1b[32m INFO\x1b[0m the pool \x1b[3mname\x1b[0m\n"), " INFO the pool name");
        assert_eq!(plain("plain\n"), "plain");
    }
}
