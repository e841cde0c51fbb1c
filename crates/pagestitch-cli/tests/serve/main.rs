//! `pagestitch serve` as in production: with signals, and with its errors at the start.

mod metrics;
mod systemd;

use pagestitch::{Pool, Region};
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::{this_test, wait};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGES: usize = 3000;
const PAGE: usize = 4096;

/// A memory file in which each byte of a page identifies the page. No byte is zero.
fn memory(path: &Path) {
    let file = File::create(path).unwrap();
    for page in 0..PAGES {
        file.write_all_at(&[(page % 251) as u8 + 1; PAGE], (page * PAGE) as u64).unwrap();
    }
}

fn serve(folder: &Path, more: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pagestitch"))
        .current_dir(folder)
        .args(["serve", "firecracker", "--socket", "socket", "--memory", "memory"])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A guest that reads some pages, waits for the end of the handler, and reads all pages.
fn guest(test: &str, folder: &Path) -> ChildTest {
    child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
        let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
        let _stream = guest.hand_over(path.as_ref()).unwrap();
        let check = |page: usize| assert_eq!(guest.read(page * PAGE), (page % 251) as u8 + 1, "page {page}");
        (0..PAGES).step_by(97).for_each(check);
        fs::write(format!("{path}.ready"), "").unwrap();
        while fs::exists(path).unwrap() {
            (0..PAGES).step_by(31).for_each(check);
        }
        (0..PAGES).for_each(check);
    })
}

fn wait_for(path: &Path) {
    wait::until(&format!("the file {}", path.display()), || path.exists());
}

#[test]
fn a_shutdown_under_load_completes_the_memory_of_guests() {
    let test = this_test!();
    if child::is_child(test) {
        guest(test, Path::new(""));
    }
    for more in [&[][..], &["--json"]] {
        let folder = tempfile::tempdir().unwrap();
        memory(&folder.path().join("memory"));
        let mut handler = serve(folder.path(), more);
        wait_for(&folder.path().join("socket"));
        let guest = guest(test, folder.path());
        wait_for(&folder.path().join("socket.ready"));
        assert!(Command::new("kill").arg(handler.id().to_string()).status().unwrap().success());
        assert!(handler.wait().unwrap().success());
        guest.wait().expect_pass();
        let lines: Vec<_> = BufReader::new(handler.stdout.unwrap()).lines().map(Result::unwrap).collect();
        let words = ["listening", "serving", "detached"];
        let keys = [r#""event":"listening""#, r#""event":"restored""#, r#""event":"detached""#];
        let expected = if more.is_empty() { words } else { keys };
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines.iter().zip(expected).all(|(line, word)| line.contains(word)), "{lines:?}");
        for line in lines {
            let time = match more.is_empty() {
                true => line.split(' ').next().unwrap().to_owned(),
                false => serde_json::from_str::<Value>(&line).unwrap()["time"].as_str().unwrap().to_owned(),
            };
            assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('T'), "{line}");
        }
    }
}

#[test]
fn each_start_error_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let error_line = |more: &[&str], status: i32| {
        let output = serve(folder.path(), more).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status));
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(
        error_line(&["no-such-diff"], 1),
        "pagestitch: cannot open no-such-diff: No such file or directory (os error 2)\n"
    );
    let diff = File::create(folder.path().join("diff")).unwrap();
    diff.set_len((PAGES * PAGE) as u64).unwrap();
    diff.write_all_at(&[9; PAGE], PAGE as u64).unwrap();
    assert!(error_line(&["diff"], 1).contains("pagestitch extents"));
    let extents = Command::new(env!("CARGO_BIN_EXE_pagestitch"))
        .current_dir(folder.path())
        .args(["extents", "diff"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&extents.stdout), "diff.extents: 4.0 KiB of memory in 1 range\n");
    fs::write(folder.path().join("short"), [0; PAGE]).unwrap();
    assert!(error_line(&["short"], 1).contains("short has 4096 bytes and its base 12288000"));
    assert!(error_line(&["--handshake-timeout", "0"], 2).contains("0 is not in 1.."));
    assert!(error_line(&["--socket-mode", "0999"], 2).contains("say permission bits in octal"));
    assert!(error_line(&["--socket-group", "no-such-group"], 1).contains("no group 'no-such-group'"));
    assert!(error_line(&["--workers", "0"], 2).contains("0 is not in 1.."));
    assert!(error_line(&["--on-unavailable", "pray"], 2).contains("[possible values: poison, kill]"));
    assert!(error_line(&["--record", "no/where"], 1).contains("cannot write no/where: No such file"));
    assert!(error_line(&["--heatmap", "no/where"], 1).contains("cannot write no/where: No such file"));
    record_other(&folder.path().join("other"));
    assert!(error_line(&["--replay", "other"], 1).contains("the recording is of 40960 bytes of memory"));
    let mut first = serve(folder.path(), &[]);
    wait_for(&folder.path().join("socket"));
    assert!(error_line(&[], 1).contains("socket is in use: another handler listens there"));
    first.kill().unwrap();
    first.wait().unwrap();
    // A handler takes over the socket file that a SIGKILL has left behind.
    assert!(folder.path().join("socket").exists());
    let mut second = serve(folder.path(), &[]);
    let mut line = String::new();
    BufReader::new(second.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains(" listening at socket: 11.7 MiB of memory in 1 piece\n"), "{line}");
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn the_socket_has_the_requested_mode_and_group() {
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let group = nix::unistd::getgid().to_string();
    let mut handler = serve(folder.path(), &["--socket-mode", "0660", "--socket-group", &group]);
    let mut line = String::new();
    BufReader::new(handler.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let socket = fs::metadata(folder.path().join("socket")).unwrap();
    handler.kill().unwrap();
    let said = String::from_utf8(handler.wait_with_output().unwrap().stderr).unwrap();
    assert_eq!((socket.mode() & 0o7777, socket.gid().to_string()), (0o660, group), "{line}{said}");
}

/// Writes a recording of ten pages, which no guest here has.
fn record_other(path: &Path) {
    let region = Region::builder().chunk(vec![7; 10 * PAGE]).record().build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[5 * PAGE], 7);
    region.recording().unwrap().write(path).unwrap();
}

#[test]
fn a_lost_recording_or_map_is_a_failure() {
    let test = this_test!();
    let life = |folder: &Path| {
        child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            assert_eq!(guest.read(7 * PAGE), 8);
        })
    };
    if child::is_child(test) {
        life(Path::new(""));
    }
    for option in ["--record", "--heatmap"] {
        let folder = tempfile::tempdir().unwrap();
        memory(&folder.path().join("memory"));
        fs::create_dir(folder.path().join("sub")).unwrap();
        let mut handler = serve(folder.path(), &[option, "sub/file"]);
        let mut lines = BufReader::new(handler.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.next().unwrap().contains(" listening at "));
        fs::remove_dir(folder.path().join("sub")).unwrap();
        life(folder.path()).wait().expect_pass();
        assert!(lines.any(|line| line.contains("cannot write sub/file")), "{option}");
        assert!(Command::new("kill").arg(handler.id().to_string()).status().unwrap().success());
        let output = handler.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{option}: {said}");
        assert!(said.contains("pagestitch: cannot write sub/file: No such file"), "{option}: {said}");
    }
}

#[test]
fn touches_of_the_first_guest_are_replayed_for_the_next() {
    let test = this_test!();
    let life = |folder: &Path| {
        child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            for page in (0..PAGES).step_by(29) {
                assert_eq!(guest.read(page * PAGE), (page % 251) as u8 + 1);
            }
        })
    };
    if child::is_child(test) {
        life(Path::new(""));
    }
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let touched = PAGES.div_ceil(29);
    for (option, told) in
        [("--record", format!("{touched} first touches recorded in touches")), ("--replay", "ended".into())]
    {
        let mut handler = serve(folder.path(), &[option, "touches"]);
        wait_for(&folder.path().join("socket"));
        life(folder.path()).wait().expect_pass();
        let mut lines = BufReader::new(handler.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains(&told)), "{told}");
        assert!(Command::new("kill").arg(handler.id().to_string()).status().unwrap().success());
        assert!(handler.wait().unwrap().success());
    }
    fs::write(folder.path().join("touches"), "garbage").unwrap();
    let output = serve(folder.path(), &["--replay", "touches"]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "pagestitch: touches is no recording of first touches\n");
}

/// If descriptors are short, guests wait until others have ended, and all are served.
#[test]
fn guests_wait_until_descriptors_are_free() {
    let test = this_test!();
    let life = |folder: &Path| {
        child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            assert_eq!(guest.read(1000 * PAGE), (1000 % 251) as u8 + 1);
            thread::sleep(Duration::from_millis(30));
            assert_eq!(guest.read(2000 * PAGE), (2000 % 251) as u8 + 1);
        })
    };
    if child::is_child(test) {
        life(Path::new(""));
    }
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let command = format!(
        "ulimit -n 28 && exec {} serve firecracker --socket socket --memory memory --workers 2 --handshake-timeout 30",
        env!("CARGO_BIN_EXE_pagestitch")
    );
    let mut handler = Command::new("sh")
        .args(["-c", &command])
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&folder.path().join("socket"));
    let guests: Vec<_> = (0..12).map(|_| life(folder.path())).collect();
    guests.into_iter().for_each(|guest| guest.wait().expect_pass());
    handler.kill().unwrap();
    let output = handler.wait_with_output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stderr));
}

/// One peer connects and hangs up in a loop; another connects and is silent.
#[test]
fn a_flood_of_connections_delays_neither_guests_nor_the_shutdown() {
    let test = this_test!();
    let life = |folder: &Path| {
        child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            (0..PAGES).for_each(|page| assert_eq!(guest.read(page * PAGE), (page % 251) as u8 + 1));
        })
    };
    if child::is_child(test) {
        life(Path::new(""));
    }
    let folder = tempfile::tempdir().unwrap();
    memory(&folder.path().join("memory"));
    let mut handler = serve(folder.path(), &["--handshake-timeout", "30"]);
    let stdout = handler.stdout.take().unwrap();
    let reader = thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).count());
    let socket = folder.path().join("socket");
    wait_for(&socket);
    let stop = AtomicBool::new(false);
    let most = thread::scope(|scope| {
        let silent = |kept: usize| {
            let mut streams = std::collections::VecDeque::new();
            while !stop.load(Ordering::Relaxed) {
                streams.extend(UnixStream::connect(&socket).ok());
                streams.truncate(kept);
            }
        };
        for kept in [0, 0, 0, 500] {
            scope.spawn(move || silent(kept));
        }
        let descriptors = || fs::read_dir(format!("/proc/{}/fd", handler.id())).map_or(0, Iterator::count);
        let mut most = 0;
        for _ in 0..3 {
            life(folder.path()).wait().expect_pass();
            most = most.max(descriptors());
        }
        assert!(Command::new("kill").arg(handler.id().to_string()).status().unwrap().success());
        let signalled = Instant::now();
        while handler.try_wait().unwrap().is_none() && signalled.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        let ended = handler.try_wait().unwrap();
        let _ = handler.kill();
        assert!(
            ended.is_some_and(|status| status.success()),
            "{:?} after SIGTERM: {ended:?}",
            signalled.elapsed()
        );
        most
    });
    println!("{most} descriptors at most, {} lines", reader.join().unwrap());
    assert!(most < 1500, "{most} descriptors");
}

/// The handler serves a guest that its PID namespace hides. If unavailable bytes have to kill the
/// guest, the handler refuses it at once, and it does not hang.
#[test]
fn a_guest_of_another_pid_namespace_is_served_or_refused_at_once() {
    let test = this_test!();
    let life = |folder: &Path| {
        child::spawn(test, folder.join("socket").to_str().unwrap(), |path| {
            let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
            let _stream = guest.hand_over(path.as_ref()).unwrap();
            (0..PAGES).for_each(|page| assert_eq!(guest.read(page * PAGE), (page % 251) as u8 + 1));
        })
    };
    if child::is_child(test) {
        life(Path::new(""));
    }
    for (loss, expected) in
        [("poison", "a process of another PID namespace: ended after"), ("kill", "cannot be killed")]
    {
        let folder = tempfile::tempdir().unwrap();
        memory(&folder.path().join("memory"));
        let mut handler = Command::new("unshare")
            .current_dir(folder.path())
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                env!("CARGO_BIN_EXE_pagestitch"),
                "serve",
                "firecracker",
            ])
            .args(["--socket", "socket", "--memory", "memory", "--on-unavailable", loss])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(handler.stdout.take().unwrap()).lines().map_while(Result::ok);
        let listens = lines.next().is_some_and(|line| line.contains(" listening at "));
        let end = listens.then(|| life(folder.path()).wait());
        let told = lines.find(|line| line.contains("ended after") || line.contains("refused"));
        let _ = handler.kill();
        handler.wait().unwrap();
        let Some((end, told)) = end.zip(told) else {
            println!("SKIPPED: no PID namespace can be made here (root, unshare(1))");
            return;
        };
        // Before Linux 6.5, no process of another namespace can be identified for certain.
        assert!(told.contains(expected) || told.contains("before Linux 6.5"), "{told}");
        assert_eq!(end.passed(), told.contains("ended after"), "{}", end.output());
    }
}
