//! Each attack of a hostile peer on `pagestitch serve firecracker`, beside an innocent guest whose
//! bytes are all checked.
//!
//! The attack must hardly delay the touches of the innocent guest. The baseline has the same load
//! without the hostile peer: there the same attack runs against another handler of this machine.

mod attacks;
mod fuse;
mod signal;
mod snapshot;

use attacks::ATTACKS;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};
use pagestitch::Process;
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::wait;
use signal::Receiver;
use snapshot::{BYTES, PAGE, PAGES, byte_at};
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const TEST: &str = "no_attack_of_a_peer_harms_an_innocent_guest";

/// A handler as in production.
struct Handler {
    process: Child,
    folder: tempfile::TempDir,
    /// The lines of its output.
    lines: Option<JoinHandle<Vec<String>>>,
}

impl Handler {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        snapshot::write(&folder.path().join("memory"));
        let mut process = Command::new(env!("CARGO_BIN_EXE_pagestitch"))
            .current_dir(folder.path())
            .args(["serve", "firecracker", "--socket", "socket", "--memory", "memory"])
            .args(["--on-stop", "abandon", "--handshake-timeout", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains(" listening at "));
        let read = |lines: Lines<BufReader<ChildStdout>>| lines.map_while(Result::ok).collect();
        let lines = Some(thread::spawn(move || read(lines)));
        Self { process, folder, lines }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Starts a child that plays a part at this handler.
    fn child(&self, part: &str) -> ChildTest {
        child::spawn(TEST, &format!("{part} {}", self.socket().display()), play)
    }

    /// The 99th percentile of the touches of an innocent guest.
    fn touches(&self) -> Duration {
        let end = self.child(INNOCENT).wait_at_most(TIME_LIMIT);
        assert!(end.passed(), "the innocent guest: {}", end.output());
        let nanoseconds = end.output().lines().find_map(|line| line.strip_prefix(P99)?.parse().ok());
        Duration::from_nanos(nanoseconds.expect("the innocent guest prints its latency"))
    }

    /// The same during an attack on `attacked`. None if the attack is impossible here.
    fn touches_during(&self, attack: &str, attacked: &Self) -> Option<Duration> {
        let ready = Receiver::bind(attacked.folder.path().join("ready"));
        // The daemon of an attack ends when this is dropped.
        let end = Receiver::bind(attacked.folder.path().join("end"));
        let mut attacker = attacked.child(attack);
        let skipped = match ready.receive(TIME_LIMIT) {
            Some(reason) => (!reason.is_empty()).then_some(reason),
            None => panic!("the attack {attack} never began"),
        };
        let touches = skipped.is_none().then(|| self.touches());
        // The files of the attacker are closed only after their daemon has ended.
        drop(end);
        attacker.kill();
        attacker.wait();
        // The connections that the attack has left in the backlog are work for the attacked handler. It
        // has done that work when it serves a guest that connects after them, and delays no other try.
        attacked.touches();
        skipped.iter().for_each(|reason| println!("SKIPPED {attack}: {reason}"));
        touches
    }

    /// Shuts the handler down. Returns the lines of its output.
    fn stop(mut self) -> Vec<String> {
        assert!(self.process.try_wait().unwrap().is_none(), "the handler has ended");
        let pid = Pid::from_raw(self.process.id().cast_signed());
        let process = Process::open(self.process.id()).unwrap();
        kill(pid, Signal::SIGTERM).unwrap();
        assert!(wait::readable(&process, TIME_LIMIT), "the handler ignores SIGTERM");
        self.lines.take().unwrap().join().unwrap()
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Plays a part in a child: the innocent guest, or an attack until the child is killed.
fn play(argument: &str) {
    let (part, socket) = argument.split_once(' ').unwrap();
    let socket = Path::new(socket);
    if part == INNOCENT {
        return play_innocent_guest(socket);
    }
    // The test measures the work that the attack makes for the handler, not that of the attacker.
    let _ = Command::new("renice").args(["-n", "19", "-p", &gettid().to_string()]).output();
    let attack = ATTACKS.iter().find(|(name, _)| *name == part).unwrap().1;
    let ready = socket.with_file_name("ready");
    if let Err(reason) = attack(socket, &|| signal::send(&ready, "")) {
        signal::send(&ready, &reason.to_string());
    }
}

fn play_innocent_guest(socket: &Path) {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let _stream = guest.hand_over(socket).unwrap();
    let bytes = snapshot::filled(&socket.with_file_name("memory"));
    let mut touches: Vec<Duration> =
        (0..PAGES).map(|page| page * 1789 % PAGES).map(|page| touch(&guest, page, &bytes)).collect();
    touches.sort_unstable();
    println!("\n{P99}{}", touches[PAGES * 99 / 100].as_nanos());
}

/// The duration of the first touch of a page, whose bytes are then all checked.
fn touch(guest: &Guest, page: usize, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    let first = guest.read(page * PAGE);
    let touch = began.elapsed();
    assert_eq!(first, byte_at(page * PAGE), "page {page}");
    let mut seen = [0; PAGE];
    guest.copy_to(page * PAGE, &mut seen);
    assert!(seen == bytes[page * PAGE..][..PAGE], "page {page} has other bytes");
    touch
}

/// True if the attack hardly delays the innocent guest, compared with the same attack on another handler.
fn is_harmless(attack: &str, handler: &Handler, other: &Handler) -> bool {
    let Some(baseline) = handler.touches_during(attack, other) else { return true };
    let Some(attacked) = handler.touches_during(attack, handler) else { return true };
    println!("{attack}: p99 {attacked:?}, and {baseline:?} during the same attack on another handler");
    attacked <= (baseline * MAX_RATIO).max(SLICE) && attacked <= MAX_LATENCY
}

#[test]
fn no_attack_of_a_peer_harms_an_innocent_guest() {
    if child::is_child(TEST) {
        child::spawn(TEST, "", play);
    }
    let (handler, other) = (Handler::start(), Handler::start());
    // The first touches bring both memory files into the page cache.
    handler.touches();
    other.touches();
    for (attack, _) in ATTACKS {
        let harmless = (0..TRIES).any(|_| is_harmless(attack, &handler, &other));
        assert!(harmless, "{attack} delays an innocent guest in each of {TRIES} tries");
    }
    drop(other);
    let lines = handler.stop();
    let longest = lines.iter().map(String::len).max().unwrap_or_default();
    println!("{} lines, the longest of {longest} bytes", lines.len());
    assert!(longest < 500, "a line of {longest} bytes");
}

const INNOCENT: &str = "innocent";
/// The prefix of the line with the latency of the innocent guest.
const P99: &str = "p99 in ns: ";
const MAX_RATIO: u32 = 3;
/// The time for which the scheduler lets a thread run while others wait for its CPU, on a small machine.
/// The threads of an attacked handler have such work, and one slice tells nothing of their number.
const SLICE: Duration = Duration::from_micros(1400);
const MAX_LATENCY: Duration = Duration::from_millis(50);
/// Other work on this machine may delay a single try.
const TRIES: usize = 5;
/// Enough for everything that makes progress.
const TIME_LIMIT: Duration = Duration::from_secs(60);
