//! `pagestitch stitch`: parts of files as one contiguous region.

use crate::files::{self, OfFile, Output, is_stdin, is_stdout, refuse_input};
use crate::heatmap;
use crate::live::{self, Live};
use crate::number;
use crate::output::{Form, Progress, bytes, count, hexadecimal, nanoseconds, workers};
use crate::part::Part;
use crate::scene::Scene;
use crate::size;
use crate::touch::Touch;
use crate::usage::Usage;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use hdrhistogram::Histogram;
use pagestitch::source::{FileSource, Memfd, SharedFile, UnsealedMemfd};
use pagestitch::{
    Access, BestServer, Budget, BudgetMetrics, Chunk, ErrorKind, Metrics, Plan, Pool, Recording, Region,
    SharedRegion, Source,
};
use pagestitch_bench::timed;
use pagestitch_bench::touch::touches;
use pagestitch_kernel::memory_left::MemoryLeft;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io::{self, Read, Write, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::exit;

/// The name of the region.
pub(crate) const REGION: &str = "stitched";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Files, or parts of files, in order: PATH or PATH:OFFSET+LENGTH. Both are sizes, such as
    /// 4096, 0x1000, 64K or 2G. The path - is standard input, which is read to its end first; a part
    /// of it needs -- before: stitch a.bin -- -:64K+2G
    #[arg(required = true, value_name = "PART", value_parser = parts())]
    parts: Vec<Part>,
    /// Print the SHA-256 of the whole region
    #[arg(long)]
    sha256: bool,
    /// Copy every page when it is touched, even if the page of the file could be mapped
    #[arg(long)]
    copy: bool,
    /// Print the method that installs each run of chunks, with its reason
    #[arg(long)]
    explain: bool,
    /// Touch pages and print the latencies: sequential, random, or a share of them: random:10%; or few
    /// pages most of the time, by Zipf's law with this skew and so many touches: zipf:0.99:1000000. A
    /// file that is truncated meanwhile ends the command with SIGBUS
    #[arg(long, value_name = "ORDER")]
    touch: Option<Touch>,
    /// Write the whole region to a file, which appears when it is complete, or to standard output
    /// with -
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The number of handler threads [default: one per CPU, at most 32]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = workers())]
    workers: Option<usize>,
    /// Write the order of the first touches by --touch. Needs --copy, because a touch of a mapped
    /// page goes unnoticed
    #[arg(long, value_name = "FILE", requires_all = ["copy", "touch"])]
    record: Option<PathBuf>,
    /// Fill the pages of a recording in advance
    #[arg(long, value_name = "FILE", requires = "copy", conflicts_with = "record")]
    replay: Option<PathBuf>,
    /// Keep at most this many bytes of the region in memory: 512M. Pages leave, and are read again when
    /// they are touched. Copies pages, as --copy, because mapped pages are page cache
    #[arg(long, value_name = "BYTES", value_parser = memory, conflicts_with = "record")]
    memory: Option<u64>,
    /// Draw a map of the region with its counters while it is touched, hashed or written
    #[arg(long, conflicts_with = "json")]
    live: bool,
    /// Write a map of the filled pages at the end
    #[arg(long, value_name = "FILE.svg")]
    heatmap: Option<PathBuf>,
    /// Decides a random order
    #[arg(long, allow_negative_numbers = true, default_value_t = 1, value_parser = number::any)]
    seed: u64,
}

/// The results of a run, as far as the options ask for them.
struct Summary {
    bytes: usize,
    chunks: usize,
    build_ns: u64,
    /// True if the build has filled all pages, without userfaultfd.
    is_eager: bool,
    latencies: Option<Latencies>,
    sha256: Option<String>,
    plan: Option<Plan>,
    metrics: Metrics,
    /// The counts of the limit of --memory.
    budget: Option<BudgetMetrics>,
}

pub(crate) fn run(options: &Options, form: Form) -> Result<(), Box<dyn Error>> {
    check_outputs(options)?;
    let mut pool = Pool::builder();
    if let Some(workers) = options.workers {
        pool = pool.workers(workers);
    }
    let server = pool.start_or_eager()?;
    if form == Form::Text && server.pool().is_none() {
        writeln!(io::stderr(), "{server}")?;
    }
    let budget = options.memory.map(Budget::bytes).transpose().map_err(refused)?;
    let (build_ns, region) = timed(|| build(options, budget.as_ref(), &server));
    let region = region?;
    let output = options.output.as_deref().map(Output::open).transpose()?;
    let left = output.as_ref().and_then(Output::left_by_a_kill).map(Path::to_owned);
    if let Some(part) = left.clone() {
        ctrlc::set_handler(move || {
            let _ = fs::remove_file(&part);
            exit(130);
        })?;
    }
    let scene = Scene::default();
    match &budget {
        Some(budget) => scene.add_limited(region.meter(), budget.clone()),
        None => scene.add(region.meter()),
    }
    let quit = move || {
        left.iter().for_each(|part| drop(fs::remove_file(part)));
        live::quit();
    };
    let live = options.live.then(|| Live::show(&scene, quit)).transpose()?;
    let hidden = options.live || form == Form::Quiet;
    let latencies = options.touch.map(|touch| touch_pages(&region, touch, options.seed, hidden));
    // Hashing and writing read the pages without touching them, so the recording ends here.
    if let (Some(path), Some(recording)) = (&options.record, region.recording()) {
        recording.write(path)?;
    }
    let blocks = Blocks { region: &region, hidden };
    let sha256 = options.sha256.then(|| blocks.sha256()).transpose()?;
    if let Some(output) = output {
        blocks.write_out(output)?;
    }
    // Without an option for output, a read of all bytes proves that they are available.
    if !options.explain && latencies.is_none() && sha256.is_none() && options.output.is_none() {
        blocks.each("stitching", |_| Ok(()))?;
    }
    drop(live);
    if let Some(path) = &options.heatmap {
        heatmap::write(path, &region.meter())?;
    }
    let (bytes, plan) = (region.len(), options.explain.then(|| region.plan()));
    let (chunks, is_eager) = (options.parts.len(), server.pool().is_none());
    // The close of the region frees the memory that the budget counts.
    let (budget, metrics) = (budget.map(|budget| budget.metrics()), region.close());
    let summary = Summary { bytes, chunks, build_ns, is_eager, latencies, sha256, plan, metrics, budget };
    // Standard output may carry the bytes of the region.
    let mut out: Box<dyn Write> =
        if options.to_stdout() { Box::new(io::stderr()) } else { Box::new(stdout()) };
    match form {
        Form::Json => print_json(&mut out, &summary)?,
        Form::Text => print(&mut out, &summary, true)?,
        Form::Quiet => print(&mut out, &summary, false)?,
    }
    Ok(())
}

impl Options {
    /// True if pages are touched. A touch of a page that cannot be filled ends the process.
    pub(crate) const fn touches(&self) -> bool {
        self.touch.is_some()
    }

    /// True if each page is copied when it is touched.
    const fn copies(&self) -> bool {
        self.copy || self.memory.is_some()
    }

    /// True if standard output carries the bytes of the region.
    fn to_stdout(&self) -> bool {
        self.output.as_deref().is_some_and(is_stdout)
    }
}

/// The durations of touches, in nanoseconds.
struct Latencies {
    each: Histogram<u64>,
    /// True if pages were touched more than once.
    again: bool,
}

/// Touches pages, and times each touch.
fn touch_pages(region: &SharedRegion, touch: Touch, seed: u64, hidden: bool) -> Latencies {
    let page = pagestitch::Support::current().page_size().bytes();
    let offsets = touch.offsets(region.len(), page, seed);
    let total = offsets.size_hint().0 * page;
    let mut progress = Progress::new("touching", total as u64, hidden);
    let offsets = offsets.inspect(|_| progress.advance(page as u64));
    let each = touches(offsets, |offset| region.view().touch(offset));
    Latencies { each, again: matches!(touch, Touch::Zipf { .. }) }
}

/// Parses a part. A malformed range is a wrong argument.
fn parts() -> impl TypedValueParser<Value = Part> {
    OsStringValueParser::new().try_map(|argument| Part::parse(&argument))
}

/// Parses the bytes of a limit.
fn memory(text: &str) -> Result<u64, String> {
    let unusable = || format!("it is no number of bytes: write {}", size::examples!());
    size::parse(text).ok_or_else(unusable)
}

/// An option whose value the library refuses is a wrong argument, unless a larger machine would take it.
fn refused(error: pagestitch::Error) -> Box<dyn Error> {
    match (error.kind(), error.limit()) {
        (ErrorKind::InvalidOption, None) => Usage(error.to_string()).into(),
        _ => error.into(),
    }
}

fn build(
    options: &Options,
    budget: Option<&Budget>,
    server: &BestServer,
) -> Result<SharedRegion, Box<dyn Error>> {
    let mut files: HashMap<&PathBuf, Chunk> = HashMap::new();
    let mut builder = Region::builder().name(REGION);
    for part in &options.parts {
        let chunk = match files.get(&part.path) {
            Some(chunk) => chunk.clone(),
            None => files.entry(&part.path).or_insert(open(&part.path, options.copies())?).clone(),
        };
        check_end(part)?;
        builder = builder.chunk(match &part.range {
            Some(range) => chunk.range(range.clone()),
            None => chunk,
        });
    }
    if options.record.is_some() {
        builder = builder.record();
    }
    if let Some(budget) = budget {
        builder = builder.budget(budget);
    }
    if let Some(path) = &options.replay {
        builder = builder.replay(&Recording::read(path)?);
    }
    if options.live {
        builder = builder.record_latency();
    }
    builder.build_shared(server).map_err(|error| match &options.replay {
        Some(path) if error.kind() == ErrorKind::InvalidRecording => {
            OfFile { path: path.clone(), error: error.into() }.into()
        }
        _ => error.into(),
    })
}

/// Refuses a file that has fewer bytes than its length, as those of sysfs. Such a file has no blocks, as a
/// sparse one.
fn check_end(part: &Part) -> Result<(), Box<dyn Error>> {
    let path = &part.path;
    if is_stdin(path) || !fs::metadata(path).is_ok_and(|file| file.is_file() && file.blocks() == 0) {
        return Ok(());
    }
    let file = FileSource::open(path)?;
    let end = part.range.as_ref().map_or_else(|| file.size(), |range| range.end);
    match end.checked_sub(1).map(|last| file.read_at(last, &mut [0])) {
        Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof && end <= file.size() => {
            let path = path.display();
            Err(format!("{path} has fewer bytes than its length, as files of sysfs: {OMIT_OR_SEND}").into())
        }
        _ => Ok(()),
    }
}

/// The remedy for a file without a length.
const OMIT_OR_SEND: &str = "omit this part, or send it to standard input as the part -";

/// Opens a file as a chunk, which is mapped if possible, unless `copy` is set.
fn open(path: &Path, copy: bool) -> Result<Chunk, Box<dyn Error>> {
    if is_stdin(path) {
        return Ok(standard_input(copy).map_err(|error| format!("cannot read standard input: {error}"))?);
    }
    // The source of a file reports its defects by name, and also reads block devices.
    let read = FileSource::open(path)?;
    if read.size() == 0 {
        let path = path.display();
        return Err(format!("{path} is empty, or has no length, as files of /proc: {OMIT_OR_SEND}").into());
    }
    if copy || !fs::metadata(path).is_ok_and(|file| file.is_file()) {
        return Ok(read.into());
    }
    Ok(SharedFile::open(path, Access::ReadOnly)?.into())
}

/// Reads standard input to its end, into a memfd whose pages are mapped, unless `copy` is set.
fn standard_input(copy: bool) -> io::Result<Chunk> {
    let left = MemoryLeft::now().map_or(u64::MAX, |left| left.bytes);
    let mut input = io::stdin().lock();
    if copy {
        let mut bytes = Vec::new();
        // The region copies them.
        take_input(&mut input, &mut bytes, left / 2)?;
        return Ok(bytes.into());
    }
    let memfd = UnsealedMemfd::create("standard input", 0)?;
    take_input(&mut input, &mut memfd.file(), left)?;
    Ok(Memfd::from(memfd.seal()?).into())
}

/// Reads an input to its end, which must come after a byte and within `most` bytes, because an
/// endless input would take all memory.
fn take_input(input: impl Read, into: &mut impl Write, most: u64) -> io::Result<()> {
    match io::copy(&mut input.take(most.saturating_add(1)), into)? {
        0 => Err(io::Error::other("it is empty: send bytes to it, or omit the part -")),
        taken if taken > most => Err(io::Error::other(format!(
            "it has more bytes than the {} of memory that are left: write it to a file, and name the file",
            bytes(most)
        ))),
        _ => Ok(()),
    }
}

/// Checks the outputs before the work begins.
fn check_outputs(options: &Options) -> Result<(), Box<dyn Error>> {
    let to_stdout = options.to_stdout();
    if options.live && to_stdout {
        return Err(Usage(String::from("--live draws on standard output: write the region to a file")).into());
    }
    let parts = options.parts.iter().map(|part| ("part", part.path.as_path()));
    let inputs: Vec<_> = parts.chain(options.replay.as_deref().map(|path| ("recording", path))).collect();
    if let Some(output) = options.output.as_deref().filter(|_| !to_stdout) {
        refuse_input(&inputs, "output", output)?;
    }
    let record = options.record.as_deref().map(|path| ("recording", path));
    let heatmap = options.heatmap.as_deref().map(|path| ("map", path));
    let outputs = options.output.as_deref().filter(|_| !to_stdout).map(|path| ("output", path));
    files::check(record.into_iter().chain(heatmap), &[inputs, outputs.into_iter().collect()].concat())
}

/// Reads a region block by block, so that an unreadable page is an error and not a signal.
struct Blocks<'a> {
    region: &'a SharedRegion,
    /// True if the progress bar is hidden.
    hidden: bool,
}

impl Blocks<'_> {
    /// The SHA-256 of the region, in hexadecimal.
    fn sha256(&self) -> Result<String, Box<dyn Error>> {
        let mut hash = Sha256::new();
        self.each("hashing", |block| {
            hash.update(block);
            Ok(())
        })?;
        Ok(hexadecimal(&hash.finalize()))
    }

    fn write_out(&self, output: Output<'_>) -> Result<(), Box<dyn Error>> {
        let mut out = output.writer();
        self.each("writing", |block| out.write_all(block).map_err(|error| output.name(&error)))?;
        out.flush().map_err(|error| output.name(&error))?;
        drop(out);
        Ok(output.commit()?)
    }

    fn each(
        &self,
        task: &'static str,
        mut work: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Box<dyn Error>> {
        let len = self.region.len();
        let mut progress = Progress::new(task, len as u64, self.hidden);
        let mut block = vec![0; BLOCK.min(len)];
        for start in (0..len).step_by(BLOCK) {
            let bytes = &mut block[..BLOCK.min(len - start)];
            self.region.read_at(start as u64, bytes)?;
            work(bytes)?;
            progress.advance(bytes.len() as u64);
        }
        Ok(())
    }
}

/// Prints the requested results, and with `counters` how they were made.
fn print(out: &mut dyn Write, summary: &Summary, counters: bool) -> io::Result<()> {
    if let Some(plan) = &summary.plan {
        write!(out, "{plan}")?;
    }
    if counters {
        print_counters(out, summary)?;
    }
    if let Some(Latencies { each: latencies, again }) = &summary.latencies {
        let at = |quantile| nanoseconds(latencies.value_at_quantile(quantile));
        let (number, max) = (latencies.len() as usize, nanoseconds(latencies.max()));
        let touches = match again {
            true => format!("{number} touches"),
            false => format!("{} touched", count(number, "page")),
        };
        writeln!(out, "{touches}: p50 {}, p99 {}, max {max}", at(0.5), at(0.99))?;
    }
    if let Some(sha256) = &summary.sha256 {
        writeln!(out, "{sha256}  stitched")?;
    }
    Ok(())
}

fn print_counters(out: &mut dyn Write, summary: &Summary) -> io::Result<()> {
    let Summary { bytes: len, chunks, build_ns, metrics, .. } = summary;
    // A size below a KiB is exact already.
    let exact = if *len < 1024 { String::new() } else { format!(" ({len} bytes)") };
    let (chunks, size) = (count(*chunks, "chunk"), bytes(*len as u64));
    writeln!(out, "{chunks}, {size}{exact} in one region, built in {}", nanoseconds(*build_ns))?;
    writeln!(
        out,
        "{} in place, {} installed, {} of them gathered; {} copied; {}",
        count(metrics.pages_in_place as usize, "page"),
        metrics.pages_installed(),
        metrics.pages_gathered,
        bytes(metrics.bytes_copied),
        count(metrics.faults as usize, "fault")
    )?;
    let Some(budget) = &summary.budget else { return Ok(()) };
    writeln!(
        out,
        "{} in memory at the end, {} of them on standby; {} evicted, {} back from standby, {} read again; threads waited {} for memory",
        bytes(budget.resident_bytes),
        bytes(budget.standby_bytes),
        count(budget.evictions as usize, "page"),
        budget.soft_faults,
        budget.refaults,
        nanoseconds(budget.stalled.as_nanos() as u64),
    )
}

fn print_json(out: &mut dyn Write, summary: &Summary) -> io::Result<()> {
    let Summary { bytes, chunks, build_ns, is_eager, latencies, sha256, plan, metrics, budget } = summary;
    let touch = latencies.as_ref().map(|Latencies { each: latencies, again }| {
        let at = |quantile| latencies.value_at_quantile(quantile);
        json!({if *again { "touches" } else { "pages" }: latencies.len(), "p50_ns": at(0.5), "p99_ns": at(0.99), "max_ns": latencies.max()})
    });
    let plan = plan.as_ref().map(|plan| {
        let run = |run: &pagestitch::PlanRun| {
            json!({
                "offset": run.offsets.start, "bytes": run.offsets.end - run.offsets.start, "first_chunk": run.chunks.start,
                "chunks": run.chunks.len(), "source": run.source, "method": run.method.to_string(), "reason": run.reason.to_string(),
            })
        };
        plan.runs().iter().map(run).collect::<Vec<_>>()
    });
    let budget = budget.map(|budget| {
        json!({
            "resident_bytes": budget.resident_bytes, "standby_bytes": budget.standby_bytes, "evictions": budget.evictions,
            "soft_faults": budget.soft_faults, "refaults": budget.refaults, "overruns": budget.overruns, "kept": budget.kept,
            "stalled_ns": budget.stalled.as_nanos() as u64, "dirty_bytes": budget.dirty_bytes, "write_backs": budget.write_backs,
            "write_failures": budget.write_failures,
        })
    });
    let all = json!({
        "bytes": bytes, "chunks": chunks, "build_ns": build_ns, "server": if *is_eager { "eager" } else { "pool" }, "pages_in_place": metrics.pages_in_place, "pages_installed": metrics.pages_installed(),
        "pages_gathered": metrics.pages_gathered, "bytes_copied": metrics.bytes_copied, "faults": metrics.faults,
        "touch": touch, "sha256": sha256, "plan": plan, "memory": budget,
    });
    writeln!(out, "{all}")
}

const BLOCK: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_is_empty_or_larger_than_the_memory_is_refused() {
        let take = |input: &[u8], most| {
            let mut taken = Vec::new();
            take_input(input, &mut taken, most).map(|()| taken).map_err(|error| error.to_string())
        };
        assert_eq!(take(b"seven b", 7), Ok(b"seven b".to_vec()));
        assert!(take(b"seven b", 6).is_err_and(|error| error.contains("than the 6 bytes of memory")));
        assert!(take_input(io::repeat(0), &mut io::sink(), 1 << 20).is_err(), "an endless input");
        assert!(take(b"", 7).is_err_and(|error| error.contains("it is empty")));
    }
}
