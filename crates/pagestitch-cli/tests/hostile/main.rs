//! Every attack of a hostile peer on `pagestitch serve firecracker`, one after the other, beside an innocent guest whose bytes are all
//! verified, and whose touches take hardly longer than without the attack.

mod attacks;
mod fuse;

use attacks::{ATTACKS, BUSY};
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::guest::Guest;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Memory of a guest: mostly zeros, so that it costs no disk.
const BYTES: usize = 16 << 30;
const PAGE: usize = 4096;
/// Pages that hold bytes, and that the innocent guest touches.
const PAGES: usize = 3000;
const TEST: &str = "no_attack_of_a_peer_harms_an_innocent_guest";

/// The byte at an offset of the snapshot; never zero where it has bytes.
const fn byte_at(at: usize) -> u8 {
    (at.wrapping_mul(31).wrapping_add(at >> 12) % 251) as u8 + 1
}

/// The handler, as it is put in production.
struct Handler {
    process: Child,
    folder: tempfile::TempDir,
    lines: Option<JoinHandle<Vec<String>>>,
}

impl Handler {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let memory = File::create(folder.path().join("memory")).unwrap();
        memory.set_len(BYTES as u64).unwrap();
        let bytes: Vec<u8> = (0..PAGES * PAGE).map(byte_at).collect();
        memory.write_all_at(&bytes, 0).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_pagestitch"))
            .current_dir(folder.path())
            .args(["serve", "firecracker", "--socket", "socket", "--memory", "memory"])
            .args(["--on-stop", "abandon", "--handshake-timeout", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        let lines = thread::spawn(move || said.lines().map_while(Result::ok).collect());
        let handler = Self { process, folder, lines: Some(lines) };
        wait_until("the socket", || handler.socket().exists());
        handler
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Starts a child that plays a part.
    fn child(&self, part: &str) -> ChildTest {
        child::spawn(TEST, &format!("{part} {}", self.socket().display()), play)
    }

    /// The 99th percentile of an innocent guest's touches.
    fn touches(&self) -> Duration {
        let mut child = self.child("innocent");
        let done = self.folder.path().join("touched");
        let died = || {
            fs::read_to_string(format!("/proc/{}/stat", child.id()))
                .map_or(true, |stat| stat.contains(") Z "))
        };
        let began = Instant::now();
        while !done.exists() && !died() && began.elapsed() < LONG {
            thread::sleep(Duration::from_millis(5));
        }
        if !done.exists() && !died() {
            child.kill();
        }
        let end = child.wait();
        assert!(end.passed(), "the innocent guest: {}", end.output());
        let nanoseconds = fs::read_to_string(&done).unwrap();
        fs::remove_file(done).unwrap();
        Duration::from_nanos(nanoseconds.parse().unwrap())
    }

    /// The same beside an attack.
    fn touches_beside(&self, attack: &str) -> Option<Duration> {
        let ready = self.folder.path().join(format!("{attack}.ready"));
        let _ = fs::remove_file(&ready);
        let mut attacker = self.child(attack);
        let skipped = self.folder.path().join(format!("{attack}.skipped"));
        wait_until(attack, || ready.exists() || skipped.exists());
        if skipped.exists() {
            println!("SKIPPED {attack}: {}", fs::read_to_string(skipped).unwrap());
            attacker.wait();
            return None;
        }
        let touches = self.touches();
        // The attacker's own files are closed only when their daemon has ended.
        let enough = self.folder.path().join("enough");
        fs::write(&enough, "").unwrap();
        attacker.kill();
        attacker.wait();
        fs::remove_file(enough).unwrap();
        Some(touches)
    }

    /// Told to stop, after all this.
    fn stop(mut self) -> Vec<String> {
        assert!(self.process.try_wait().unwrap().is_none(), "the handler has ended");
        assert!(Command::new("kill").arg(self.process.id().to_string()).status().unwrap().success());
        let began = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < LONG, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
        self.lines.take().unwrap().join().unwrap()
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a child does: the innocent guest, or an attack, until it is killed.
fn play(argument: &str) {
    let (part, socket) = argument.split_once(' ').unwrap();
    let socket = Path::new(socket);
    if part == "innocent" {
        return innocent(socket);
    }
    // What is measured is what the handler does for the attacker, and not the processor time that it takes itself.
    let _ = Command::new("renice").args(["-n", "19", "-p", &std::process::id().to_string()]).output();
    let attack = ATTACKS.iter().chain([&BUSY]).find(|(name, _)| *name == part).unwrap().1;
    if let Err(why) =
        attack(socket, &|| fs::write(socket.with_file_name(format!("{part}.ready")), "").unwrap())
    {
        fs::write(socket.with_file_name(format!("{part}.skipped")), why.to_string()).unwrap();
    }
}

fn innocent(socket: &Path) {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let _stream = guest.hand_over(socket).unwrap();
    let mut touches: Vec<Duration> =
        (0..PAGES).map(|page| page * 1789 % PAGES).map(|page| touch(&guest, page)).collect();
    touches.sort_unstable();
    let p99 = touches[PAGES * 99 / 100];
    let part = socket.with_file_name("touched.part");
    fs::write(&part, p99.as_nanos().to_string()).unwrap();
    fs::rename(part, socket.with_file_name("touched")).unwrap();
}

/// The time of the first touch of a page, all of whose bytes are verified.
fn touch(guest: &Guest, page: usize) -> Duration {
    let began = Instant::now();
    let first = guest.read(page * PAGE);
    let touch = began.elapsed();
    assert_eq!(first, byte_at(page * PAGE), "page {page}");
    (page * PAGE..(page + 1) * PAGE).for_each(|at| assert_eq!(guest.read(at), byte_at(at), "byte {at}"));
    touch
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < LONG, "{what} has not come about");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn no_attack_of_a_peer_harms_an_innocent_guest() {
    if child::is_child(TEST) {
        child::spawn(TEST, "", play);
    }
    let handler = Handler::start();
    // The first touches bring the memory file into the page cache.
    handler.touches();
    for (attack, _) in ATTACKS {
        let mut tried = Vec::new();
        let held = (0..2).any(|_| {
            let alone = handler.touches_beside(BUSY.0).expect("processors");
            let Some(beside) = handler.touches_beside(attack) else { return true };
            println!("{attack}: 99 of 100 touches within {beside:?}, {alone:?} without");
            tried.push((alone, beside));
            beside <= alone * 10 && beside <= Duration::from_millis(50)
        });
        assert!(held, "{attack}: without and beside it, 99 of 100 touches took {tried:?}");
    }
    let lines = handler.stop();
    let longest = lines.iter().map(String::len).max().unwrap_or_default();
    println!("{} lines, the longest of {longest} bytes", lines.len());
    assert!(longest < 500, "a line of {longest} bytes");
}

/// Long for anything that is not held up.
const LONG: Duration = Duration::from_secs(60);
