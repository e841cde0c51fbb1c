//! The figures of a handler for Prometheus, while it serves.

use super::{PAGE, PAGES, memory, serve};
use pagestitch_testkit::child;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::this_test;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
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
    let test = this_test!();
    let life = |path: &str| {
        child::spawn(test, path, |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            (0..PAGES)
                .step_by(50)
                .for_each(|page| assert_eq!(guest.read(page * PAGE), (page % 251) as u8 + 1));
            fs::write(format!("{path}.ready"), "").unwrap();
            while fs::exists(format!("{path}.ready")).unwrap() {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        })
    };
    if child::is_child(test) {
        life("");
    }
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let mut handler = serve(folder.path(), &["--json", "--metrics", "127.0.0.1:0", "--no-readahead"]);
    let mut lines = BufReader::new(handler.stdout.take().unwrap()).lines().map(Result::unwrap);
    let listening: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
    let address = listening["metrics"].as_str().unwrap();
    // This connection says nothing, and delays neither the scrapes nor the guest.
    let _silent = TcpStream::connect(address).unwrap();
    let page = scrape(address);
    assert_eq!((value(&page, "guests"), value(&page, "snapshot_bytes")), (0.0, (PAGES * PAGE) as f64));
    let guest = life(folder.path().join("socket").to_str().unwrap());
    super::wait_for(&folder.path().join("socket.ready"));
    let page = scrape(address);
    // A page is counted a moment after its thread runs on.
    let touched = PAGES.div_ceil(50) as f64 - 1.0;
    assert_eq!((value(&page, "guests"), value(&page, "guests_restored_total")), (1.0, 1.0));
    assert!(value(&page, "faults_total") >= touched, "{page}");
    assert!(value(&page, "fault_seconds_count{part=\"fill\"}") >= touched, "{page}");
    fs::remove_file(folder.path().join("socket.ready")).unwrap();
    guest.wait().expect_pass();
    assert!(lines.any(|line| line.contains(r#""event":"ended""#)));
    let page = scrape(address);
    assert_eq!((value(&page, "guests"), value(&page, "guests_ended_total")), (0.0, 1.0));
    assert!(value(&page, "faults_total") >= touched, "{page}");
    let taken = serve(folder.path(), &["--metrics", address]).wait_with_output().unwrap();
    let said = String::from_utf8(taken.stderr).unwrap();
    assert!(
        taken.status.code() == Some(1) && said.contains("for --metrics: Address already in use"),
        "{said}"
    );
    assert!(Command::new("kill").arg(handler.id().to_string()).status().unwrap().success());
    assert!(handler.wait().unwrap().success());
}

#[test]
fn a_malformed_metrics_address_names_a_right_one() {
    let folder = tempfile::tempdir().unwrap();
    for bad in ["9100", "localhost:9100", "127.0.0.1:99999", ""] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
        command.args(["serve", "firecracker", "--socket", "s", "--memory", "m", "--metrics", bad]);
        let output = command.current_dir(folder.path()).stdout(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains("--metrics 127.0.0.1:9100"), "{said}");
    }
}
