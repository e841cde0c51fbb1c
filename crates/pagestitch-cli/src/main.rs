//! The `pagestitch` command.
//!
//! Exit status: 0 done; 1 it could not be done, and one line on standard error says why; 2 wrong arguments: arguments that are wrong
//! whatever the files hold and the machine allows.

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

/// Scattered memory, one contiguous region, filled on first touch.
#[derive(Debug, Parser)]
#[command(name = "pagestitch", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of text: one object, or one a line for bench and serve
    #[arg(long, global = true)]
    json: bool,
    /// Show what happens: regions and pools; twice, each page that is installed
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stitch scattered pieces of a real file and of memory together, touch them, and prove it right
    Demo(demo::Options),
    /// Tell what this kernel and this process may do, why not, and the remedy
    Probe,
    /// Show parts of files as one contiguous region; nothing is concatenated
    Stitch(stitch::Options),
    /// Fill the memory of other processes on first touch
    #[command(subcommand)]
    Serve(serve::Peer),
    /// Write which bytes of a diff snapshot are its own to DIFF.extents, where Firecracker has written it: a copy may lose its holes
    Extents(serve::ExtentsOptions),
    /// Random regions, sources, servers and threads, failing on purpose, and every byte verified
    Stress(stress::Options),
    /// Measure what a fault costs, against eager copies and the handler of the manual page, in the same run
    Bench(bench::Options),
}

fn main() -> ExitCode {
    pagestitch_bench::guest::run_as_guest_if_requested();
    let arguments = Arguments::parse();
    // A stress test makes pages fail by the thousand.
    let quiet = matches!(arguments.command, Command::Stress(_));
    log::start(arguments.verbose, if quiet { LevelFilter::ERROR } else { LevelFilter::WARN });
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
        // Who reads our output has gone away, as `head` does: nothing to complain about.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "pagestitch: {error}");
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Every file takes a descriptor, and the soft limit is for programs that use select(2): we may have the hard one.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
