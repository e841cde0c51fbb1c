//! The command as a person uses it: what it prints, and one clear line for each thing that is wrong.

use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::deny_userfaultfd;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use tempfile::TempDir;

fn pagestitch(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.current_dir(directory).args(arguments).output().expect("the command starts")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one line on standard error of a command that could not do it.
fn complaint(output: &Output, status: i32) -> String {
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
fn stitched_parts_hash_and_write_as_the_parts_end_to_end() {
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
fn parts_of_a_large_real_file_hash_as_the_file() {
    let Some(large) = large_file() else {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED parts_of_a_large_real_file_hash_as_the_file: no compiler library"
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

/// The compiler's own library: the one large file that every machine with a Rust toolchain has.
fn large_file() -> Option<PathBuf> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().ok()?;
    let library = Path::new(String::from_utf8(sysroot.stdout).ok()?.trim()).join("lib");
    let mut files = fs::read_dir(library).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|path| path.to_string_lossy().contains("librustc_driver") && fs::File::open(path).is_ok())
}

/// Bytes in a part of the large file: no multiple of anything.
const PART: usize = 7_777_777;

#[test]
fn aligned_parts_are_mapped_and_copied_when_asked_to() {
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
    assert_eq!(mapped["plan"][0]["how"], "map");
    let copied = told(&[&parts[..], &["--copy"]].concat());
    assert_eq!((&copied["pages_in_place"], &copied["pages_installed"]), (&0.into(), &6.into()));
    assert_eq!(copied["plan"][0]["how"], "read");
    assert_eq!(mapped["sha256"], copied["sha256"]);
}

#[test]
fn a_file_that_shrinks_while_it_is_written_out_is_one_line() {
    let directory = files();
    let shrinking = directory.path().join("shrinking");
    fs::write(&shrinking, vec![7; 64 << 20]).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    command.current_dir(directory.path()).args(["stitch", "shrinking", "-o", "-"]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // It has begun, and waits for us to read on.
    std::io::Read::read_exact(&mut stdout, &mut [0; 100]).unwrap();
    fs::File::options().write(true).open(&shrinking).unwrap().set_len(4096).unwrap();
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let said = complaint(&child.wait_with_output().unwrap(), 1);
    assert!(said.contains("shorter than it was"), "{said}");
}

#[test]
fn ranges_are_those_bytes() {
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
fn explain_touch_and_json_say_what_they_promise() {
    let directory = files();
    let said =
        out(&pagestitch(directory.path(), &["stitch", "a", "c:0+100", "--explain", "--touch", "random:50%"]));
    for part in ["region stitched: 10100 bytes, 3 pages", "0x0..0x2710", "read", "2 pages touched: p50"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let said = out(&pagestitch(
        directory.path(),
        &["--json", "stitch", "a", "c", "--sha256", "--explain", "--touch", "sequential"],
    ));
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((json["bytes"].as_u64(), json["touch"]["pages"].as_u64()), (Some(15_000), Some(4)));
    assert_eq!(json["sha256"].as_str().map(str::len), Some(64));
    assert_eq!(json["plan"][1]["how"], "read");
}

#[test]
fn the_demo_is_right_and_says_what_happened() {
    let directory = files();
    let said = out(&pagestitch(directory.path(), &["demo"]));
    for part in ["equal", "pages touched", "bytes copied", "p50, p99, max", "copying it all first"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let json: Value =
        serde_json::from_str(&out(&pagestitch(directory.path(), &["demo", "--json", "--file", "a"])))
            .unwrap();
    assert_eq!((json["right"].as_bool(), json["bytes"].as_u64()), (Some(true), Some(10_000)));
}

#[test]
fn probe_tells_each_feature_and_its_version() {
    let said = out(&pagestitch(Path::new("/"), &["probe"]));
    for part in ["Linux", "POISON", "6.6", "MOVE", "EVENT_REMOVE"] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let json: Value = serde_json::from_str(&out(&pagestitch(Path::new("/"), &["probe", "--json"]))).unwrap();
    assert!(json["capabilities"].as_array().is_some_and(|rows| rows.len() > 15));
}

#[test]
fn what_is_wrong_with_a_part_is_one_line_that_names_it() {
    let directory = files();
    fs::create_dir(directory.path().join("folder")).unwrap();
    fs::write(directory.path().join("empty"), "").unwrap();
    assert!(Command::new("mkfifo").arg("pipe").current_dir(directory.path()).status().unwrap().success());
    for (arguments, expected) in [
        (&["stitch", "missing"][..], "cannot open missing: No such file"),
        (&["stitch", "folder"], "folder is a directory: name a file in it"),
        (&["stitch", "/dev/null"], "/dev/null cannot be read at an offset: use a regular file"),
        (&["stitch", "a", "empty"], "chunk 1 (empty) is empty: leave it out"),
        (&["stitch", "a:9000+2000"], "reaches to byte 11000 of a source of 10000 bytes"),
        (&["stitch", "a:x+2000"], "the range 'x+2000' has an offset that is not a number"),
        (&["stitch", "a:12"], "the range '12' is not OFFSET+LENGTH"),
        (&["stitch", "a:1+0"], "the range '1+0' is empty"),
        (&["stitch", "pipe"], "pipe cannot be read at an offset"),
        (&["stitch", "b", "a", "-o", "./a"], "the output ./a is the part a, which writing would destroy"),
        (&["stitch", "a", "--workers", "0"], "a pool needs at least one worker"),
        (&["stitch", "a", "-o", "folder"], "cannot write folder"),
        (&["demo", "--file", "empty"], "is empty: name a file with some bytes"),
        (&["demo", "--file", "missing"], "cannot open missing"),
    ] {
        let said = complaint(&pagestitch(directory.path(), arguments), 1);
        assert!(said.starts_with("pagestitch: ") && said.contains(expected), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
    assert_eq!(fs::read(directory.path().join("a")).unwrap().len(), 10_000, "no part was touched");
}

#[test]
fn wrong_arguments_are_status_2_and_say_what_is_right() {
    for (arguments, expected) in [
        (&[][..], "Usage: pagestitch"),
        (&["stitch"], "PART"),
        (&["stitch", "a", "--touch", "backwards"], "say sequential or random"),
        (&["stitch", "a", "--touch", "random:200%"], "not a share"),
        (&["stitch", "a", "--workers", "many"], "invalid value 'many'"),
        (&["frobnicate"], "unrecognized subcommand"),
    ] {
        let said = complaint(&pagestitch(Path::new("/"), arguments), 2);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

#[test]
fn verbose_shows_what_happens_on_standard_error() {
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
    assert!(!once.contains("way=") && twice.contains("way=Gathered"), "{twice}");
}

#[test]
fn an_unreadable_file_is_refused_to_an_ordinary_user() {
    use std::os::unix::fs::PermissionsExt;
    let directory = files();
    let secret = directory.path().join("a");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&secret).is_ok() {
        return; // Root reads it all the same.
    }
    let said = complaint(&pagestitch(directory.path(), &["stitch", "a"]), 1);
    assert!(said.contains("cannot open a: Permission denied"), "{said}");
}

#[test]
fn without_userfaultfd_each_command_says_what_to_do() {
    let directory = files();
    let outputs = thread::scope(|scope| {
        let run = || {
            // A filter is a thread's own, and inherited by what the thread starts.
            deny_userfaultfd(Errno::EPERM);
            [&["demo"][..], &["stitch", "a"], &["probe"]]
                .map(|arguments| pagestitch(directory.path(), arguments))
        };
        scope.spawn(run).join().unwrap()
    });
    for output in &outputs {
        let said = complaint(output, 1);
        assert!(said.contains("no userfaultfd") && said.contains("seccomp profile"), "{said}");
    }
    assert!(String::from_utf8_lossy(&outputs[2].stdout).contains("EPERM"), "probe still prints its table");
}

#[test]
fn too_little_address_space_is_one_line() {
    let directory = files();
    let huge = fs::File::create(directory.path().join("huge")).unwrap();
    huge.set_len(1 << 33).unwrap();
    let limited = format!("ulimit -v 4194304; exec {} stitch huge", env!("CARGO_BIN_EXE_pagestitch"));
    let output = Command::new("sh").args(["-c", &limited]).current_dir(directory.path()).output().unwrap();
    let said = complaint(&output, 1);
    assert!(
        said.contains("cannot reserve 8589934592 bytes of addresses") && said.contains("ulimit -v"),
        "{said}"
    );
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let directory = files();
    fs::write(directory.path().join("big"), vec![1u8; 20 << 20]).unwrap();
    let piped = format!("{} stitch big -o - | head -c 10", env!("CARGO_BIN_EXE_pagestitch"));
    let output = Command::new("sh").args(["-c", &piped]).current_dir(directory.path()).output().unwrap();
    assert_eq!((output.stdout.len(), String::from_utf8_lossy(&output.stderr).as_ref()), (10, ""));
}

#[test]
fn a_benchmark_prints_a_row_for_each_system_and_writes_a_page() {
    let directory = TempDir::new().unwrap();
    let arguments = ["bench", "latency", "populate", "--quick", "--rounds", "1"];
    let said = out(&pagestitch(directory.path(), &arguments));
    assert!(said.starts_with("Linux ") && said.contains("\npopulate: filling"), "{said}");
    assert!(said.lines().any(|line| line.trim_start().starts_with("inline ")), "{said}");
    let json =
        out(&pagestitch(directory.path(), &[&arguments[..], &["--json", "--report", "r.html"]].concat()));
    let rows: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.iter().filter(|row| row["workload"] == "populate").count(), 3);
    let inline = rows.iter().find(|row| row["system"] == "inline").unwrap();
    for field in ["p50_ns", "p99_ns", "max_ns", "ratio", "seconds", "faults_per_s", "cpu_ns_per_fault"] {
        assert!(inline[field].as_f64().unwrap() > 0.0, "{field}: {inline}");
    }
    let page = fs::read_to_string(directory.path().join("r.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("<h2>latency</h2>"));
    fs::write(directory.path().join("old.json"), json).unwrap();
    let said = out(&pagestitch(directory.path(), &[&arguments[..], &["--compare", "old.json"]].concat()));
    assert!(said.contains("compared with the earlier run"), "{said}");
}

#[test]
fn what_is_wrong_with_a_benchmark_is_said_before_it_is_run() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("bad.json"), "no rows\n").unwrap();
    for (arguments, status, about) in [
        (&["bench", "speed"][..], 2, "[possible values: build, latency,"),
        (&["bench", "--rounds", "0"], 2, "--rounds"),
        (&["bench", "--compare", "missing.json"], 1, "cannot compare with missing.json: No such file"),
        (&["bench", "--compare", "bad.json"], 1, "bad.json: line 1 is no row of `pagestitch bench --json`"),
        (&["bench", "--report", "no/where.html"], 1, "cannot write no/where.html: No such file"),
    ] {
        let said = complaint(&pagestitch(directory.path(), arguments), status);
        assert!(said.contains(about), "{said}");
    }
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
    let said = complaint(&pagestitch(directory.path(), &["stitch", "--copy", "a", "--replay", "touches"]), 1);
    assert!(said.contains("the recording is of a region of 819200 bytes"), "{said}");
    let said = complaint(&pagestitch(directory.path(), &["stitch", "a", "--record", "touches"]), 2);
    assert!(said.contains("--copy"), "{said}");
}
