//! `pagestitch bench`: the cost of a fault, beside plain ways to get the same bytes, in the same
//! run.

use crate::files;
use crate::log;
use crate::number;
use crate::output::Form;
use crate::usage::Usage;
use clap::Args;
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use pagestitch_bench::environment::Environment;
use pagestitch_bench::many_cores;
use pagestitch_bench::report::compare::{self, Comparison, compare};
use pagestitch_bench::report::{page::page, table::table};
use pagestitch_bench::row::{Measured, Row};
use pagestitch_bench::runner::{self, Watcher};
use pagestitch_bench::threads::Threads;
use pagestitch_bench::workloads::{self, Workload};
use serde_json::json;
use std::error::Error;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The workloads to measure [default: all]
    #[arg(value_name = "WORKLOAD", value_parser = PossibleValuesParser::new(workloads::ALL.iter().map(|known| known.name)))]
    workloads: Vec<String>,
    /// The number of rounds; in each round every system runs once, right after the others
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 5, value_parser = number::up_to::<u16>(u16::MAX.into()))]
    rounds: u16,
    /// Decides the order of chunks and of touches
    #[arg(long, allow_negative_numbers = true, default_value_t = 1, value_parser = number::any)]
    seed: u64,
    /// The numbers of threads that touch, such as 1,2,4: each is a point of the workloads latency,
    /// scan, parallel, scaling, restore and populate. More threads than CPUs are marked in the results
    #[arg(long, value_name = "LIST")]
    threads: Option<Threads>,
    /// The number of shards of each region on a pool in the workload scaling [default: that of the
    /// library]
    #[arg(long, value_name = "N", value_parser = number::up_to::<u16>(u16::MAX.into()))]
    shards: Option<u16>,
    /// Measure small sizes, as a smoke test: the figures mean little
    #[arg(long)]
    quick: bool,
    /// Measure the workload scaling and points of others, in under four minutes on an idle machine,
    /// and print a table of figures by the number of threads and of ratios with their targets, in
    /// Markdown
    #[arg(long)]
    table: bool,
    /// Write an HTML page with tables and curves, which needs no other file
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Compare with the output of an earlier run with --json
    #[arg(long, value_name = "FILE.json")]
    compare: Option<PathBuf>,
}

pub(crate) fn run(options: &Options, form: Form) -> Result<(), Box<dyn Error>> {
    options.check()?;
    pagestitch::Support::probe().features()?;
    // Checked before the measurement, which takes minutes.
    let inputs: Vec<_> = options.compare.as_deref().map(|path| ("earlier run", path)).into_iter().collect();
    files::check(options.report.as_deref().map(|path| ("report", path)), &inputs)?;
    let earlier = options.compare.as_deref().map(read_earlier).transpose()?;
    let environment = Environment::current();
    let as_json = form == Form::Json;
    if form == Form::Text {
        writeln!(stdout(), "{environment}")?;
    }
    let mut watcher = Bar::new(form)?;
    let mut runs: Vec<(&Workload, Vec<Measured>)> = Vec::new();
    for (workload, measuring) in options.plan() {
        if watcher.ended() {
            break;
        }
        let measured = runner::run(workload, &measuring, &mut watcher);
        watcher.bar.finish_and_clear();
        print(workload, &measured, as_json)?;
        runs.push((workload, measured));
    }
    let rows: Vec<Row> = runs.iter().flat_map(|(_, run)| run).map(|one| one.row.clone()).collect();
    if options.table && !as_json {
        write!(stdout(), "{}", many_cores::table(&rows))?;
    }
    let comparisons = earlier.map(|earlier| compare(&earlier, &rows));
    if let Some(comparisons) = &comparisons {
        print_comparisons(comparisons, as_json)?;
    }
    if let Some(path) = &options.report {
        files::write(path, page(&environment, &runs, &comparisons.unwrap_or_default())?.as_bytes())?;
        log::note(form, &format!("wrote {}", path.display()));
    }
    Ok(())
}

impl Options {
    /// Refuses an option that none of the workloads has.
    fn check(&self) -> Result<(), Usage> {
        let takers: Vec<&str> =
            workloads::ALL.iter().filter(|known| known.takes_threads()).map(|known| known.name).collect();
        let other = self.workloads.iter().find(|name| !takers.contains(&name.as_str()));
        if self.table && self.workloads.iter().any(|name| name != "scaling") {
            return Err(Usage(String::from("--table has its own workloads: name none, or scaling")));
        }
        if let Some(other) = self.workloads.iter().find(|name| self.shards.is_some() && *name != "scaling") {
            let what =
                format!("the workload {other} has no --shards: leave the option out, or measure scaling");
            return Err(Usage(what));
        }
        match (&self.threads, other) {
            (Some(_), Some(name)) => Err(Usage(format!(
                "the workload {name} has no --threads: leave the option out, or measure {}",
                takers.join(", ")
            ))),
            _ => Ok(()),
        }
    }

    fn measuring(&self) -> runner::Options {
        runner::Options {
            rounds: usize::from(self.rounds),
            seed: self.seed,
            quick: self.quick,
            threads: self.threads.clone(),
            shards: self.shards.map(usize::from),
            ..runner::Options::default()
        }
    }

    /// The workloads to measure, each with its options.
    fn plan(&self) -> Vec<(&'static Workload, runner::Options)> {
        let measuring = self.measuring();
        if self.table {
            return many_cores::plan(&measuring);
        }
        let wanted = workloads::ALL.iter().filter(|known| self.wants(known));
        wanted.map(|workload| (workload, measuring.clone())).collect()
    }

    fn wants(&self, workload: &Workload) -> bool {
        self.workloads.is_empty() || self.workloads.iter().any(|name| name == workload.name)
    }
}

/// Prints a table, or an object for each comparison: to standard error, because standard output
/// carries rows that a later run can be compared with.
fn print_comparisons(comparisons: &[Comparison], as_json: bool) -> Result<(), Box<dyn Error>> {
    if !as_json {
        return Ok(stdout().write_all(compare::table(comparisons).as_bytes())?);
    }
    let mut err = stderr().lock();
    for comparison in comparisons {
        writeln!(err, "{}", json!({"comparison": comparison}))?;
    }
    Ok(())
}

fn read_earlier(path: &Path) -> Result<Vec<Row>, String> {
    compare::read(path).map_err(|error| format!("cannot compare with {}: {error}", path.display()))
}

fn print(workload: &Workload, measured: &[Measured], as_json: bool) -> Result<(), Box<dyn Error>> {
    let mut out = stdout().lock();
    if !as_json {
        return Ok(write!(out, "{}", table(workload, measured))?);
    }
    for Measured { row, .. } in measured {
        writeln!(out, "{}", serde_json::to_string(row)?)?;
    }
    Ok(())
}

/// A progress bar on a terminal. The first Ctrl-C ends the run after the complete rounds, the
/// second one at once.
struct Bar {
    bar: ProgressBar,
    hidden: bool,
    interrupted: Arc<AtomicBool>,
}

impl Bar {
    fn new(form: Form) -> Result<Self, Box<dyn Error>> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&interrupted);
        ctrlc::set_handler(move || {
            if seen.swap(true, Ordering::Relaxed) {
                exit(130);
            }
            if stderr().is_terminal() {
                // The line of ^C ends.
                let _ = writeln!(stderr());
            }
            log::note(form, "ending after the complete rounds; press Ctrl-C again to end at once");
        })?;
        Ok(Self { bar: ProgressBar::hidden(), hidden: form == Form::Quiet, interrupted })
    }

    fn ended(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Watcher for Bar {
    fn next(&mut self, done: usize, of: usize, case: &str) -> bool {
        if done == 0 && !self.hidden && stderr().is_terminal() {
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}");
            self.bar =
                ProgressBar::new(of as u64).with_style(style.expect("a template that indicatif takes"));
        }
        self.bar.set_position(done as u64);
        self.bar.set_message(case.to_owned());
        !self.ended()
    }
}
