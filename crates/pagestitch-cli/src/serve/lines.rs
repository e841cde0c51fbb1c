//! The events of a handler as lines: text for a person, or one JSON object a line.

use crate::log;
use crate::output::{Form, bytes, count};
use crate::scene::Scene;
use pagestitch::{Metrics, Process};
use pagestitch_firecracker::Event;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::path::Path;

/// The size of a snapshot, and its number of pieces.
#[derive(Debug)]
pub(super) struct SnapshotSize {
    pub(super) bytes: u64,
    pub(super) pieces: usize,
}

/// An event in both forms.
#[derive(Debug)]
pub(super) struct Line {
    text: String,
    json: Value,
}

/// The reader of the lines: standard output, or the scene of `--live`.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) form: Form,
    pub(super) scene: Option<Scene>,
}

impl Lines {
    /// Shows a line with its time. An error is ignored, because guests are served even if the
    /// reader of the lines has gone.
    pub(super) fn say(&self, line: &Line) {
        let Line { text, json } = line;
        if let Some(scene) = &self.scene {
            return scene.say(text.clone());
        }
        let line = match self.form {
            Form::Text => format!("{} {text}", log::time()),
            Form::Json => {
                let mut json = json.clone();
                json["time"] = log::time().into();
                json.to_string()
            }
            Form::Quiet => return,
        };
        let mut out = stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

impl Line {
    /// The handler has opened its socket and its snapshot, and answers scrapes at an address.
    pub(super) fn listening(socket: &Path, snapshot: &SnapshotSize, scraped: Option<SocketAddr>) -> Self {
        let (socket, SnapshotSize { bytes: len, pieces }) = (socket.display().to_string(), snapshot);
        let at = scraped.map_or_else(String::new, |address| format!("; metrics at http://{address}/metrics"));
        let memory = format!("{} of memory in {}", bytes(*len), count(*pieces, "piece"));
        Self {
            text: format!("listening at {socket}: {memory}{at}"),
            json: json!({"event": "listening", "socket": socket, "bytes": len, "pieces": pieces, "metrics": scraped}),
        }
    }

    /// The map of a guest was written, or was lost because of an error.
    pub(super) fn drawn(owner: &Process, path: &Path, error: Option<&str>) -> Self {
        let path = path.display().to_string();
        Self {
            text: match error {
                None => format!("{owner}: its map is drawn in {path}"),
                Some(error) => format!("{owner}: its map is lost: {error}"),
            },
            json: json!({"event": "drawn", "pid": owner.pid(), "path": path, "error": error}),
        }
    }

    pub(super) fn of(event: &Event<'_>) -> Self {
        Self { text: event.to_string(), json: to_json(event) }
    }
}

fn to_json(event: &Event<'_>) -> Value {
    match event {
        Event::Restored { owner, bytes, .. } => {
            json!({"event": "restored", "pid": owner.pid(), "bytes": bytes})
        }
        Event::Refused { owner, reason } => {
            json!({"event": "refused", "pid": owner, "reason": reason.to_string()})
        }
        Event::Ended { owner, metrics, pages_lost } => json!({
            "event": "ended", "pid": owner.pid(), "faults": metrics.faults,
            "pages": metrics.pages_installed(), "pages_lost": pages_lost,
        }),
        Event::Recorded { owner, path, outcome } => json!({
            "event": "recorded", "pid": owner.pid(), "path": path.display().to_string(),
            "pages": outcome.as_ref().ok(), "error": outcome.as_ref().err().map(ToString::to_string),
        }),
        Event::Filled { owner, pages, pages_missing } => {
            json!({"event": "filled", "pid": owner.pid(), "pages": pages, "pages_missing": pages_missing})
        }
        Event::Detached { owner, outcome } => json!({
            "event": "detached", "pid": owner.pid(),
            "pages": outcome.as_ref().ok().map(Metrics::pages_installed),
            "error": outcome.as_ref().err().map(ToString::to_string),
        }),
        _ => json!({"event": event.to_string()}),
    }
}
