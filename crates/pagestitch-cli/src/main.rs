//! The `pagestitch` command.
//!
//! Exit status: 0 success; 1 failure, with the reason in one line on standard error; 2 wrong
//! arguments, which no file and no machine could make right.
//!
//! A module uses no module of an earlier row:
//!
//! | row | modules |
//! |---|---|
//! | commands | `bench`, `demo`, `probe`, `serve`, `stitch`, `stress` |
//! | pictures | `live`, `heatmap` |
//! | messages | `log`, `scene` |
//! | helpers | `files`, `usage`, `output`, `part`, `touch` |

mod bench;
mod demo;
mod files;
mod heatmap;
mod live;
mod log;
mod output;
mod part;
mod probe;
mod scene;
mod serve;
mod stitch;
mod stress;
mod touch;
mod usage;

use clap::{ArgAction, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use usage::Usage;

/// Scattered memory as one contiguous region, filled on first touch
#[derive(Debug, Parser)]
#[command(name = "pagestitch", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of text: one object, or one object per line for bench and serve
    #[arg(long, global = true)]
    json: bool,
    /// Log regions and pools; given twice, also each installed page
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stitch pieces of a real file and of memory, touch them, and check all bytes
    Demo(demo::Options),
    /// Print the kernel features that this process may use, with reasons and remedies for the
    /// others
    Probe,
    /// Show parts of files as one contiguous region, without concatenating them
    Stitch(stitch::Options),
    /// Fill the memory of other processes on first touch
    #[command(subcommand)]
    Serve(serve::Peer),
    /// Write the changed ranges of a diff snapshot to DIFF.extents. Run this where Firecracker has
    /// written the diff, because a copy may lose its holes
    Extents(serve::ExtentsOptions),
    /// Build random regions with failing sources, touch them from threads, and check every byte
    Stress(stress::Options),
    /// Measure the cost of a fault, beside eager copies and the handler of the manual page, in the
    /// same run
    Bench(bench::Options),
}

fn main() -> ExitCode {
    pagestitch_bench::guest::run_as_guest_if_requested();
    let arguments = Arguments::parse();
    // A stress test makes thousands of pages fail.
    let quiet = matches!(arguments.command, Command::Stress(_));
    let serves = matches!(arguments.command, Command::Serve(_));
    log::start(arguments.verbose, if quiet { LevelFilter::ERROR } else { LevelFilter::WARN }, serves);
    raise_descriptor_limit();
    let json = arguments.json;
    let done = match arguments.command {
        Command::Demo(options) => demo::run(&options, json),
        Command::Probe => probe::run(json),
        Command::Stitch(options) => stitch::run(&options, json),
        Command::Serve(peer) => serve::run(peer, json),
        Command::Extents(options) => serve::extents(&options, json),
        Command::Stress(options) => stress::run(&options, json),
        Command::Bench(options) => bench::run(&options, json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has gone, as `head` does, which is no error.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "pagestitch: {error}");
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Raises the soft limit on descriptors to the hard one, because every file needs a descriptor. The
/// soft limit protects programs that use select(2).
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
