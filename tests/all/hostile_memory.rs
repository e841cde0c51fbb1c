//! Owners of adopted memory that mean harm: they may harm their own guest, and neither the handler nor another guest.

use crate::{own_memory, pattern, until};
use pagestitch_firecracker::{Handler, OnStop, Snapshot, Stopper};
use pagestitch_testkit::child;
use pagestitch_testkit::guest::Guest;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PAGE: usize = 4096;
/// Long for anything that is not waited for.
const LONG: Duration = Duration::from_secs(30);

/// A handler in a thread, for guests with so much memory.
struct Running {
    folder: TempDir,
    expected: Vec<u8>,
    stop: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// The snapshot is a file without holes as far as `written`, and of `bytes` bytes.
    fn start(bytes: usize, written: usize, on_stop: OnStop) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, expected) = (folder.path().join("snapshot"), pattern(3, written));
        fs::write(&file, &expected).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_len(bytes as u64).unwrap();
        let handler =
            Handler::builder(Snapshot::open([file]).unwrap()).on_stop(on_stop).own_memory(own_memory());
        let handler = handler.bind(folder.path().join("socket")).unwrap();
        let stop = handler.stopper();
        let thread = thread::spawn(move || handler.run(|_| {}).unwrap());
        Self { folder, expected, stop, thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Whether the handler comes to its end when it is told to stop.
    fn stops(&mut self) -> bool {
        self.stop.stop();
        let (thread, began) = (self.thread.take().unwrap(), Instant::now());
        while !thread.is_finished() && began.elapsed() < LONG {
            thread::sleep(Duration::from_millis(1));
        }
        thread.is_finished() && thread.join().is_ok()
    }
}

fn connect(path: &Path, bytes: usize) -> (Arc<Guest>, UnixStream) {
    let guest = Guest::new(&[bytes], false).unwrap();
    let stream = guest.hand_over(path).unwrap();
    (Arc::new(guest), stream)
}

/// A handler is told to stop while a guest has cleared the flag.
#[test]
fn a_guest_that_makes_its_userfaultfd_blocking_holds_up_nobody() {
    let test = "hostile_memory::a_guest_that_makes_its_userfaultfd_blocking_holds_up_nobody";
    const BYTES: usize = 100 * PAGE;
    let life = |path: &str| {
        let (guest, mut stream) = connect(path.as_ref(), BYTES);
        assert_eq!(guest.read(0), pattern(3, 1)[0]);
        guest.make_blocking().unwrap();
        fs::write(Path::new(path).with_file_name("done"), "").unwrap();
        let _ = stream.read(&mut [0]);
        loop {
            thread::park();
        }
    };
    if child::is_child(test) {
        child::beside(test, "", life);
    }
    let mut running = Running::start(BYTES, BYTES, OnStop::Finish);
    let mut hostile = child::beside(test, running.socket().to_str().unwrap(), life);
    until(|| running.folder.path().join("done").exists());
    let (innocent, _stream) = connect(&running.socket(), BYTES);
    let (done, read) = mpsc::channel();
    let (guest, expected) = (Arc::clone(&innocent), running.expected.clone());
    thread::spawn(move || done.send((0..BYTES).step_by(PAGE).all(|at| guest.read(at) == expected[at])));
    assert_eq!(read.recv_timeout(LONG), Ok(true), "the innocent guest");
    let stops = running.stops();
    hostile.kill();
    assert!(stops, "the handler waits for ever");
}
