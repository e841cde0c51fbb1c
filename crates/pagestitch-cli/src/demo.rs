//! `pagestitch demo`: stitches pieces of a real file and of memory, and checks the result.

mod bounded;

use crate::number;
use crate::output::{Form, bytes, count, hexadecimal, nanoseconds, table};
use crate::touch::Touch;
use bounded::Bounded;
use clap::Args;
use hdrhistogram::Histogram;
use pagestitch::source::{FileSource, Memory};
use pagestitch::{BestServer, Chunk, Metrics, Region, Source, Support, best_server};
use pagestitch_bench::touch::first_touches;
use pagestitch_bench::{timed, warm};
use pagestitch_kernel::memory_left::MemoryLeft;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::error::Error;
use std::fs;
use std::io::{Write, stdout};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of the region.
pub(crate) const REGION: &str = "demo";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The file to cut into pieces [default: this program]
    #[arg(long, value_name = "FILE", default_value = "/proc/self/exe", hide_default_value = true)]
    file: PathBuf,
    /// Touch this share of the pages before the check of all bytes
    #[arg(long, value_name = "ORDER[:SHARE]", default_value = "random:2%", value_parser = Touch::once)]
    touch: Touch,
    /// Decides the cuts in the file and the touched pages
    #[arg(long, allow_negative_numbers = true, default_value_t = 1, value_parser = number::any)]
    seed: u64,
}

/// The figures of the demo.
struct Measurement {
    /// True if the build has filled all pages, without userfaultfd.
    is_eager: bool,
    pieces: usize,
    len: usize,
    build_ns: u64,
    touch_ns: u64,
    eager_ns: u64,
    latencies: Histogram<u64>,
    after_touch: Metrics,
    sha256: String,
    expected: String,
    /// `None` without userfaultfd, because pages do not leave then.
    bounded: Option<Bounded>,
}

pub(crate) fn run(options: &Options, form: Form) -> Result<(), Box<dyn Error>> {
    // Before the introduction, which announces a region.
    let server = best_server()?;
    let path = fs::canonicalize(&options.file).unwrap_or_else(|_| options.file.clone());
    let file = Arc::new(FileSource::open(&path)?);
    let content = read(&path, &file)?;
    let cuts = cut_at_random(content.len(), options.seed);
    if form == Form::Text {
        writeln!(
            stdout(),
            "{} ({}) is cut into {} at odd offsets.",
            path.display(),
            bytes(content.len() as u64),
            count(cuts.len(), "piece")
        )?;
        writeln!(
            stdout(),
            "Every other piece is a heap buffer of its own; the rest stays in the file. One region shows all of them in order.\n"
        )?;
    }
    if form == Form::Text && server.pool().is_none() {
        writeln!(stdout(), "{server}\n")?;
    }
    let measured = measure(options, &path, &file, &content, (&cuts, &server))?;
    match form {
        Form::Text => print(&measured)?,
        Form::Json => print_json(&measured)?,
        Form::Quiet => {}
    }
    if measured.sha256 != measured.expected {
        return Err(format!(
            "the region's SHA-256 is {}, but the file's is {}: report this defect of pagestitch",
            measured.sha256, measured.expected
        )
        .into());
    }
    match &measured.bounded {
        Some(bounded) if !bounded.is_right() => {
            Err(format!("{} Report this defect of pagestitch", bounded.line()).into())
        }
        _ => Ok(()),
    }
}

/// Reads the whole file.
fn read(path: &Path, file: &FileSource) -> Result<Vec<u8>, Box<dyn Error>> {
    let (shown, len) = (path.display(), file.size());
    if len == 0 {
        return Err(
            format!("{shown} is empty, or has no length, as files of /proc: name a file with bytes").into()
        );
    }
    let left = MemoryLeft::now().map_or(u64::MAX, |left| left.bytes);
    if len > left / COPIES {
        let (len, left) = (bytes(len), bytes(left));
        return Err(format!(
            "{shown} has {len}, and the demo holds {COPIES} copies in the {left} of memory that are left: name a smaller file"
        )
        .into());
    }
    let mut content = vec![0; usize::try_from(len)?];
    file.read_at(0, &mut content)
        .map_err(|error| format!("cannot read {shown}: {error}: name another file"))?;
    Ok(content)
}

/// Cuts `len` bytes into some hundred pieces, from a few bytes to many pages long.
fn cut_at_random(len: usize, seed: u64) -> Vec<Range<usize>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cuts = Vec::new();
    let mut start = 0;
    while start < len {
        let longest = (len / 100).max(2) << random.usize(0..3) >> 1;
        let end = (start + random.usize(1..=longest.max(1))).min(len);
        cuts.push(start..end);
        start = end;
    }
    cuts
}

fn measure(
    options: &Options,
    path: &Path,
    file: &Arc<FileSource>,
    content: &[u8],
    (cuts, server): (&[Range<usize>], &BestServer),
) -> Result<Measurement, Box<dyn Error>> {
    let buffers: Vec<Memory> =
        cuts.iter().step_by(2).map(|cut| Memory::from(content[cut.clone()].to_vec())).collect();
    let build = || {
        let chunks = cuts.iter().enumerate().map(|(index, cut)| match index % 2 {
            0 => Chunk::from(buffers[index / 2].clone()),
            _ => Chunk::from(Arc::clone(file)).range(cut.start as u64..cut.end as u64),
        });
        Region::builder().name(REGION).chunks(chunks).build(server)
    };
    warm(3 * content.len());
    let (build_ns, region) = timed(build);
    let region = region?;
    let page = Support::current().page_size().bytes();
    let offsets = options.touch.offsets(region.len(), page, options.seed);
    let (touch_ns, latencies) = timed(|| first_touches(region.as_slice(), offsets));
    let len = region.len();
    let after_touch = region.close();
    let (eager_ns, copy) = timed(|| copy_eagerly(&buffers, path, cuts));
    let expected = hexadecimal(&Sha256::digest(copy?));
    let again = build()?;
    again.populate(..)?;
    let sha256 = hexadecimal(&Sha256::digest(again.as_slice()));
    drop(again);
    let bounded = server.pool().map(|_| Bounded::read(content)).transpose()?;
    Ok(Measurement {
        is_eager: server.pool().is_none(),
        pieces: cuts.len(),
        len,
        build_ns,
        touch_ns,
        eager_ns,
        latencies,
        after_touch,
        sha256,
        expected,
        bounded,
    })
}

/// The plain way: copies all pieces into one buffer.
fn copy_eagerly(buffers: &[Memory], path: &Path, cuts: &[Range<usize>]) -> Result<Vec<u8>, Box<dyn Error>> {
    let file = FileSource::open(path)?;
    let mut copy = vec![0; cuts.last().map_or(0, |cut| cut.end)];
    for (index, cut) in cuts.iter().enumerate() {
        let into = &mut copy[cut.clone()];
        match index % 2 {
            0 => buffers[index / 2].read_at(0, into)?,
            _ => file.read_at(cut.start as u64, into)?,
        }
    }
    Ok(copy)
}

fn print(measured: &Measurement) -> Result<(), Box<dyn Error>> {
    let Measurement { len, build_ns, touch_ns, eager_ns, latencies, after_touch, .. } = measured;
    let at = |quantile| nanoseconds(latencies.value_at_quantile(quantile));
    let pages = len.div_ceil(Support::current().page_size().bytes());
    let mut out = stdout();
    let (pieces, sha256, expected) = (measured.pieces, &measured.sha256, &measured.expected);
    let verdict = if sha256 == expected { "equal" } else { "DIFFERENT" };
    writeln!(out, "SHA-256 of the file    {expected}\nSHA-256 of the region  {sha256}  {verdict}\n")?;
    let mut table = table(&["result", ""]);
    let ratio = |lazy: u64| format!("{:.2} of the eager copy", lazy as f64 / *eager_ns as f64);
    for (name, value) in [
        ("pieces, pages in the region", format!("{pieces}, {pages}")),
        ("pages touched", latencies.len().to_string()),
        ("bytes copied for these", format!("{} of {}", bytes(after_touch.bytes_copied), bytes(*len as u64))),
        ("pages copied, read, gathered", {
            let Metrics { pages_copied, pages_buffered, pages_gathered, .. } = after_touch;
            format!("{pages_copied}, {pages_buffered}, {pages_gathered}")
        }),
        (
            "first touch: p50, p99, max",
            format!("{}, {}, {}", at(0.5), at(0.99), nanoseconds(latencies.max())),
        ),
        ("eager copy", nanoseconds(*eager_ns)),
        ("region ready", format!("{}: {}", nanoseconds(*build_ns), ratio(*build_ns))),
        (
            "region ready and touched",
            format!("{}: {}", nanoseconds(build_ns + touch_ns), ratio(build_ns + touch_ns)),
        ),
    ] {
        table.add_row([name, &value]);
    }
    writeln!(out, "{table}")?;
    match &measured.bounded {
        Some(bounded) => writeln!(out, "\n{}", bounded.line())?,
        None => writeln!(out, "\nNo budget was shown: without userfaultfd, pages do not leave.")?,
    }
    Ok(())
}

fn print_json(measured: &Measurement) -> Result<(), Box<dyn Error>> {
    let Measurement {
        is_eager,
        pieces,
        len,
        build_ns,
        touch_ns,
        eager_ns,
        latencies,
        after_touch,
        sha256,
        expected,
        bounded,
    } = measured;
    let at = |quantile| latencies.value_at_quantile(quantile);
    let all = json!({
        "server": if *is_eager { "eager" } else { "pool" }, "pieces": pieces, "bytes": len, "pages_touched": latencies.len(), "bytes_copied": after_touch.bytes_copied,
        "pages_copied": after_touch.pages_copied, "pages_buffered": after_touch.pages_buffered,
        "pages_gathered": after_touch.pages_gathered, "p50_ns": at(0.5), "p99_ns": at(0.99), "max_ns": latencies.max(),
        "build_ns": build_ns, "touch_ns": touch_ns, "eager_ns": eager_ns, "sha256": sha256, "sha256_matches": sha256 == expected,
        "bounded": bounded.as_ref().map(Bounded::json),
    });
    writeln!(stdout(), "{all}")?;
    Ok(())
}

/// The file's own bytes, the buffers of the pieces, the region, and the eager copy.
const COPIES: u64 = 4;
