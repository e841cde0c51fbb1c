//! `pagestitch serve`: fills the memory of other processes.
//!
//! | file | content |
//! |---|---|
//! | `endpoint` | the socket: made at a path, or passed by systemd |
//! | `exporter` | the answers to scrapes of Prometheus |
//! | `figures` | the figures of all guests |
//! | `lines` | the events, as lines of text or JSON |
//! | `systemd` | the protocol of the service manager |

mod endpoint;
mod exporter;
mod figures;
mod lines;
mod systemd;

use crate::files::{self, OfFile};
use crate::heatmap;
use crate::live::Live;
use crate::number;
use crate::output::{Form, bytes, count, workers};
use crate::scene::Scene;
use crate::size;
use clap::{Args, Subcommand, ValueEnum};
use endpoint::{Endpoint, SocketOptions};
use exporter::Exporter;
use figures::Figures;
use lines::{Line, Lines, SnapshotSize};
use pagestitch::{FillRate, Meter, OnUnavailable, Pool, Process, Readahead, Recording};
use pagestitch_firecracker::{Event, Extents, Handler, Holes, OnStop, Snapshot};
use serde_json::json;
use std::error::Error;
use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::num::NonZeroU64;
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
    #[command(flatten)]
    socket: SocketOptions,
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
    /// Fill the memory of each guest while no fault waits, at most RATE bytes a second (such as 256M)
    /// [without RATE: as fast as idle handler threads fill]. A guest with all of its memory is detached,
    /// and runs without the handler
    #[arg(long, value_name = "RATE", num_args = 0..=1, value_parser = rate, default_missing_value = UNLIMITED)]
    background: Option<FillRate>,
    /// Draw maps of the guests' memory, with their counters
    #[arg(long, conflicts_with = "json")]
    live: bool,
    /// Write a map of the filled memory of the latest guest when it ends
    #[arg(long, value_name = "FILE.svg")]
    heatmap: Option<PathBuf>,
    /// Answer scrapes of Prometheus at http://ADDRESS/metrics, and record the latency of faults.
    /// Each process that can connect can read the figures
    #[arg(long, value_name = "ADDRESS", value_parser = exporter::address)]
    metrics: Option<SocketAddr>,
    /// The number of handler threads [default: one per CPU, at most 32]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = workers())]
    workers: Option<usize>,
    /// The seconds within which a client must send its handshake
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, default_value_t = 5, value_parser = number::up_to::<u16>(u16::MAX.into()))]
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

/// Parses a rate in bytes a second.
fn rate(text: &str) -> Result<FillRate, String> {
    if text == UNLIMITED {
        return Ok(FillRate::Unlimited);
    }
    let unusable =
        || format!("it is no number of bytes a second: write {}, or {UNLIMITED}", size::examples!());
    let bytes = size::parse(text).ok_or_else(unusable)?;
    let bytes = NonZeroU64::new(bytes).ok_or("nothing would be filled: leave out --background")?;
    Ok(FillRate::BytesPerSecond(bytes))
}

const UNLIMITED: &str = "unlimited";

/// The options of `pagestitch extents`.
#[derive(Debug, Args)]
pub(crate) struct ExtentsOptions {
    /// Diffs, as Firecracker has written them
    #[arg(required = true, value_name = "DIFF")]
    diffs: Vec<PathBuf>,
}

/// Writes the extents of diffs.
pub(crate) fn extents(options: &ExtentsOptions, form: Form) -> Result<(), Box<dyn Error>> {
    for diff in &options.diffs {
        let extents = Extents::of(diff)?;
        let path = extents.write(diff)?.display().to_string();
        let changed: u64 = extents.ranges().iter().map(|range| range.end - range.start).sum();
        let ranges = extents.ranges().len();
        match form {
            Form::Json => {
                writeln!(stdout(), "{}", json!({"extents": path, "ranges": ranges, "bytes": changed}))?
            }
            Form::Text => {
                writeln!(stdout(), "{path}: {} of memory in {}", bytes(changed), count(ranges, "range"))?
            }
            Form::Quiet => {}
        }
    }
    Ok(())
}

pub(crate) fn run(peer: Peer, form: Form) -> Result<(), Box<dyn Error>> {
    let Peer::Firecracker(options) = peer;
    check_outputs(&options)?;
    let exporter = options.metrics.map(Exporter::bind).transpose()?;
    let scraped = exporter.as_ref().map(Exporter::address);
    let (handler, snapshot) = open(&options)?;
    let figures = Figures::of_snapshot(snapshot.bytes);
    let scrapes = exporter.map_or(Ok(()), |exporter| exporter.start(figures.clone()));
    scrapes.map_err(|error| format!("cannot start the thread for --metrics: {error}"))?;
    let shutdown = handler.shutdown_handle();
    let stop = move || {
        // First, because the process may have ended a moment after the shutdown.
        systemd::stopping();
        shutdown.shutdown();
    };
    ctrlc::set_handler(stop.clone())?;
    let scene = Scene::default();
    let live = options.live.then(|| Live::show(&scene, stop)).transpose()?;
    let lines = Lines { form, scene: live.is_some().then(|| scene.clone()) };
    lines.say(&Line::listening(handler.path(), &snapshot, scraped));
    systemd::ready();
    let lost = LostOutputs::default();
    let mut served = Served { lines, scene, figures, heatmap: options.heatmap, lost };
    handler.run(|event| served.take(event))?;
    served.lost.recording.or(served.lost.map).map_or(Ok(()), |error| Err(error.into()))
}

/// Opens the snapshot and the socket.
fn open(options: &Options) -> Result<(Handler, SnapshotSize), Box<dyn Error>> {
    let endpoint = Endpoint::of(&options.socket)?;
    let mut pool = Pool::builder().name("firecracker");
    if let Some(workers) = options.workers {
        pool = pool.workers(workers);
    }
    let holes = if options.assume_holes { Holes::Unchanged } else { Holes::Untrusted };
    let snapshot = Snapshot::open_with(&options.memory, holes)?;
    let opened = SnapshotSize { bytes: snapshot.bytes(), pieces: snapshot.pieces() };
    let replay = options.replay.as_ref().map(Recording::read).transpose()?;
    let builder = Handler::builder(snapshot);
    let builder = options.record.iter().fold(builder, |builder, path| builder.record(path));
    let builder = replay.into_iter().fold(builder, pagestitch_firecracker::Builder::replay);
    let builder = options.background.into_iter().fold(builder, pagestitch_firecracker::Builder::background);
    let timed = options.live || options.metrics.is_some();
    let builder = if timed { builder.record_latency() } else { builder };
    let builder = builder
        .pool(&pool.start()?)
        .on_unavailable(options.on_unavailable.into())
        .on_stop(options.on_stop.into())
        .readahead(if options.no_readahead { Readahead::None } else { Readahead::Adaptive })
        .handshake_timeout(Duration::from_secs(options.handshake_timeout.into()));
    let handler = endpoint.open(builder).map_err(|error| -> Box<dyn Error> {
        match (&options.replay, &error) {
            (Some(path), pagestitch_firecracker::Error::RecordingMismatch { .. }) => {
                OfFile { path: path.clone(), error: error.into() }.into()
            }
            _ => error.into(),
        }
    })?;
    Ok((handler, opened))
}

/// The guests that are served, and the lines about them.
struct Served {
    lines: Lines,
    scene: Scene,
    figures: Figures,
    heatmap: Option<PathBuf>,
    lost: LostOutputs,
}

impl Served {
    fn take(&mut self, event: &Event<'_>) {
        self.lines.say(&Line::of(event));
        match event {
            Event::Restored { owner, meter, .. } => {
                self.scene.add(meter.clone());
                self.figures.restored(key(owner), meter.clone());
                systemd::serving(self.figures.guests());
            }
            Event::Refused { .. } => self.figures.refused(),
            Event::Ended { owner, .. } => self.leave(owner, self.figures.ended(key(owner))),
            Event::Detached { owner, .. } => self.leave(owner, self.figures.detached(key(owner))),
            Event::Recorded { outcome, .. } => {
                self.lost.recording = outcome.as_ref().err().map(ToString::to_string);
            }
            _ => {}
        }
    }

    fn leave(&mut self, owner: &Process, meter: Option<Meter>) {
        self.scene.remove(&owner.to_string());
        meter.iter().for_each(|meter| self.draw(owner, meter));
        systemd::serving(self.figures.guests());
    }

    /// Writes the map of a guest that has ended.
    fn draw(&mut self, owner: &Process, meter: &Meter) {
        let Some(path) = &self.heatmap else { return };
        self.lost.map = heatmap::write(path, meter).err();
        self.lines.say(&Line::drawn(owner, path, self.lost.map.as_deref()));
    }
}

/// A key for a guest, because all processes of other PID namespaces have the id 0. The handler
/// keeps a guest's process at one address.
fn key(owner: &Process) -> usize {
    std::ptr::from_ref(owner).addr()
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
    inputs.extend(options.socket.path().map(|path| ("socket", path)));
    let record = options.record.as_deref().map(|path| ("recording", path));
    files::check(record, &inputs)?;
    // The recording has been read before it is written, so the same file may serve both.
    inputs.extend(record);
    inputs.extend(options.replay.as_deref().map(|path| ("recording", path)));
    files::check(options.heatmap.as_deref().map(|path| ("map", path)), &inputs)
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
