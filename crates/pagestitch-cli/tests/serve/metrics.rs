//! The figures of a handler for Prometheus, while it serves.

use super::{Handler, PAGE, PAGES, folder, live, serve_command};
use pagestitch_testkit::{child, this_test, wait};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

/// The answer to a scrape.
fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: handler\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    answer
}

fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(&format!("pagestitch_{series} ")));
    line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).parse().unwrap()
}

#[test]
fn metrics_count_guests_while_they_are_served_and_after_they_have_ended() {
    let guest = child::body(this_test!(), |socket| {
        live(socket, (0..PAGES).step_by(50), |_| {
            let ready = Path::new(socket).with_file_name("ready");
            fs::write(&ready, "").unwrap();
            wait::until("the guest may end", || !ready.exists());
        });
    });
    let folder = folder();
    let ready = folder.path().join("ready");
    let mut handler =
        Handler::start(folder.path(), &["--json", "--metrics", "127.0.0.1:0", "--no-readahead"]);
    let listening: Value = serde_json::from_str(&handler.listening).unwrap();
    let address = listening["metrics"].as_str().unwrap();
    // This connection says nothing, and delays neither the scrapes nor the guest.
    let _silent = TcpStream::connect(address).unwrap();
    let page = scrape(address);
    assert_eq!((value(&page, "guests"), value(&page, "snapshot_bytes")), (0.0, (PAGES * PAGE) as f64));
    let guest = guest.spawn(folder.path().join("socket"));
    wait::until("the guest has touched its pages", || ready.exists());
    // A guest, and a page, are counted a moment after its thread runs on.
    let touched = PAGES.div_ceil(50) as f64;
    let is_counted = |page: &str| {
        value(page, "guests_restored_total") == 1.0
            && value(page, "fault_seconds_count{part=\"fill\"}") >= touched
    };
    wait::until("the guest is counted", || is_counted(&scrape(address)));
    let page = scrape(address);
    assert_eq!((value(&page, "guests"), value(&page, "guests_restored_total")), (1.0, 1.0));
    assert!(value(&page, "faults_total") >= touched, "{page}");
    assert!(value(&page, "fault_seconds_count{part=\"fill\"}") >= touched, "{page}");
    fs::remove_file(ready).unwrap();
    guest.wait().expect_pass();
    handler.wait_for_line(r#""event":"ended""#);
    // The handler tells of the end a moment before it counts it.
    wait::until("the end is counted", || value(&scrape(address), "guests") == 0.0);
    let page = scrape(address);
    assert_eq!(value(&page, "guests_ended_total"), 1.0);
    assert!(value(&page, "faults_total") >= touched, "{page}");
    let taken = serve_command(&[], folder.path(), &["--metrics", address]).output().unwrap();
    let said = String::from_utf8(taken.stderr).unwrap();
    assert!(
        taken.status.code() == Some(1) && said.contains("for --metrics: Address already in use"),
        "{said}"
    );
    assert_eq!(handler.stop().0, Some(0));
}

#[test]
fn a_malformed_metrics_address_names_a_right_one() {
    let folder = tempfile::tempdir().unwrap();
    for bad in ["9470", "localhost:9470", "127.0.0.1:99999", ""] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
        command.args(["serve", "firecracker", "--socket", "s", "--memory", "m", "--metrics", bad]);
        let output = command.current_dir(folder.path()).stdout(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains("--metrics 127.0.0.1:9470"), "{said}");
    }
}
