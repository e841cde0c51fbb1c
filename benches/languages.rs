//! Regions in C and Python, beside the same in Rust, an array, and `mmap`. Each measurement is a process of its own, and the
//! processes of a round follow each other. Rows of Python need the environment that `ci/python` makes.
//!
//! `cargo bench -p pagestitch-benches --bench languages` prints each figure beside its target.

use pagestitch::{Pool, Region};
use std::env;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const PAGE: usize = 4096;
/// The distance of the bytes that a scan reads.
const LINE: usize = 64;
const PIECES: usize = 64;

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--measure") {
        return println!("{}", measure(&arguments[at + 1], arguments[at + 2].parse().expect("bytes")));
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let sizes =
        if quick { Sizes { rounds: 1, touched: 4 << 20, summed: 16 << 20, shard: 8 << 20 } } else { FULL };
    println!("{:<72}{:>9}{:>9}{:>9}", "", "median", "least", "target");
    c_rows(&sizes);
    match python() {
        Some(python) => python_rows(&python, &sizes),
        None => eprintln!("SKIPPED the rows of Python: ci/python makes its environment"),
    }
}

struct Sizes {
    rounds: usize,
    touched: usize,
    summed: usize,
    shard: usize,
}

const FULL: Sizes = Sizes { rounds: 15, touched: 256 << 20, summed: 2 << 30, shard: 1 << 30 };

/// The nanoseconds of first touches in Rust, as languages.c makes them in C.
fn measure(workload: &str, bytes: usize) -> u128 {
    let pool = Pool::new().expect("a pool");
    let pieces = (0..PIECES).map(|_| vec![1u8; bytes / PIECES]);
    let region = Region::builder().chunks(pieces).build(&pool).expect("a region");
    let base = region.as_slice();
    let byte = |at: usize| u64::from(black_box(base[at]));
    let (pages, started) = (bytes / PAGE, Instant::now());
    let sum: u64 = match workload {
        "random" => (0..pages).map(|touch| byte(touch * 2_654_435_761 % pages * PAGE)).sum(),
        "fill" => (0..pages).map(|page| byte(page * PAGE)).sum(),
        "scan" => (0..bytes / LINE).map(|line| byte(line * LINE)).sum(),
        other => panic!("no workload {other}"),
    };
    let time = started.elapsed().as_nanos();
    assert_eq!(sum as usize, if workload == "scan" { bytes / LINE } else { pages });
    time
}

fn c_rows(sizes: &Sizes) {
    let program = built_c();
    for workload in ["random", "scan"] {
        let bytes = sizes.touched.to_string();
        let rows = rounds(
            sizes.rounds,
            &mut [&mut || figures(Command::new(&program).args([workload, &bytes])), &mut || {
                rust(workload, sizes.touched)
            }],
        );
        let name = format!("C: first touches, {workload} / the same in Rust");
        print(&name, rows.iter().map(|row| (row[0][0], row[1][0])), "<= 1.02");
    }
}

/// Compiles languages.c with the library that cargo has built for this program.
fn built_c() -> PathBuf {
    let here = env::current_exe().expect("this program");
    let (folder, root) = (here.parent().expect("its folder"), Path::new(env!("CARGO_MANIFEST_DIR")));
    let (program, library) = (folder.join("languages-in-c"), folder.join("libpagestitch_capi.so"));
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-I"]).arg(root.join("../crates/pagestitch-capi/include")).arg(root.join("languages.c"));
    cc.arg(library).arg(format!("-Wl,-rpath,{}", folder.display())).arg("-o").arg(&program);
    assert!(cc.status().expect("a compiler of C").success());
    program
}

fn rust(workload: &str, bytes: usize) -> Vec<f64> {
    let program = env::current_exe().expect("this program");
    figures(Command::new(program).args(["--measure", workload, &bytes.to_string()]))
}

/// The Python that has pagestitch installed.
fn python() -> Option<PathBuf> {
    let here = env::current_exe().ok()?;
    // .../target/release/deps/languages-HASH
    let built = here.ancestors().nth(3)?.join("python/bin/python");
    env::var_os("PAGESTITCH_PYTHON").map(PathBuf::from).or_else(|| built.exists().then_some(built))
}

fn python_rows(python: &Path, sizes: &Sizes) {
    let run = |arguments: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("languages.py");
        figures(Command::new(python).arg(script).args(arguments))
    };
    let summed = sizes.summed.to_string();
    let rows = rounds(
        sizes.rounds,
        &mut [&mut || run(&["region", &summed]), &mut || run(&["array", &summed]), &mut || {
            rust("fill", sizes.summed)
        }],
    );
    let ratios = rows.iter().map(|row| (row[0][0], row[1][0] + row[2][0]));
    print("Python: first touch and sum / (sum of an array + time to touch in Rust)", ratios, "<= 1.05");
    let rows = rounds(sizes.rounds, &mut [&mut || run(&["start"])]);
    let times = rows.iter().map(|row| (row[0][0], 1e6));
    print("Python: import, region of 1,000 pieces, its first touches, in ms", times, "<= 50");
    shard_rows(&run, sizes);
}

/// One tensor out of many shards, where the page cache has it and where it has not.
fn shard_rows(run: &dyn Fn(&[&str]) -> Vec<f64>, sizes: &Sizes) {
    let folder = env::temp_dir().join(format!("pagestitch-languages-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.to_str().expect("a path of text");
    run(&["make", path, &sizes.shard.to_string()]);
    for temperature in ["warm", "cold"] {
        let rows = rounds(
            sizes.rounds,
            &mut [
                &mut || run(&["tensor", "region", temperature, path]),
                &mut || run(&["tensor", "mmap", temperature, path]),
                &mut || run(&["tensor", "read", temperature, path]),
            ],
        );
        let against = |other: usize| rows.iter().map(move |row| (row[0][0], row[other][0]));
        print(&format!("Python: one tensor of 8 shards, {temperature} / mmap"), against(1), "<= 1.02");
        print(&format!("Python: one tensor of 8 shards, {temperature} / read"), against(2), "");
        if temperature == "cold" {
            print(
                "Python: bytes read / bytes of the tensor",
                rows.iter().map(|row| (row[0][1], 1.0)),
                "<= 1.02",
            );
            print(
                "  the same of mmap: more with a larger /sys/block/*/queue/read_ahead_kb",
                rows.iter().map(|row| (row[1][1], 1.0)),
                "",
            );
        }
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
}

/// The figures of each system in each round.
fn rounds(count: usize, systems: &mut [&mut dyn FnMut() -> Vec<f64>]) -> Vec<Vec<Vec<f64>>> {
    let mut rows = Vec::new();
    for round in 0..count {
        let mut row = vec![Vec::new(); systems.len()];
        for turn in 0..systems.len() {
            // Each round begins with another system.
            let system = (turn + round) % systems.len();
            row[system] = systems[system]();
        }
        rows.push(row);
    }
    rows
}

/// The numbers that a program prints.
fn figures(command: &mut Command) -> Vec<f64> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let diagnostics = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{diagnostics}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().map(|word| word.parse().expect("a number")).collect()
}

/// Prints the median of the ratios of two figures in each round, and the ratio of their least ones, which other programs
/// on the machine disturb less.
fn print(name: &str, figures: impl Iterator<Item = (f64, f64)>, target: &str) {
    let (of, to): (Vec<f64>, Vec<f64>) = figures.unzip();
    let mut ratios: Vec<f64> = of.iter().zip(&to).map(|(of, to)| of / to).collect();
    ratios.sort_by(f64::total_cmp);
    let least = |figures: &[f64]| figures.iter().copied().fold(f64::INFINITY, f64::min);
    let (median, of_least) = (ratios[ratios.len() / 2], least(&of) / least(&to));
    println!("{name:<72}{median:>9.3}{of_least:>9.3}{target:>9}");
}
