//! The command as a person uses it: its output, and one clear line for each error.

mod benchmarks;
mod interrupted;
mod output;
mod refused;

use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::deny_userfaultfd;
use pagestitch_testkit::scope::scope;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

fn pagestitch(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.current_dir(directory).args(arguments).output().expect("the command starts")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The line on standard error of a command that fails.
fn error_line(output: &Output, status: i32) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// `a`, `b`, `c`: 10,000, 1 and 5,000 bytes.
fn files() -> TempDir {
    let directory = TempDir::new().unwrap();
    for (name, len) in [("a", 10_000), ("b", 1), ("c", 5_000)] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8 | 1).collect();
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

fn concatenated(directory: &Path, names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| fs::read(directory.join(name)).unwrap()).collect()
}

#[test]
fn a_region_hashes_and_writes_as_its_concatenated_parts() {
    let directory = files();
    let whole = concatenated(directory.path(), &["a", "b", "c", "a"]);
    fs::write(directory.path().join("whole"), &whole).unwrap();
    let sum = Command::new("sha256sum").arg("whole").current_dir(directory.path()).output().unwrap();
    let sum = out(&sum).split(' ').next().unwrap().to_owned();
    let said = out(&pagestitch(directory.path(), &["stitch", "a", "b", "c", "a", "--sha256"]));
    assert_eq!(said.lines().last(), Some(format!("{sum}  stitched").as_str()));
    out(&pagestitch(directory.path(), &["stitch", "a", "b", "c", "a", "-o", "written"]));
    assert!(fs::read(directory.path().join("written")).unwrap() == whole);
    let piped = pagestitch(directory.path(), &["stitch", "a", "b", "c", "a", "--output", "-"]);
    assert!(piped.stdout == whole, "nothing but the bytes is on standard output");
    let piped =
        pagestitch(directory.path(), &["stitch", "a", "b", "c", "a", "--output", "-", "--json", "--explain"]);
    assert!(piped.stdout == whole, "nor with what else is said");
}

#[test]
fn shuffled_parts_of_a_large_file_hash_as_the_file() {
    let Some(large) = large_file() else {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED shuffled_parts_of_a_large_file_hash_as_the_file: no compiler library"
        );
        return;
    };
    let len = fs::metadata(&large).unwrap().len();
    assert!(len > 100 << 20, "{} is large", large.display());
    let parts = (0..len)
        .step_by(PART)
        .map(|start| format!("{}:{start}+{}", large.display(), (len - start).min(PART as u64)));
    let parts: Vec<_> = parts.collect();
    let arguments: Vec<&str> =
        ["stitch", "--sha256"].into_iter().chain(parts.iter().map(String::as_str)).collect();
    let said = out(&pagestitch(Path::new("/"), &arguments));
    let sum = out(&Command::new("sha256sum").arg(&large).output().unwrap());
    let sum = sum.split(' ').next().unwrap();
    assert_eq!(said.lines().last(), Some(format!("{sum}  stitched").as_str()));
}

/// The library of the compiler: a large file on every machine with a Rust toolchain.
fn large_file() -> Option<PathBuf> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().ok()?;
    let library = Path::new(String::from_utf8(sysroot.stdout).ok()?.trim()).join("lib");
    let mut files = fs::read_dir(library).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|path| path.to_string_lossy().contains("librustc_driver") && fs::File::open(path).is_ok())
}

/// The bytes of a part of the large file: no multiple of a page.
const PART: usize = 7_777_777;

#[test]
fn aligned_parts_are_mapped_or_with_copy_copied() {
    let directory = files();
    fs::write(directory.path().join("pages"), vec![9; 3 * 4096]).unwrap();
    let told = |arguments: &[&str]| {
        let output = out(&pagestitch(directory.path(), arguments));
        serde_json::from_str::<Value>(&output).unwrap()
    };
    let parts = ["stitch", "pages:8192+4096", "pages:0+8192", "a", "--sha256", "--explain", "--json"];
    let mapped = told(&parts);
    assert_eq!(
        (&mapped["pages_in_place"], &mapped["bytes_copied"], &mapped["faults"]),
        (&6.into(), &0.into(), &0.into())
    );
    assert_eq!(mapped["plan"][0]["method"], "map");
    let copied = told(&[&parts[..], &["--copy"]].concat());
    assert_eq!((&copied["pages_in_place"], &copied["pages_installed"]), (&0.into(), &6.into()));
    assert_eq!(copied["plan"][0]["method"], "buffered");
    assert_eq!(mapped["sha256"], copied["sha256"]);
}

#[test]
fn a_region_within_a_limit_of_memory_has_the_same_hash() {
    let directory = files();
    fs::write(
        directory.path().join("long"),
        (0..16_u32 << 20).map(|at| (at / 1000) as u8).collect::<Vec<_>>(),
    )
    .unwrap();
    let told = |limit: &[&str]| {
        let stitch = ["stitch", "long", "--workers", "1", "--sha256", "--json"];
        let output = out(&pagestitch(directory.path(), &[&stitch, limit].concat()));
        serde_json::from_str::<Value>(&output).unwrap()
    };
    let limited = told(&["--memory", "5M"]);
    assert_eq!(limited["sha256"], told(&[])["sha256"]);
    let memory = &limited["memory"];
    assert!(memory["resident_bytes"].as_u64() <= Some(5 << 20), "{memory}");
    assert!(memory["evictions"].as_u64() > Some(2_000), "{memory}");
    let counts =
        ["standby_bytes", "soft_faults", "refaults", "overruns", "kept", "stalled_ns", "dirty_bytes"];
    let counts = counts.into_iter().chain(["write_backs", "write_failures"]);
    counts.for_each(|count| assert!(memory[count].is_u64(), "{count} is not in {memory}"));
}

#[test]
fn evicted_pages_are_in_the_summary_and_on_the_map() {
    let directory = files();
    fs::write(directory.path().join("long"), vec![7; 12 << 20]).unwrap();
    let stitch = ["stitch", "long", "--workers", "1", "--memory", "5M"];
    let said = out(&pagestitch(directory.path(), &[&stitch[..], &["--heatmap", "map.svg"]].concat()));
    let line = said.lines().find(|line| line.contains(" in memory at the end, ")).unwrap();
    for part in [" of them on standby; ", " evicted, ", " read again; threads waited ", " for memory"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    let map = fs::read_to_string(directory.path().join("map.svg")).unwrap();
    assert!(map.contains("<path class=\"evicted\" ") && map.contains(">mostly evicted</text>"), "{line}");
}

#[test]
fn a_file_truncated_during_the_output_is_an_error_line() {
    let directory = files();
    let shrinking = directory.path().join("shrinking");
    fs::write(&shrinking, vec![7; 64 << 20]).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.current_dir(directory.path()).args(["stitch", "shrinking", "-o", "-"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // The command has begun, and waits because the pipe is full.
    std::io::Read::read_exact(&mut stdout, &mut [0; 100]).unwrap();
    fs::File::options().write(true).open(&shrinking).unwrap().set_len(4096).unwrap();
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let said = error_line(&child.wait_with_output().unwrap(), 1);
    assert!(said.contains("shorter than it was"), "{said}");
}

#[test]
fn a_range_selects_its_bytes() {
    let directory = files();
    let parts = ["stitch", "a:4096+1000", "b", "c:0+4999", "-o", "-"];
    let expected = [
        &concatenated(directory.path(), &["a"])[4096..5096],
        &concatenated(directory.path(), &["b"]),
        &concatenated(directory.path(), &["c"])[..4999],
    ]
    .concat();
    assert!(pagestitch(directory.path(), &parts).stdout == expected);
}

#[test]
fn ranges_are_sizes_with_units_and_bases() {
    let directory = files();
    fs::write(directory.path().join("big"), vec![9; 70_000]).unwrap();
    let parts = ["stitch", "big:64K+0x10", "a:0x1000+1K", "-o", "-"];
    let expected = [&[9; 16][..], &concatenated(directory.path(), &["a"])[4096..5120]].concat();
    assert!(pagestitch(directory.path(), &parts).stdout == expected);
    for bad in ["a:64KB+1", "a:1+1.5K", "a:0x+1", "a:1+16E"] {
        let said = error_line(&pagestitch(directory.path(), &["stitch", bad]), 2);
        assert!(said.contains(bad) && said.contains("say 4096, 0x1000, 64K or 2G"), "{said}");
    }
}

#[test]
fn standard_input_is_a_part() {
    let directory = files();
    let run = |input: Option<&str>, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
        command.current_dir(directory.path()).arg("stitch").args(arguments);
        let input = input.map(|name| fs::File::open(directory.path().join(name)).unwrap().into());
        command.stdin(input.unwrap_or_else(Stdio::null)).output().unwrap()
    };
    let (a, b) = (concatenated(directory.path(), &["a"]), concatenated(directory.path(), &["b"]));
    for copy in [&[][..], &["--copy"]] {
        let arguments = [&["-o", "-"], copy, &["--", "b", "-", "-:4K+10"]].concat();
        let output = run(Some("a"), &arguments);
        assert!(
            output.stdout == [&b, &a, &a[4096..4106]].concat(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = error_line(&run(None, &[&["-"], copy].concat()), 1);
        assert!(said.contains("cannot read standard input: it is empty"), "{said}");
    }
    // Of a pipe, too, under its other names.
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.args(["stitch", "/dev/stdin", "-o", "-", "-q"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(&a).unwrap();
    assert!(child.wait_with_output().unwrap().stdout == a);
    assert!(run(Some("a"), &["./-"]).status.code() == Some(1), "a file named - has another path");
}

#[test]
fn quiet_prints_requested_results_only() {
    let directory = files();
    let quiet = |arguments: &[&str]| {
        let output = pagestitch(directory.path(), &[&["--quiet"], arguments].concat());
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        out(&output)
    };
    assert_eq!(quiet(&["stitch", "a"]), "");
    assert_eq!(quiet(&["stitch", "a", "--sha256"]).lines().count(), 1);
    assert_eq!(quiet(&["stitch", "a", "-o", "written"]), "");
    assert_eq!((quiet(&["probe"]), quiet(&["demo", "--file", "a"])), (String::new(), String::new()));
    let piped = pagestitch(directory.path(), &["stitch", "a", "-o", "-", "-q"]);
    assert!(piped.stdout.len() == 10_000 && piped.stderr.is_empty());
    let said = error_line(&pagestitch(directory.path(), &["-q", "stitch", "missing"]), 1);
    assert!(said.starts_with("pagestitch: cannot open missing"), "{said}");
}

#[test]
fn errors_are_objects_with_json() {
    let directory = files();
    for (arguments, status, expected) in [
        (&["stitch", "missing", "--json"][..], 1, "cannot open missing: No such file"),
        (
            &["--json", "stitch", "a", "-o", "./a"],
            2,
            "the output ./a is the part a, which writing would destroy",
        ),
        (&["--json", "stitch", "a:12"], 2, "invalid value 'a:12' for '<PART>...': the range '12'"),
        (
            &["--json", "serve", "firecracker"],
            2,
            "the following required arguments were not provided: --memory <FILE>",
        ),
        (&["--json"], 2, "'pagestitch' requires a subcommand"),
        (&["--json", "serve"], 2, "no command is named"),
        (&["--json", "--quiet", "probe"], 2, "cannot be used with"),
    ] {
        let said = error_line(&pagestitch(directory.path(), arguments), status);
        let object: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{arguments:?}: {said}"));
        assert_eq!((object["status"].as_i64(), said.lines().count()), (Some(status.into()), 1), "{said}");
        assert!(object["error"].as_str().unwrap().contains(expected), "{arguments:?}: {said}");
        assert_eq!(object["kind"].as_str(), (status == 1).then_some("Io"), "{arguments:?}: {said}");
    }
    assert!(out(&pagestitch(directory.path(), &["--json", "--help"])).contains("Usage: pagestitch"));
}

#[test]
fn completions_and_manual_pages_have_all_commands_and_options() {
    let directory = files();
    for shell in ["bash", "zsh", "fish"] {
        let script = out(&pagestitch(directory.path(), &["completions", shell]));
        assert!(script.contains("stitch") && script.contains("handshake-timeout"), "{shell}");
        assert!(script.contains("background"), "{shell}");
    }
    let checked = Command::new("bash").args(["-n", "/dev/stdin"]).stdin(Stdio::piped()).spawn();
    if let Ok(mut bash) = checked {
        let script = out(&pagestitch(directory.path(), &["completions", "bash"]));
        bash.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(bash.wait().unwrap().success(), "bash accepts its script");
    }
    let page = out(&pagestitch(directory.path(), &["man"]));
    assert!(page.contains(".TH pagestitch 1") && page.contains("pagestitch\\-stitch(1)"), "{page}");
    fs::create_dir(directory.path().join("man1")).unwrap();
    out(&pagestitch(directory.path(), &["man", "man1"]));
    let serve = fs::read_to_string(directory.path().join("man1/pagestitch-serve-firecracker.1")).unwrap();
    assert!(serve.contains("\\-\\-socket\\-mode") && serve.contains("\\-\\-background"), "{serve}");
    let said = error_line(&pagestitch(directory.path(), &["man", "no/where"]), 1);
    assert!(said.contains("cannot write to no/where: No such file"), "{said}");
    let said = error_line(&pagestitch(directory.path(), &["completions", "tcsh"]), 2);
    assert!(said.contains("[possible values: bash"), "{said}");
}

#[test]
fn counts_are_singular_or_plural() {
    let directory = files();
    let said = out(&pagestitch(directory.path(), &["stitch", "b", "--copy", "--touch", "sequential"]));
    assert!(said.starts_with("1 chunk, 1 byte in one region"), "{said}");
    assert!(said.contains("; 1 fault\n") && said.contains("\n1 page touched: "), "{said}");
    let said = out(&pagestitch(directory.path(), &["stitch", "a", "c"]));
    assert!(said.starts_with("2 chunks, 14.6 KiB (15000 bytes) in one region"), "{said}");
}

#[test]
fn explain_touch_and_json_print_plan_latencies_and_counters() {
    let directory = files();
    let said =
        out(&pagestitch(directory.path(), &["stitch", "a", "c:0+100", "--explain", "--touch", "random:50%"]));
    for part in ["region stitched: 10100 bytes, 3 pages", "0x0..0x2710", "buffered", "2 pages touched: p50"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let said = out(&pagestitch(
        directory.path(),
        &["--json", "stitch", "a", "c", "--sha256", "--explain", "--touch", "sequential"],
    ));
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((json["bytes"].as_u64(), json["touch"]["pages"].as_u64()), (Some(15_000), Some(4)));
    assert_eq!(json["sha256"].as_str().map(str::len), Some(64));
    assert_eq!(json["plan"][1]["method"], "buffered");
}

#[test]
fn zipf_touches_pages_again() {
    let directory = files();
    let touch = ["stitch", "a", "--copy", "--touch", "zipf:0.99:1000"];
    let said = out(&pagestitch(directory.path(), &touch));
    assert!(said.contains("\n1000 touches: p50 ") && said.contains("; 3 faults\n"), "{said}");
    let json: Value =
        serde_json::from_str(&out(&pagestitch(directory.path(), &[&["--json"], &touch[..]].concat())))
            .unwrap();
    assert_eq!(json["touch"]["touches"], 1000);
}

#[test]
fn the_demo_checks_its_bytes_and_prints_counters() {
    let directory = files();
    let said = out(&pagestitch(directory.path(), &["demo"]));
    for part in ["equal", "pages touched", "bytes copied", "p50, p99, max", "eager copy"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let json: Value =
        serde_json::from_str(&out(&pagestitch(directory.path(), &["demo", "--json", "--file", "a"])))
            .unwrap();
    assert_eq!((json["sha256_matches"].as_bool(), json["bytes"].as_u64()), (Some(true), Some(10_000)));
}

#[test]
fn the_demo_reads_a_region_that_is_longer_than_its_budget() {
    let directory = files();
    let said = out(&pagestitch(directory.path(), &["demo", "--file", "a"]));
    let line = said.lines().last().unwrap();
    let told = " MiB in a budget of 8.0 MiB: ";
    assert!(
        line.starts_with("A region of 64.")
            && line.contains(told)
            && line.contains(" bytes are equal; at most "),
        "{said}"
    );
    let json = out(&pagestitch(directory.path(), &["demo", "--json", "--file", "a"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    let of = |name: &str| json["bounded"][name].as_u64().unwrap();
    assert!(of("bytes") >= 64 << 20 && of("limit_bytes") == 8 << 20, "{json}");
    assert_eq!(of("equal_bytes"), of("bytes"));
    // Beside the budget, each worker has a buffer of a huge page, and the region its tables.
    let resident = of("resident_bytes_max");
    assert!(resident > 1 << 20 && resident <= 32 << 20, "{json}");
    assert!(of("evictions") * 4096 >= of("bytes") - (8 << 20), "{json}");
}

#[test]
fn probe_prints_each_feature_with_its_kernel_version() {
    let said = out(&pagestitch(Path::new("/"), &["probe"]));
    for part in ["Linux", "POISON", "6.6", "MOVE", "EVENT_REMOVE"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let json: Value = serde_json::from_str(&out(&pagestitch(Path::new("/"), &["probe", "--json"]))).unwrap();
    let rows = json["capabilities"].as_array().unwrap();
    assert!(rows.len() > 15);
    for row in rows {
        let missing =
            ["reason", "cost", "remedy"].map(|key| row[key].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(missing, [row["here"] == false; 3], "{row}");
    }
}

#[test]
fn probe_fits_the_terminal() {
    for columns in ["40", "60", "100"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
        let said = out(&command.arg("probe").env("COLUMNS", columns).output().unwrap());
        let table = said.lines().skip(1).take_while(|line| !line.is_empty());
        let width: usize = columns.parse().unwrap();
        table.for_each(|line| assert!(line.trim_end().chars().count() <= width, "{columns}: {line}"));
        assert!(said.contains("WP_HUGETLBFS_SHMEM "), "{said}");
    }
}

#[test]
fn a_bad_part_is_an_error_line_with_its_name() {
    let directory = files();
    fs::create_dir(directory.path().join("folder")).unwrap();
    fs::write(directory.path().join("empty"), "").unwrap();
    assert!(Command::new("mkfifo").arg("pipe").current_dir(directory.path()).status().unwrap().success());
    for (arguments, expected) in [
        (&["stitch", "missing"][..], "cannot open missing: No such file"),
        (&["stitch", "folder"], "folder is a directory: name a file in it"),
        (&["stitch", "/dev/null"], "/dev/null cannot be read at an offset: use a regular file"),
        (&["stitch", "a", "empty"], "empty is empty, or has no length"),
        (&["stitch", "a:9000+2000"], "reaches to byte 11000 of a source of 10000 bytes"),
        (&["stitch", "pipe"], "pipe cannot be read at an offset"),
        (&["stitch", "a", "-o", "folder"], "cannot write folder: Is a directory"),
        (&["stitch", "a", "-o", "no/where"], "cannot write no/where: No such file"),
        (&["stitch", "a", "--heatmap", "no/where"], "cannot write no/where: No such file"),
        (&["stitch", "a", "--heatmap", "folder"], "cannot write folder"),
        (
            &["stitch", "a", "--copy", "--touch", "random", "--record", "no/where"],
            "cannot write no/where: No such file",
        ),
        (&["stitch", "a", "--copy", "--replay", "missing"], "cannot read missing: No such file"),
        (&["stitch", "a", "--live"], "--live needs a terminal, but standard output is not one"),
        (&["demo", "--file", "empty"], "name a file with bytes"),
        (&["demo", "--file", "missing"], "cannot open missing"),
        (&["demo", "--file", "folder"], "folder is a directory"),
    ] {
        let said = error_line(&pagestitch(directory.path(), arguments), 1);
        assert!(said.starts_with("pagestitch: ") && said.contains(expected), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
    assert_eq!(fs::read(directory.path().join("a")).unwrap().len(), 10_000, "no part was touched");
}

#[test]
fn wrong_arguments_exit_with_2_and_name_the_remedy() {
    let directory = files();
    let serve = ["serve", "firecracker", "--socket", "s", "--memory", "a"];
    let serve = |more: &[&'static str]| [&serve[..], more].concat();
    let stitch = |more: &[&'static str]| [&["stitch", "b", "a"], more].concat();
    for (arguments, expected) in [
        (vec![], "Usage: pagestitch"),
        (vec!["frobnicate"], "unrecognized subcommand"),
        (vec!["probe", "all"], "unexpected argument 'all'"),
        (vec!["stitch"], "PART"),
        (vec!["stitch", "a:x+2000"], "the range 'x+2000' has an offset that is not a size"),
        (vec!["stitch", "a:12"], "the range '12' is not OFFSET+LENGTH"),
        (vec!["stitch", "a:1+0"], "the range '1+0' is empty"),
        (stitch(&["--touch", "backwards"]), "say sequential or random"),
        (stitch(&["--touch", "random:200%"]), "not a share"),
        (stitch(&["--touch", "zipf:2"]), "not a skew from 0 to 10 and a number of touches"),
        (
            stitch(&["--workers", "many"]),
            "invalid value 'many' for '--workers <N>': say a number from 1 to 65535",
        ),
        (stitch(&["--workers", "-1"]), "say a number from 1 to 65535"),
        (vec!["stress", "--seconds", "99999999999999999999"], "say a number from 1 to 4294967295"),
        (stitch(&["--workers", "0"]), "say a number from 1 to"),
        (stitch(&["--seed", "-1"]), "invalid value '-1'"),
        (stitch(&[""]), "it names no file"),
        (stitch(&["--live", "--json"]), "cannot be used with"),
        (stitch(&["--live", "-o", "-"]), "--live draws on standard output"),
        (stitch(&["--record", "new", "--touch", "random"]), "--copy"),
        (stitch(&["--record", "new", "--copy"]), "--touch"),
        (stitch(&["--memory", "much"]), "it is no number of bytes: write 4096"),
        (stitch(&["--memory", "1"]), "a budget of 1 byte is too small: give it "),
        (stitch(&["--seed", "x"]), "say a number from 0 to 18446744073709551615"),
        (stitch(&["-o", "./a"]), "the output ./a is the part a, which writing would destroy"),
        (stitch(&["--heatmap", "./a"]), "the map ./a is the part a, which writing would destroy"),
        (stitch(&["--copy", "--touch", "random", "--record", "a"]), "the recording a is the part a, which"),
        (stitch(&["--copy", "--replay", "c", "--heatmap", "c"]), "the map c is the recording c, which"),
        (stitch(&["--heatmap", "-"]), "the map cannot go to standard output: name a file, or ./-"),
        (vec!["demo", "--touch", "all"], "say sequential or random"),
        (vec!["demo", "--touch", "zipf:0.99:10"], "zipf touches pages again"),
        (vec!["stress", "--seconds", "0"], "say a number from 1 to"),
        (vec!["stress", "--round", "1"], "--seed"),
        (vec!["bench", "--rounds", "0"], "say a number from 1 to"),
        (vec!["bench", "--compare", "a", "--report", "a"], "the report a is the earlier run a, which"),
        (serve(&["--workers", "0"]), "say a number from 1 to"),
        (serve(&["--handshake-timeout", "0"]), "say a number from 1 to"),
        (serve(&["--background", "0"]), "nothing would be filled"),
        (serve(&["--background", "1.5G"]), "it is no number of bytes a second"),
        (serve(&["--on-stop", "pray"]), "[possible values: finish, abandon]"),
        (serve(&["--live", "--json"]), "cannot be used with"),
        (serve(&["--record", "./a"]), "the recording ./a is the memory file a, which"),
        (serve(&["--heatmap", "./a"]), "the map ./a is the memory file a, which"),
        (vec!["serve", "firecracker", "--socket", "s"], "--memory"),
        (vec!["serve", "qemu"], "unrecognized subcommand"),
    ] {
        let said = error_line(&pagestitch(directory.path(), &arguments), 2);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3, "nothing was written");
    assert!(fs::read(directory.path().join("a")).unwrap() == concatenated(directory.path(), &["a"]));
    assert_eq!(fs::metadata(directory.path().join("a")).unwrap().len(), 10_000, "no part was touched");
}

/// Runs the command with a terminal of its own as standard output and standard error. Returns the
/// exit code and the text that the terminal received.
fn on_terminal(directory: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let (mut child, mut master) = start_on_terminal(directory, arguments, environment);
    let mut shown = Vec::new();
    let mut some = [0; 4096];
    while let Ok(count @ 1..) = std::io::Read::read(&mut master, &mut some) {
        shown.extend(&some[..count]);
    }
    (child.wait().unwrap().code(), String::from_utf8_lossy(&shown).into_owned())
}

/// Starts the command with a terminal of its own. Returns the other end of the terminal.
fn start_on_terminal(
    directory: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> (Child, fs::File) {
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let nix::pty::OpenptyResult { master, slave } = nix::pty::openpty(&size, None).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.current_dir(directory).args(arguments).env("TERM", "xterm-256color");
    for setting in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(setting);
    }
    command.envs(environment.iter().copied()).stdin(slave.try_clone().unwrap());
    command.stdout(slave.try_clone().unwrap()).stderr(slave);
    // After this, the child holds the only other descriptors of the terminal. A read fails with EIO
    // after the child has ended.
    (command.spawn().unwrap(), master.into())
}

#[test]
fn verbose_has_colours_on_a_terminal_unless_refused() {
    let directory = files();
    let shown = |environment| {
        let (status, shown) = on_terminal(directory.path(), &["stitch", "a", "-v"], environment);
        assert!(status == Some(0) && shown.contains("region built"), "{shown:?}");
        shown.contains('\x1b')
    };
    assert!(shown(&[]));
    assert!(shown(&[("NO_COLOR", "")]), "only a value counts");
    assert!(!shown(&[("NO_COLOR", "1")]));
    assert!(!shown(&[("TERM", "dumb")]));
    assert!(!shown(&[("CLICOLOR", "0")]));
    assert!(shown(&[("CLICOLOR", "1")]));
    for (refusal, colored) in
        [(("CLICOLOR", "0"), false), (("NO_COLOR", "1"), false), (("CLICOLOR", "1"), true)]
    {
        let (_, help) = on_terminal(directory.path(), &["--help"], &[refusal]);
        assert_eq!(help.contains('\x1b'), colored, "{refusal:?}: {help:?}");
        let (_, picture) = on_terminal(directory.path(), &["stitch", "a", "--copy", "--live"], &[refusal]);
        let green = ["\x1b[32", "\x1b[38;5;2"].iter().any(|green| picture.contains(green));
        assert_eq!(green, colored, "{refusal:?}: {picture:?}");
    }
}

#[test]
fn no_other_output_disturbs_the_live_picture() {
    let directory = files();
    // The hash takes longer than the second after which a progress bar would appear.
    fs::write(directory.path().join("big"), "").unwrap();
    let big = fs::File::options().write(true).open(directory.path().join("big")).unwrap();
    big.set_len(2 << 30).unwrap();
    let arguments = ["stitch", "--copy", "big", "--sha256", "--live", "-v"];
    let (status, shown) = on_terminal(directory.path(), &arguments, &[]);
    assert_eq!(status, Some(0), "{shown:?}");
    let (picture, after) = shown.rsplit_once("\x1b[?1049l").expect("an alternate screen, left at the end");
    let (_, picture) = picture.split_once("\x1b[?1049h").expect("an alternate screen");
    assert!(picture.contains("q quits") && !picture.contains("hashing"), "a progress bar is in the picture");
    assert!(!picture.contains('\n'), "a line was written across the picture");
    assert!(after.contains("region dropped") && after.contains("  stitched"), "{after:?}");
    let (status, shown) = on_terminal(directory.path(), &arguments, &[("TERM", "dumb")]);
    assert!(status == Some(1) && shown.contains("TERM is dumb"), "{shown:?}");
}

#[test]
fn a_random_touch_of_a_tebibyte_needs_no_list_of_pages() {
    let directory = TempDir::new().unwrap();
    let huge = fs::File::create(directory.path().join("huge")).unwrap();
    if huge.set_len(1 << 40).is_err() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED a_random_touch_of_a_tebibyte_needs_no_list_of_pages: no file of a tebibyte here"
        );
        return;
    }
    // A list of its pages would take 2 GiB.
    let limited = format!(
        "ulimit -d 524288; exec {} stitch huge --touch random:0.0001% --json",
        env!("CARGO_BIN_EXE_pagestitch")
    );
    let output = Command::new("sh").args(["-c", &limited]).current_dir(directory.path()).output().unwrap();
    let said: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!((&said["touch"]["pages"], &said["bytes"]), (&269.into(), &(1_u64 << 40).into()));
}

#[test]
fn the_log_is_objects_with_json() {
    let directory = files();
    let output = pagestitch(directory.path(), &["stitch", "a", "c", "--sha256", "--json", "-vv"]);
    serde_json::from_str::<Value>(&out(&output)).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let events: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(
        events.iter().all(|event| ["debug", "trace"].contains(&event["level"].as_str().unwrap())),
        "{said}"
    );
    let built = events.iter().find(|event| event["message"] == "region built").unwrap();
    assert_eq!((&built["region"], &built["bytes"]), (&"stitched".into(), &15_000.into()));
}

#[test]
fn verbose_logs_regions_and_pages_on_standard_error() {
    let directory = files();
    let said = |flag: &str| {
        let output = pagestitch(directory.path(), &["stitch", "a", "c", "--sha256", flag]);
        assert_eq!(out(&output).lines().count(), 3);
        String::from_utf8(output.stderr).unwrap()
    };
    let (once, twice) = (said("-v"), said("-vv"));
    for part in ["pool started", "region built", "bytes=15000", "region dropped"] {
        assert!(once.contains(part), "{part:?} is not in\n{once}");
    }
    assert!(!once.contains("method=") && twice.contains("method=gathered"), "{twice}");
    assert!(once.contains("metrics=Metrics {") && !once.contains(": 0"), "only counters above zero: {once}");
}

#[test]
fn a_file_without_permission_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = files();
    let secret = directory.path().join("a");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&secret).is_ok() {
        return; // Root reads any file.
    }
    let said = error_line(&pagestitch(directory.path(), &["stitch", "a"]), 1);
    assert!(said.contains("cannot open a: Permission denied"), "{said}");
}

/// Runs the command where userfaultfd is denied.
fn without_userfaultfd(directory: &Path, arguments: &[&str]) -> Output {
    scope(|scope| {
        let run = || {
            // A seccomp filter belongs to a thread, and processes that the thread starts inherit
            // it.
            deny_userfaultfd(Errno::EPERM);
            pagestitch(directory, arguments)
        };
        scope.spawn(run).join().unwrap()
    })
}

#[test]
fn a_probe_without_userfaultfd_names_the_cost_and_the_remedy() {
    let directory = files();
    let output = without_userfaultfd(directory.path(), &["probe"]);
    let said = error_line(&output, 1);
    assert!(said.contains("no userfaultfd") && said.contains("seccomp profile"), "{said}");
    let table = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(table.contains("EPERM") && table.contains("the server Eager fills regions"), "{table}");
}

#[test]
fn a_demo_without_userfaultfd_says_so_and_has_the_right_bytes() {
    let directory = files();
    let said = out(&without_userfaultfd(directory.path(), &["demo"]));
    assert!(said.contains("the server Eager fills regions when they are built"), "{said}");
    assert!(said.contains("seccomp profile") && said.contains("  equal"), "{said}");
    let json = out(&without_userfaultfd(directory.path(), &["demo", "--json"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["sha256_matches"], &json["server"]), (&true.into(), &"eager".into()));
    assert!(said.contains("No budget was shown: ") && json["bounded"].is_null(), "{said}");
}

#[test]
fn a_stitch_without_userfaultfd_says_so_and_has_the_right_bytes() {
    let directory = files();
    fs::write(directory.path().join("long"), [7; 300_001]).unwrap();
    let arguments = ["stitch", "a", "long", "long:5+100000", "b", "--sha256"];
    let expected = out(&pagestitch(directory.path(), &[&arguments[..], &["--json"]].concat()));
    let expected: Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(expected["server"], "pool");
    for copy in [&[][..], &["--copy"], &["--copy", "--touch", "random:50%"]] {
        let arguments = [&arguments[..], copy].concat();
        let output = without_userfaultfd(directory.path(), &arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("the server Eager fills regions when they are built"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(out(&output).contains(expected["sha256"].as_str().unwrap()));
        let json = out(&without_userfaultfd(directory.path(), &[&arguments[..], &["--json"]].concat()));
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["server"], &json["sha256"]), (&"eager".into(), &expected["sha256"]));
    }
    let record = ["stitch", "a", "--copy", "--touch", "random", "--record", "r"];
    let said = error_line(&without_userfaultfd(directory.path(), &[&record[..], &["--quiet"]].concat()), 1);
    assert!(said.contains("leave out --record, or let this process use userfaultfd"), "{said}");
}

#[test]
fn too_few_descriptors_are_an_error_line_with_the_limit() {
    let directory = TempDir::new().unwrap();
    (0..30).for_each(|nth| fs::write(directory.path().join(format!("part{nth}")), "bytes").unwrap());
    let limited = format!("ulimit -n 20; exec {} stitch part*", env!("CARGO_BIN_EXE_pagestitch"));
    let output = Command::new("sh").args(["-c", &limited]).current_dir(directory.path()).output().unwrap();
    let said = error_line(&output, 1);
    assert!(
        said.contains("this process may open 20 descriptors (RLIMIT_NOFILE): raise it with ulimit -n"),
        "{said}"
    );
}

#[test]
fn too_little_address_space_is_an_error_line() {
    let directory = files();
    let huge = fs::File::create(directory.path().join("huge")).unwrap();
    huge.set_len(1 << 33).unwrap();
    let limited = format!("ulimit -v 4194304; exec {} stitch huge", env!("CARGO_BIN_EXE_pagestitch"));
    let output = Command::new("sh").args(["-c", &limited]).current_dir(directory.path()).output().unwrap();
    let said = error_line(&output, 1);
    assert!(
        said.contains("cannot reserve 8589934592 bytes of addresses") && said.contains("ulimit -v"),
        "{said}"
    );
}

#[test]
fn a_closed_pipe_is_no_error() {
    let directory = files();
    fs::write(directory.path().join("big"), vec![1u8; 20 << 20]).unwrap();
    let piped = format!("{} stitch big -o - | head -c 10", env!("CARGO_BIN_EXE_pagestitch"));
    let output = Command::new("sh").args(["-c", &piped]).current_dir(directory.path()).output().unwrap();
    assert_eq!((output.stdout.len(), String::from_utf8_lossy(&output.stderr).as_ref()), (10, ""));
}

#[test]
fn first_touches_are_recorded_and_replayed() {
    let directory = files();
    let big = directory.path().join("big");
    fs::write(&big, vec![5; 200 * 4096]).unwrap();
    let touch = ["stitch", "--copy", "big", "--touch", "random:50%", "--json"];
    let run = |more: &[&str]| -> Value {
        serde_json::from_str(&out(&pagestitch(directory.path(), &[&touch[..], more].concat()))).unwrap()
    };
    let first = run(&["--record", "touches"]);
    assert_eq!(first["faults"], 100);
    let second = run(&["--replay", "touches"]);
    assert!(second["faults"].as_u64().unwrap() <= 100);
    let said =
        error_line(&pagestitch(directory.path(), &["stitch", "--copy", "a", "--replay", "touches"]), 1);
    assert!(said.contains("touches: the recording is of a region of 819200 bytes"), "{said}");
    assert!(!said.contains("stitched"), "{said}");
    let said = error_line(&pagestitch(directory.path(), &["stitch", "a", "--record", "touches"]), 2);
    assert!(said.contains("--copy"), "{said}");
}

#[test]
fn a_second_of_stress_passes_and_prints_counters() {
    let said = out(&pagestitch(Path::new("/"), &["stress", "--seconds", "1", "--seed", "5", "--json"]));
    let counts: Value = serde_json::from_str(&said).unwrap();
    assert!(counts["regions"].as_u64() > Some(0) && counts["bytes_verified"].as_u64() > Some(0), "{said}");
    let counted = |name: &str| counts[name].is_u64();
    let parts =
        ["locked", "locked_skipped", "splits", "donated_rotations", "hugetlb_parts", "hugetlb_parts_skipped"];
    assert!(parts.into_iter().chain(["stopped", "shards"]).all(counted), "{said}");
    // In this round, sources do not take bytes back.
    for form in [&[][..], &["--json"], &["-v"]] {
        let round = ["stress", "--seconds", "1", "--seed", "7", "--round", "3"];
        let output = pagestitch(Path::new("/"), &[&round[..], form].concat());
        out(&output);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("ERROR") && !said.contains("\"error\""), "{said}");
    }
}
