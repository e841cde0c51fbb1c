//! The `pagestitch` command.
//!
//! Exit status: 0 success; 1 failure, with the reason in one line on standard error; 2 wrong
//! arguments, which no file and no machine could make right. With `--json`, each line on standard
//! error is an object: a reason has `error`, with its kind, and an event of the log has `level`.
//!
//! A module uses no module of an earlier row:
//!
//! | row | modules |
//! |---|---|
//! | commands | `bench`, `demo`, `docs`, `probe`, `serve`, `stitch`, `stress` |
//! | pictures | `live`, `heatmap` |
//! | messages | `log`, `scene` |
//! | helpers | `density`, `files`, `number`, `output`, `part`, `size`, `terms`, `touch`, `usage` |

mod bench;
mod demo;
mod density;
mod docs;
mod files;
mod heatmap;
mod live;
mod log;
mod number;
mod output;
mod part;
mod probe;
mod scene;
mod serve;
mod size;
mod stitch;
mod stress;
mod terms;
mod touch;
mod usage;

use clap::error::ErrorKind;
use clap::{ArgAction, ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand};
use files::OfFile;
use log::Events;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use output::Form;
use serde_json::json;
use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use usage::Usage;

/// Scattered memory as one contiguous region, filled on first touch
#[derive(Debug, Parser)]
#[command(name = "pagestitch", version, arg_required_else_help = true, after_help = STATUS)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of text: one object, or one object per line for bench and serve. Errors,
    /// warnings and the log are objects on standard error, one per line
    #[arg(long, global = true, help_heading = OUTPUT)]
    json: bool,
    /// Print errors, and results that an option requests, and nothing else: no summary, no event,
    /// no progress
    #[arg(short, long, global = true, help_heading = OUTPUT, conflicts_with_all = ["json", "verbose"])]
    quiet: bool,
    /// Log regions and pools; given twice, also each installed page
    #[arg(short, long, global = true, help_heading = OUTPUT, action = ArgAction::Count)]
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
    /// Print a script that completes the arguments of this command in a shell
    Completions(docs::CompletionsOptions),
    /// Print the manual page, or write a page for each command
    Man(docs::ManOptions),
}

fn main() -> ExitCode {
    pagestitch_bench::guest::run_as_guest_if_requested();
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    let form = match arguments {
        Arguments { json: true, .. } => Form::Json,
        Arguments { quiet: true, .. } => Form::Quiet,
        _ => Form::Text,
    };
    let quiet = form == Form::Quiet || arguments.command.tells_failures();
    log::start(&Events {
        verbose: arguments.verbose,
        least: if quiet { LevelFilter::ERROR } else { LevelFilter::WARN },
        times: matches!(arguments.command, Command::Serve(_)),
        json: form == Form::Json,
        injects_failures: matches!(arguments.command, Command::Stress(_)),
    });
    raise_descriptor_limit();
    match run(arguments.command, form) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has gone, as `head` does, which is no error.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = if error.is::<Usage>() { WRONG } else { 1 };
            fail(&reason(error.as_ref()), kind_of(error.as_ref()), status, form)
        }
    }
}

fn parse() -> Result<Arguments, clap::Error> {
    let colors = if output::may_color() { ColorChoice::Auto } else { ColorChoice::Never };
    let matches = Arguments::command().color(colors).try_get_matches()?;
    Arguments::from_arg_matches(&matches)
}

impl Command {
    /// True if the command itself tells each failure of a page, or expects it, so that an event about it
    /// would be the second telling.
    const fn tells_failures(&self) -> bool {
        match self {
            Self::Stitch(options) => !options.touches(),
            Self::Stress(_) => true,
            _ => false,
        }
    }
}

fn run(command: Command, form: Form) -> Result<(), Box<dyn Error>> {
    match command {
        Command::Demo(options) => demo::run(&options, form),
        Command::Probe => probe::run(form),
        Command::Stitch(options) => stitch::run(&options, form),
        Command::Serve(peer) => serve::run(peer, form),
        Command::Extents(options) => serve::extents(&options, form),
        Command::Stress(options) => stress::run(&options, form),
        Command::Bench(options) => bench::run(&options, form),
        Command::Completions(options) => docs::completions(&options, Arguments::command()),
        Command::Man(options) => docs::manual(&options, Arguments::command()),
    }
}

/// Reports wrong arguments, or prints the help.
fn refuse(error: &clap::Error) -> ExitCode {
    let json =
        env::args_os().skip(1).take_while(|argument| argument != "--").any(|argument| argument == "--json");
    let helps = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if !json || helps {
        return match error.print() {
            Err(lost) if helps && !is_broken_pipe(&lost) => fail(&reason(&lost), None, 1, Form::Text),
            _ => ExitCode::from(if helps { 0 } else { WRONG }),
        };
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return fail("no command is named: see pagestitch --help", None, WRONG, Form::Json);
    }
    // The usage follows an empty line.
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = message.trim_start_matches("error: ").split_whitespace().collect();
    fail(&words.join(" "), None, WRONG, Form::Json)
}

/// The text of an error, which names what the user has named. The user has not named the region of
/// this command, so the text begins without it. Other modules name the file in their errors, so an
/// error of the system alone is of standard output.
fn reason(error: &(dyn Error + 'static)) -> String {
    if let Some(OfFile { path, error }) = error.downcast_ref() {
        return format!("{}: {}", path.display(), reason(error.as_ref()));
    }
    let text = match error.downcast_ref::<pagestitch::Error>() {
        Some(error) => terms::of_command(&error.to_string()),
        None => error.to_string(),
    };
    let alone = error.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error().is_some());
    let of = |region| text.strip_prefix(&format!("region {region}: "));
    match (of(stitch::REGION), of(demo::REGION)) {
        (Some(text), _) => of_part(text, error.downcast_ref::<pagestitch::Error>()),
        (_, Some(text)) => text.to_owned(),
        _ if alone => format!("cannot write standard output: {text}"),
        _ => text,
    }
}

/// The user knows a chunk as a part, counted from 1.
fn of_part(text: &str, error: Option<&pagestitch::Error>) -> String {
    let chunk = error.and_then(pagestitch::Error::chunk);
    let named = chunk.and_then(|chunk| Some((chunk + 1, text.strip_prefix(&format!("chunk {chunk} "))?)));
    named.map_or_else(|| text.to_owned(), |(part, rest)| format!("part {part} {rest}"))
}

/// Writes the reason of a failure to standard error.
fn fail(reason: &str, kind: Option<pagestitch::ErrorKind>, status: u8, form: Form) -> ExitCode {
    let line = match form {
        Form::Json => {
            let kind = kind.map(|kind| format!("{kind:?}"));
            json!({"error": reason, "kind": kind, "status": status}).to_string()
        }
        _ => format!("pagestitch: {reason}"),
    };
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::from(status)
}

/// The kind of an error of the library, by which a script can branch.
fn kind_of(error: &(dyn Error + 'static)) -> Option<pagestitch::ErrorKind> {
    if let Some(OfFile { error, .. }) = error.downcast_ref() {
        return kind_of(error.as_ref());
    }
    match error.downcast_ref::<pagestitch_firecracker::Error>() {
        Some(pagestitch_firecracker::Error::Memory(error)) => Some(error.kind()),
        Some(_) => None,
        None => error.downcast_ref::<pagestitch::Error>().map(pagestitch::Error::kind),
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

/// The exit status after wrong arguments.
const WRONG: u8 = 2;
const STATUS: &str = "Exit status: 0 after success, 1 after a failure, 2 after wrong arguments";
/// The heading of the options that every command has.
const OUTPUT: &str = "Output";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Command;

    /// The errors of each option of a command and its subcommands, for the value `x`.
    fn refusals(command: &Command, path: &[&str], said: &mut Vec<(String, String)>) {
        for option in command.get_arguments().filter_map(clap::Arg::get_long) {
            let option = format!("--{option}");
            let arguments = [path, &[&option, "x"]].concat();
            if let Err(error) = Arguments::command().try_get_matches_from(&arguments) {
                said.push((arguments.join(" "), error.to_string()));
            }
        }
        for below in command.get_subcommands() {
            refusals(below, &[path, &[below.get_name()]].concat(), said);
        }
    }

    #[test]
    fn each_number_of_the_command_has_an_error_with_a_remedy() {
        let mut said = Vec::new();
        refusals(&Arguments::command(), &["pagestitch"], &mut said);
        for number in ["stitch --seed x", "demo --seed x", "bench --seed x", "bench --shards x"] {
            assert!(said.iter().any(|(arguments, _)| arguments.ends_with(number)), "{number}: {said:?}");
        }
        for (arguments, error) in said {
            assert!(!error.contains("digit found"), "{arguments}: {error}");
        }
    }
}
