//! Benchmarks: their tables, pages and options.

use super::{error_line, out, pagestitch};
use serde_json::Value;
use std::fs;
use tempfile::TempDir;

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
    assert!(page.contains("<svg") && page.contains("<h2>latency</h2>") && page.contains("<table>"));
    fs::write(directory.path().join("old.json"), json).unwrap();
    let said = out(&pagestitch(directory.path(), &[&arguments[..], &["--compare", "old.json"]].concat()));
    assert!(said.contains("compared with the earlier run"), "{said}");
    let more = ["--json", "--compare", "old.json", "--report", "r.html"];
    let output = pagestitch(
        directory.path(),
        &[&["bench", "populate", "--quick", "--rounds", "1"][..], &more].concat(),
    );
    let said = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["comparison"]["workload"] == "populate").count(), 3, "{said}");
    assert_eq!((&lines[3]["message"], lines.len()), (&"wrote r.html".into(), 4), "{said}");
    let page = fs::read_to_string(directory.path().join("r.html")).unwrap();
    assert!(page.contains("<h2>comparison</h2>"));
}

#[test]
fn a_benchmark_of_several_threads_marks_more_threads_than_cpus() {
    let directory = TempDir::new().unwrap();
    let arguments = ["bench", "populate", "scan", "--quick", "--rounds", "1", "--threads", "64,1"];
    let said = out(&pagestitch(directory.path(), &[&arguments[..], &["--report", "r.html"]].concat()));
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert_eq!(said.matches("more threads than the").count(), if cpus < 64 { 2 } else { 0 }, "{said}");
    let point = if cpus < 64 { "64 *" } else { "64" };
    assert_eq!(said.lines().filter(|line| line.contains(&format!(" {point} "))).count(), 3 + 4, "{said}");
    let page = fs::read_to_string(directory.path().join("r.html")).unwrap();
    assert!(page.contains("<figcaption>processor time of a page</figcaption>"), "{page}");
}

#[test]
fn the_table_of_many_cores_has_every_figure() {
    let directory = TempDir::new().unwrap();
    let arguments =
        ["bench", "scaling", "--table", "--quick", "--rounds", "1", "--threads", "1,4,8", "--shards", "2"];
    let said = out(&pagestitch(directory.path(), &arguments));
    let table: Vec<&str> = said.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(table.len(), 1 + 32 + 1 + 20, "{said}");
    assert!(table.iter().all(|line| !line.contains("| - |") && !line.ends_with("not measured |")), "{said}");
}

#[test]
fn bad_benchmark_options_fail_before_the_measurement() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("bad.json"), "no rows\n").unwrap();
    for (arguments, status, about) in [
        (&["bench", "speed"][..], 2, "[possible values: build, latency,"),
        (&["bench", "--rounds", "0"], 2, "--rounds"),
        (&["bench", "--threads", "0"], 2, "0 threads cannot be measured: name numbers from 1 to 1024"),
        (&["bench", "--threads", ""], 2, "`` is no number of threads: name numbers with commas"),
        (&["bench", "--threads", "1,two"], 2, "`two` is no number of threads: name numbers with commas"),
        (&["bench", "--threads", "4,2,4"], 2, "4 threads are named twice: name each number once"),
        (
            &["bench", "latency", "--shards", "2"],
            2,
            "the workload latency has no --shards: leave the option out",
        ),
        (&["bench", "--shards", "0"], 2, "say a number from 1 to"),
        (&["bench", "latency", "--table"], 2, "--table has its own workloads: name none, or scaling"),
        (&["bench", "latency", "sparse", "--threads", "1"], 2, "the workload sparse has no --threads"),
        (&["bench", "--compare", "missing.json"], 1, "cannot compare with missing.json: No such file"),
        (&["bench", "--compare", "bad.json"], 1, "bad.json: line 1 is no row of `pagestitch bench --json`"),
        (&["bench", "--report", "no/where.html"], 1, "cannot write no/where.html: No such file"),
    ] {
        let said = error_line(&pagestitch(directory.path(), arguments), status);
        assert!(said.contains(about), "{said}");
    }
}
