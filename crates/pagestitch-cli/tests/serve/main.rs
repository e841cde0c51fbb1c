//! `pagestitch serve` as in production: with signals, and with its errors at the start.

mod metrics;
mod systemd;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pagestitch::{Pool, Process, Region};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test, wait};
use serde_json::Value;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

const PAGES: usize = 3000;
const PAGE: usize = 4096;
/// Enough for everything that makes progress.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A folder with a memory file in which each byte of a page identifies the page. No byte is zero.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..PAGES).flat_map(|page| [byte_of(page); PAGE]).collect();
    fs::write(folder.path().join("memory"), bytes).unwrap();
    folder
}

const fn byte_of(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

/// The command that serves the memory file of a folder, with more arguments, run by another program if
/// one is given.
fn serve_command(runner: &[&str], folder: &Path, more: &[&str]) -> Command {
    let serve = [env!("CARGO_BIN_EXE_pagestitch"), "serve", "firecracker"];
    let words = [runner, &serve, &["--socket", "socket", "--memory", "memory"], more].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A handler that listens at the socket of its folder, until it is dropped.
struct Handler {
    process: Child,
    /// The first line of its output.
    listening: String,
    /// The others.
    lines: Receiver<String>,
}

impl Handler {
    fn start(folder: &Path, more: &[&str]) -> Self {
        Self::start_by(&[], folder, more).expect("a handler that listens")
    }

    /// None if the handler ends before it listens.
    fn start_by(runner: &[&str], folder: &Path, more: &[&str]) -> Option<Self> {
        let mut process = serve_command(runner, folder, more).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let mut handler = Self { process, listening: String::new(), lines };
        handler.listening = handler.find_line("listening")?;
        Some(handler)
    }

    /// The next line of output that has one of these words, if it comes.
    fn find_line(&self, words: &str) -> Option<String> {
        let lines = || self.lines.recv_timeout(TIME_LIMIT).ok();
        std::iter::from_fn(lines).find(|line| words.split('|').any(|word| line.contains(word)))
    }

    fn wait_for_line(&self, words: &str) {
        assert!(self.find_line(words).is_some(), "no further line of the handler has {words}");
    }

    /// Waits for these words in the standard error, which is read up to them.
    fn wait_for_warning(&mut self, words: &str) {
        let mut lines = BufReader::new(self.process.stderr.as_mut().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains(words)), "the handler has not warned: {words}");
    }

    /// Sends SIGTERM, and waits for the end. Returns the exit code, and the standard error.
    fn stop(&mut self) -> (Option<i32>, String) {
        let process = Process::open(self.process.id()).unwrap();
        kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(wait::readable(&process, TIME_LIMIT), "the handler ignores SIGTERM");
        let mut errors = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (self.process.wait().unwrap().code(), errors)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The life of a guest at the socket of the argument. It checks pages, then does `more`.
fn live(socket: &str, pages: impl Iterator<Item = usize>, more: impl FnOnce(&dyn Fn(usize))) {
    let guest = Guest::new(&[PAGES * PAGE], false).unwrap();
    let _stream = guest.hand_over(socket.as_ref()).unwrap();
    let check = |page: usize| assert_eq!(guest.read(page * PAGE), byte_of(page), "page {page}");
    pages.for_each(check);
    more(&check);
}

#[test]
fn a_shutdown_under_load_completes_the_memory_of_guests() {
    let guest = child::body(this_test!(), |socket| {
        live(socket, (0..PAGES).step_by(97), |check| {
            while fs::exists(socket).unwrap() {
                (0..PAGES).step_by(31).for_each(check);
            }
            (0..PAGES).for_each(check);
        });
    });
    for (more, serving, detached) in
        [(&[][..], "serving", "detached"), (&["--json"], r#""event":"restored""#, r#""event":"detached""#)]
    {
        let folder = folder();
        let mut handler = Handler::start(folder.path(), more);
        let guest = guest.spawn(folder.path().join("socket"));
        handler.wait_for_line(serving);
        assert_eq!(handler.stop(), (Some(0), String::new()));
        guest.wait().expect_pass();
        let lines: Vec<_> = [handler.listening.clone()].into_iter().chain(handler.lines.iter()).collect();
        assert!(matches!(&lines[..], [_, line] if line.contains(detached)), "{lines:?}");
        for line in lines {
            let time = match more.is_empty() {
                true => line.split(' ').next().unwrap().to_owned(),
                false => serde_json::from_str::<Value>(&line).unwrap()["time"].as_str().unwrap().to_owned(),
            };
            assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('T'), "{line}");
        }
    }
}

/// The handler is killed when it has told that the guest needs it no more.
#[test]
fn a_guest_that_is_filled_in_the_background_outlives_a_killed_handler() {
    let guest = child::body(this_test!(), |socket| {
        live(socket, 0..1, |check| {
            let killed = || fs::exists(format!("{socket}.killed")).unwrap();
            wait::until("the end of the handler", killed);
            (0..PAGES).for_each(check);
        });
    });
    for more in [&["--json", "--background"][..], &["--json", "--background", "64M"]] {
        let folder = folder();
        let mut handler = Handler::start(folder.path(), more);
        let guest = guest.spawn(folder.path().join("socket"));
        let filled: Value = serde_json::from_str(&handler.find_line("filled").unwrap()).unwrap();
        assert_eq!(filled["pages_missing"], 0, "{filled}");
        assert!((1..=PAGES as u64).contains(&filled["pages"].as_u64().unwrap()), "{filled}");
        let detached: Value = serde_json::from_str(&handler.find_line("detached").unwrap()).unwrap();
        assert!(detached["pid"] == filled["pid"] && detached["error"].is_null(), "{detached}");
        handler.process.kill().unwrap();
        handler.process.wait().unwrap();
        fs::write(folder.path().join("socket.killed"), "").unwrap();
        guest.wait().expect_pass();
    }
}

#[test]
fn each_start_error_is_one_line() {
    let folder = folder();
    let error_line = |more: &[&str], status: i32| {
        let output = serve_command(&[], folder.path(), more).output().unwrap();
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
    assert!(error_line(&["--handshake-timeout", "0"], 2).contains("say a number from 1 to 65535"));
    assert!(error_line(&["--background", "0"], 2).contains("nothing would be filled"));
    assert!(
        error_line(&["--background", "quickly"], 2).contains("it is no number of bytes a second: write 4096")
    );
    assert!(error_line(&["--background", "-1"], 2).contains("-1"));
    assert!(error_line(&["--socket-mode", "0999"], 2).contains("say permission bits in octal"));
    assert!(error_line(&["--socket-group", "no-such-group"], 1).contains("no group 'no-such-group'"));
    assert!(error_line(&["--workers", "0"], 2).contains("say a number from 1 to 65535"));
    assert!(error_line(&["--on-unavailable", "pray"], 2).contains("[possible values: poison, kill]"));
    assert!(error_line(&["--record", "no/where"], 1).contains("cannot write no/where: No such file"));
    assert!(error_line(&["--heatmap", "no/where"], 1).contains("cannot write no/where: No such file"));
    record_other(&folder.path().join("other"));
    assert!(error_line(&["--replay", "other"], 1).contains("the recording is of 40960 bytes of memory"));
    let first = Handler::start(folder.path(), &[]);
    assert!(error_line(&[], 1).contains("socket is in use: another handler listens there"));
    drop(first);
    // A handler takes over the socket file that a SIGKILL has left behind.
    assert!(folder.path().join("socket").exists());
    let second = Handler::start(folder.path(), &[]);
    let listening = &second.listening;
    assert!(listening.ends_with(" listening at socket: 11.7 MiB of memory in 1 piece"), "{listening}");
}

#[test]
fn a_socket_with_a_group_has_mode_0660() {
    let (folder, group) = (folder(), nix::unistd::getgid().to_string());
    let _handler = Handler::start(folder.path(), &["--socket-group", &group]);
    let socket = fs::metadata(folder.path().join("socket")).unwrap();
    assert_eq!((socket.mode() & 0o7777, socket.gid().to_string()), (0o660, group));
}

/// Writes a recording of ten pages, which no guest here has.
fn record_other(path: &Path) {
    let region = Region::builder().chunk(vec![7; 10 * PAGE]).record().build(&Pool::new().unwrap()).unwrap();
    assert_eq!(region.as_slice()[5 * PAGE], 7);
    region.recording().unwrap().write(path).unwrap();
}

#[test]
fn a_lost_recording_or_map_is_a_failure() {
    let guest = child::body(this_test!(), |socket| live(socket, 7..8, |_| ()));
    for option in ["--record", "--heatmap"] {
        let folder = folder();
        fs::create_dir(folder.path().join("sub")).unwrap();
        let mut handler = Handler::start(folder.path(), &[option, "sub/file"]);
        fs::remove_dir(folder.path().join("sub")).unwrap();
        guest.spawn(folder.path().join("socket")).wait().expect_pass();
        handler.wait_for_line("cannot write sub/file");
        let (code, said) = handler.stop();
        assert_eq!(code, Some(1), "{option}: {said}");
        assert!(said.contains("pagestitch: cannot write sub/file: No such file"), "{option}: {said}");
    }
}

#[test]
fn touches_of_the_first_guest_are_replayed_for_the_next() {
    const STEP: usize = 29;
    let guest = child::body(this_test!(), |socket| live(socket, (0..PAGES).step_by(STEP), |_| ()));
    let folder = folder();
    let recorded = format!("{} first touches recorded in touches", PAGES.div_ceil(STEP));
    for (option, told) in [("--record", recorded.as_str()), ("--replay", "ended")] {
        let mut handler = Handler::start(folder.path(), &[option, "touches"]);
        guest.spawn(folder.path().join("socket")).wait().expect_pass();
        handler.wait_for_line(told);
        assert_eq!(handler.stop().0, Some(0));
    }
    fs::write(folder.path().join("touches"), "garbage").unwrap();
    let output = serve_command(&[], folder.path(), &["--replay", "touches"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "pagestitch: touches is no recording of first touches\n");
}

/// If descriptors are short, guests wait until others have ended, and all are served.
#[test]
fn guests_wait_until_descriptors_are_free() {
    let guest = child::body(this_test!(), |socket| {
        live(socket, 1000..1001, |check| {
            wait::until("the others may end", || Path::new(socket).with_file_name("end").exists());
            check(2000);
        });
    });
    let mut tried = 0;
    for limit in 18..40 {
        let (folder, limited) = (folder(), format!(r#"ulimit -n {limit} && exec "$@""#));
        let limited = ["sh", "-c", &limited, "sh"];
        // With the lowest limits, the handler does not start.
        let arguments = ["--workers", "2", "--handshake-timeout", "30"];
        let Some(mut handler) = Handler::start_by(&limited, folder.path(), &arguments) else { continue };
        // Those that the test has inherited may have higher numbers.
        let descriptors = fs::read_dir(format!("/proc/{}/fd", handler.process.id())).unwrap();
        let numbers = descriptors.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse::<usize>());
        let free = limit - numbers.filter(|number| *number.as_ref().unwrap() < limit).count();
        // A guest takes four for a moment.
        if !(4..10).contains(&free) {
            continue;
        }
        let guests: Vec<_> = (0..12).map(|_| guest.spawn(folder.path().join("socket"))).collect();
        handler.wait_for_warning("no descriptor is left for another guest");
        fs::write(folder.path().join("end"), "").unwrap();
        guests.into_iter().for_each(|guest| guest.wait().expect_pass());
        tried += 1;
    }
    assert!(tried >= 4, "{tried} limits");
}

/// Peers connect and hang up in a loop, and one connects and is silent.
#[test]
fn a_flood_of_connections_delays_no_shutdown_and_takes_few_descriptors() {
    let guest = child::body(this_test!(), |socket| live(socket, 0..PAGES, |_| ()));
    let folder = folder();
    let mut handler = Handler::start(folder.path(), &["--handshake-timeout", "30"]);
    let (socket, end) = (folder.path().join("socket"), AtomicBool::new(false));
    let (code, most) = scope(|scope| {
        for kept in [0, 0, 0, 500] {
            let (socket, end) = (&socket, &end);
            scope.spawn(move || {
                let mut streams = VecDeque::new();
                while !end.load(Ordering::Relaxed) {
                    streams.extend(UnixStream::connect(socket).ok());
                    streams.truncate(kept);
                }
            });
        }
        let descriptors =
            || fs::read_dir(format!("/proc/{}/fd", handler.process.id())).map_or(0, Iterator::count);
        let served = (0..3).map(|_| (guest.spawn(&socket).wait(), descriptors())).collect::<Vec<_>>();
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handler.stop().0));
        end.store(true, Ordering::Relaxed);
        served.iter().for_each(|(guest, _)| guest.expect_pass());
        (stopped.unwrap(), served.iter().map(|(_, descriptors)| *descriptors).max())
    });
    assert_eq!(code, Some(0));
    assert!(most < Some(1500), "{most:?} descriptors");
}

/// The handler serves a guest that its PID namespace hides. If unavailable bytes have to kill the
/// guest, the handler refuses it at once, and it does not hang.
#[test]
fn a_guest_of_another_pid_namespace_is_served_or_refused_at_once() {
    let guest = child::body(this_test!(), |socket| live(socket, 0..PAGES, |_| ()));
    for (loss, expected) in
        [("poison", "a process of another PID namespace: ended after"), ("kill", "cannot be killed")]
    {
        let (folder, unshare) = (folder(), ["unshare", "--pid", "--fork", "--kill-child"]);
        let Some(handler) = Handler::start_by(&unshare, folder.path(), &["--on-unavailable", loss]) else {
            println!("SKIPPED: no PID namespace can be made here (root, unshare(1))");
            return;
        };
        let end = guest.spawn(folder.path().join("socket")).wait();
        let told = handler.find_line("ended after|refused").expect("the end of the guest");
        // Before Linux 6.5, no process of another namespace can be identified for certain.
        assert!(told.contains(expected) || told.contains("before Linux 6.5"), "{told}");
        assert_eq!(end.passed(), told.contains("ended after"), "{}", end.output());
    }
}
