//! `pagestitch serve`: fills the memory of other processes.

use crate::files;
use crate::heatmap;
use crate::live::Live;
use crate::output::{bytes, workers};
use crate::scene::Scene;
use clap::{Args, Subcommand, ValueEnum};
use pagestitch::{Meter, OnUnavailable, Pool, Readahead, Recording};
use pagestitch_firecracker::{Event, Extents, Handler, Holes, OnStop, Snapshot};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum Peer {
    /// Restore Firecracker guests from a snapshot, as their page-fault handler ("backend_type":
    /// "Uffd")
    ///
    /// SIGTERM fills the memory of each guest, which then runs without a handler. A second SIGTERM
    /// ends the filling.
    ///
    /// After SIGKILL, or without memory, missing pages are never filled. Firecracker keeps a
    /// descriptor of its userfaultfd, so a guest that touches a missing page waits: kill it. A
    /// guest of a VMM that closed its descriptor reads zeros: keep a descriptor in the VMM or in a
    /// supervisor.
    Firecracker(Options),
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The path to listen at: the "backend_path" of PUT /snapshot/load
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The memory file of the snapshot, then diffs over it, oldest first, each with its
    /// DIFF.extents
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    memory: Vec<PathBuf>,
    /// Take the holes of a diff without DIFF.extents (see pagestitch extents) for unchanged memory,
    /// which is true of files that Firecracker has written, and of no copy
    #[arg(long)]
    assume_holes: bool,
    /// The consequence of unavailable bytes: poison raises SIGBUS where they are touched, kill ends
    /// the guest
    #[arg(long, value_enum, default_value_t)]
    on_unavailable: OnUnavailableOption,
    /// The consequence of a shutdown for guests: finish fills their memory, abandon leaves its
    /// missing pages unavailable
    #[arg(long, value_enum, default_value_t)]
    on_stop: StopOption,
    /// Fill touched pages only, and none ahead of them
    #[arg(long)]
    no_readahead: bool,
    /// Write the order in which the first guest touches its memory
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Fill the pages of a recording for each guest as soon as it connects
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Draw maps of the guests' memory, with their counters
    #[arg(long, conflicts_with = "json")]
    live: bool,
    /// Write a map of the filled memory of the latest guest when it ends
    #[arg(long, value_name = "FILE.svg")]
    heatmap: Option<PathBuf>,
    /// The number of handler threads [default: one per CPU, at most 8]
    #[arg(long, value_name = "N", value_parser = workers())]
    workers: Option<usize>,
    /// The seconds within which a client must send its handshake
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    handshake_timeout: u16,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum OnUnavailableOption {
    #[default]
    Poison,
    Kill,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum StopOption {
    #[default]
    Finish,
    Abandon,
}

/// The options of `pagestitch extents`.
#[derive(Debug, Args)]
pub(crate) struct ExtentsOptions {
    /// Diffs, as Firecracker has written them
    #[arg(required = true, value_name = "DIFF")]
    diffs: Vec<PathBuf>,
}

/// Writes the extents of diffs.
pub(crate) fn extents(options: &ExtentsOptions, as_json: bool) -> Result<(), Box<dyn Error>> {
    for diff in &options.diffs {
        let extents = Extents::of(diff)?;
        let path = extents.write(diff)?.display().to_string();
        let changed: u64 = extents.ranges().iter().map(|range| range.end - range.start).sum();
        say(&match as_json {
            true => json!({"extents": path, "ranges": extents.ranges().len(), "bytes": changed}).to_string(),
            false => format!("{path}: {} of memory in {} ranges", bytes(changed), extents.ranges().len()),
        });
    }
    Ok(())
}

pub(crate) fn run(peer: Peer, as_json: bool) -> Result<(), Box<dyn Error>> {
    let Peer::Firecracker(options) = peer;
    check_outputs(&options)?;
    let mut pool = Pool::builder().name("firecracker");
    if let Some(workers) = options.workers {
        pool = pool.workers(workers);
    }
    let holes = if options.assume_holes { Holes::Unchanged } else { Holes::Untrusted };
    let snapshot = Snapshot::open_with(&options.memory, holes)?;
    let (len, pieces) = (snapshot.bytes(), snapshot.pieces());
    let replay = options.replay.as_ref().map(Recording::read).transpose()?;
    let builder = Handler::builder(snapshot);
    let builder = options.record.iter().fold(builder, |builder, path| builder.record(path));
    let builder = replay.into_iter().fold(builder, pagestitch_firecracker::Builder::replay);
    let builder = if options.live { builder.record_latency() } else { builder };
    let handler = builder
        .pool(&pool.start()?)
        .on_unavailable(options.on_unavailable.into())
        .on_stop(options.on_stop.into())
        .readahead(if options.no_readahead { Readahead::None } else { Readahead::Adaptive })
        .handshake_timeout(Duration::from_secs(options.handshake_timeout.into()))
        .bind(&options.socket)?;
    let shutdown = handler.shutdown_handle();
    let quit = shutdown.clone();
    ctrlc::set_handler(move || shutdown.shutdown())?;
    let path = handler.path().display().to_string();
    let listening = match as_json {
        true => json!({"event": "listening", "socket": path, "bytes": len, "pieces": pieces}).to_string(),
        false => format!("listening at {path}: {} of memory in {pieces} pieces", bytes(len)),
    };
    let scene = Scene::default();
    let live = options.live.then(|| Live::show(&scene, move || quit.shutdown())).transpose()?;
    let say = |line: String| if live.is_some() { scene.say(line) } else { say(&line) };
    say(listening);
    let mut meters: HashMap<u32, Meter> = HashMap::new();
    let mut lost = LostOutputs::default();
    handler.run(|event| {
        say(if as_json { to_json(event).to_string() } else { event.to_string() });
        match event {
            Event::Restored { owner, meter, .. } => {
                scene.add(meter.clone());
                meters.insert(owner.pid(), meter.clone());
            }
            Event::Ended { owner, .. } | Event::Detached { owner, .. } => {
                scene.remove(&owner.to_string());
                let meter = meters.remove(&owner.pid());
                if let (Some(path), Some(meter)) = (&options.heatmap, meter) {
                    lost.map = heatmap::write(path, &meter).err();
                    lost.map.iter().for_each(|error| say(error.clone()));
                }
            }
            Event::Recorded { outcome, .. } => {
                lost.recording = outcome.as_ref().err().map(ToString::to_string);
            }
            _ => {}
        }
    })?;
    lost.recording.or(lost.map).map_or(Ok(()), |error| Err(error.into()))
}

/// The reasons why requested files are missing at the end.
#[derive(Debug, Default)]
struct LostOutputs {
    recording: Option<String>,
    map: Option<String>,
}

/// Checks the outputs before guests connect, because later their touches and maps would be lost.
fn check_outputs(options: &Options) -> Result<(), Box<dyn Error>> {
    let memory = options.memory.iter().map(|path| ("memory file", path.as_path()));
    let mut inputs: Vec<_> = memory.collect();
    files::check(options.record.as_deref().map(|path| ("recording", path)), &inputs)?;
    // The recording has been read before it is written, so the same file may serve both.
    inputs.extend(options.replay.as_deref().map(|path| ("recording", path)));
    files::check(options.heatmap.as_deref().map(|path| ("map", path)), &inputs)
}

/// Prints a line. An error is ignored, because guests are served even if the reader of the lines
/// has gone.
fn say(line: &str) {
    let mut out = stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
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
        Event::Detached { owner, outcome } => json!({
            "event": "detached", "pid": owner.pid(),
            "pages": outcome.as_ref().ok().map(pagestitch::Metrics::pages_installed),
            "error": outcome.as_ref().err().map(ToString::to_string),
        }),
        _ => json!({"event": event.to_string()}),
    }
}

impl From<OnUnavailableOption> for OnUnavailable {
    fn from(option: OnUnavailableOption) -> Self {
        match option {
            OnUnavailableOption::Poison => Self::Poison,
            OnUnavailableOption::Kill => Self::Kill,
        }
    }
}

impl From<StopOption> for OnStop {
    fn from(option: StopOption) -> Self {
        match option {
            StopOption::Finish => Self::Finish,
            StopOption::Abandon => Self::Abandon,
        }
    }
}
