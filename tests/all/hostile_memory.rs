//! Hostile owners of adopted memory: an owner may harm its own guest, and neither the handler nor
//! another guest.

use crate::handler::RunningHandler;
use crate::machine::rounds;
use crate::{PAGE, handle_bus_errors, lacks_poison, own_memory, pattern, serve_until, until};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getgid, getuid, pause};
use pagestitch::{Manual, Pool, Process, Region};
use pagestitch_firecracker::{Handler, OnStop, Snapshot};
use pagestitch_testkit::child::{self, ChildTest};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::this_test;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Far above the time of one touch beside an attack, and below the 111 s where each of a thousand
/// faults of an attack holds the only worker for 111 ms.
const LONG: Duration = Duration::from_secs(60);
/// Far above the seconds that the touches of an innocent guest take beside an attack, even on a loaded machine.
const ALL: Duration = Duration::from_secs(240);
/// The written part of a snapshot. The rest is zeros.
const WRITTEN: usize = 500 * PAGE;

/// A handler for guests with `bytes` of memory, and its guests.
struct Attacked {
    handler: RunningHandler,
    bytes: usize,
    /// They live until the handler has stopped.
    innocent: Mutex<Vec<(Arc<Guest>, UnixStream)>>,
    /// One attack at a time, because attacks with many threads take the CPUs from each other.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Attacked {
    fn start(bytes: usize) -> Self {
        Self::with(&Pool::new().unwrap(), bytes, OnStop::Abandon, |_| {})
    }

    fn with(pool: &Pool, bytes: usize, on_stop: OnStop, write: impl FnOnce(&fs::File)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snapshot");
        fs::write(&path, pattern(3, WRITTEN)).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(bytes as u64).unwrap();
        write(&file);
        let builder = Handler::builder(Snapshot::open([path]).unwrap()).on_stop(on_stop).pool(pool);
        let handler = RunningHandler::start(folder, builder.own_memory(own_memory()));
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { handler, bytes, innocent: Mutex::default(), _alone: alone }
    }

    fn exists(&self, name: &str) -> bool {
        self.handler.folder.path().join(name).exists()
    }

    /// Starts a guest in a process of its own, and waits until it [is ready](ready).
    fn hostile(&self, body: child::Body<'_>) -> ChildTest {
        let hostile = body.spawn(self.handler.socket());
        until(|| self.exists("ready"));
        hostile
    }

    /// The longest and the total time of many touches of another guest. `None` if one takes [`LONG`] or
    /// all take [`ALL`]. A latency is the subject here, so a clock measures it.
    fn touches_of_an_innocent_guest(&self) -> Option<(Duration, Duration)> {
        let (guest, stream) = connect(&self.handler.socket(), self.bytes);
        self.innocent.lock().unwrap().push((Arc::clone(&guest), stream));
        let (done, touched) = mpsc::channel();
        let began = Instant::now();
        thread::spawn(move || {
            let expected = pattern(3, WRITTEN);
            // Not in order, because readahead would fill them.
            for page in (0..touches()).map(|touched| touched * 89 % 500) {
                let began = Instant::now();
                assert_eq!(guest.read(page * PAGE), expected[page * PAGE]);
                let _ = done.send(began.elapsed());
            }
        });
        let next = |_| touched.recv_timeout(LONG.min(ALL.saturating_sub(began.elapsed()))).ok();
        let each: Option<Vec<_>> = (0..touches()).map(next).collect();
        Some((each?.into_iter().max()?, began.elapsed()))
    }
}

/// The number of touches of an innocent guest.
fn touches() -> usize {
    rounds(400) as usize
}

fn connect(path: &Path, bytes: usize) -> (Arc<Guest>, UnixStream) {
    let guest = Guest::new(&[bytes], false).unwrap();
    let stream = guest.hand_over(path).unwrap();
    (Arc::new(guest), stream)
}

/// Tells the parent that the attack runs.
fn ready(socket: &str) {
    fs::write(Path::new(socket).with_file_name("ready"), "").unwrap();
}

extern "C" fn stay(_: i32) {
    loop {
        pause();
    }
}

fn for_ever() -> ! {
    loop {
        thread::park();
    }
}

/// O_NONBLOCK is a flag of the open file description, which the guest and the handler share. The
/// handler also leaves the memory of the guest at the end.
#[test]
fn a_blocking_userfaultfd_of_a_guest_delays_neither_handler_nor_guests() {
    if lacks_poison(this_test!()) {
        return;
    }
    const BYTES: usize = 600 * PAGE;
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path.as_ref(), BYTES);
        assert_eq!(guest.read(0), pattern(3, 1)[0]);
        guest.make_blocking().unwrap();
        ready(path);
        for_ever();
    });
    let mut attacked = Attacked::start(BYTES);
    let mut hostile = attacked.hostile(body);
    let innocent = attacked.touches_of_an_innocent_guest();
    let stopped = attacked.handler.try_stop();
    hostile.kill();
    assert!(innocent.is_some() && stopped.is_some(), "innocent: {innocent:?}, stopped: {stopped:?}");
}

/// The cost of an event does not depend on its page count, and a worker does not read the events of
/// one guest forever.
#[test]
fn a_discard_loop_of_a_guest_delays_no_other_guest() {
    if lacks_poison(this_test!()) {
        return;
    }
    const BYTES: usize = 16 << 30;
    let body = child::body(this_test!(), |path| {
        // More guests than workers, and more threads than one read returns events.
        let guests: Vec<_> = (0..2).map(|_| connect(path.as_ref(), BYTES)).collect();
        for (guest, _) in guests.iter().flat_map(|guest| [guest; 80]) {
            let guest = Arc::clone(guest);
            thread::spawn(move || {
                loop {
                    guest.balloon(0, BYTES).unwrap();
                }
            });
        }
        ready(path);
        for_ever();
    });
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let mut attacked = Attacked::with(&pool, BYTES, OnStop::Abandon, |_| {});
    let alone = attacked.touches_of_an_innocent_guest().expect("without an attack");
    let mut hostile = attacked.hostile(body);
    let innocent = attacked.touches_of_an_innocent_guest();
    hostile.kill();
    println!("the longest touch, and all: {alone:?} alone, {innocent:?} beside the attack");
    assert!(innocent.is_some(), "{innocent:?}");
    assert!(attacked.handler.try_stop().is_some());
}

/// The handler serves only the announced memory.
#[test]
fn unannounced_memory_of_a_guest_is_left_alone_when_it_moves() {
    if lacks_poison(this_test!()) {
        return;
    }
    const BYTES: usize = 600 * PAGE;
    let body = child::body(this_test!(), |path| {
        let guest = Guest::movable(&[BYTES]).unwrap();
        let _stream = guest.hand_over(path.as_ref()).unwrap();
        let mut more = guest.register_more(40 << 30).unwrap();
        ready(path);
        for _ in 0..10 {
            more = guest.move_more(more).unwrap();
        }
        // Events before a fault are handled before it.
        assert_eq!(guest.read(0), pattern(3, 1)[0]);
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        let kilobytes: usize = tables.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(kilobytes < 8 << 10, "{kilobytes} kB of page tables");
        assert!(guest.fill_more(&more), "the page is poisoned");
    });
    let mut attacked = Attacked::start(BYTES);
    let hostile = attacked.hostile(body);
    let innocent = attacked.touches_of_an_innocent_guest();
    println!("the longest touch, and all: {innocent:?} beside the attack");
    hostile.wait().expect_pass();
    assert!(innocent.is_some() && attacked.handler.try_stop().is_some());
}

/// A worker does not wait for memory that the file system of a guest lacks.
#[test]
fn a_guest_on_a_full_tmpfs_delays_no_other_guest() {
    if lacks_poison(this_test!()) {
        return;
    }
    const BYTES: usize = 1 << 30;
    let body = child::body(this_test!(), |path| {
        let Some(file) = file_on_a_full_tmpfs(Path::new(path).parent().unwrap(), BYTES as u64) else {
            println!("SKIPPED {}: a tmpfs cannot be mounted in a namespace of its own", this_test!());
            fs::write(Path::new(path).with_file_name("skipped"), "").unwrap();
            ready(path);
            for_ever();
        };
        // An unavailable page stops its thread, and not the guest.
        handle_bus_errors(stay);
        let guest = Arc::new(Guest::in_file(file, BYTES).unwrap());
        let _stream = guest.hand_over(path.as_ref()).unwrap();
        // A thread for each page, because a waiting thread touches no other page.
        for page in 0..1000 {
            let guest = Arc::clone(&guest);
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || println!("{}", guest.read((1000 + page * 50) * PAGE)))
                .unwrap();
        }
        ready(path);
        for_ever();
    });
    let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
    let attacked = Attacked::with(&pool, BYTES, OnStop::Abandon, |_| {});
    let alone = attacked.touches_of_an_innocent_guest().expect("without an attack");
    let mut hostile = attacked.hostile(body);
    let innocent = attacked.touches_of_an_innocent_guest();
    hostile.kill();
    let end = hostile.wait();
    if attacked.exists("skipped") {
        return println!("SKIPPED {}: a tmpfs cannot be mounted in a namespace of its own", this_test!());
    }
    println!("{}", end.output());
    println!("the longest touch, and all: {alone:?} alone, {innocent:?} beside the attack");
    assert!(innocent.is_some(), "the innocent guest waits; the other: {}", end.output());
}

/// A file of `bytes` on a full tmpfs, in a mount namespace of this process.
fn file_on_a_full_tmpfs(folder: &Path, bytes: u64) -> Option<fs::File> {
    let (user, group) = (getuid(), getgid());
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).ok()?;
        fs::write("/proc/self/setgroups", "deny").ok()?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1")).ok()?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1")).ok()?;
    }
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).ok()?;
    let here = folder.join("tmpfs");
    fs::create_dir(&here).ok()?;
    mount(Some("tmpfs"), &here, Some("tmpfs"), MsFlags::empty(), Some("size=64k,huge=never")).ok()?;
    let file = fs::File::create_new(here.join("memory")).ok()?;
    file.set_len(bytes).ok()?;
    // Until the file system is full. The guest does not touch the page that was written last.
    while file.write_at(&[1; PAGE], 0).is_ok() && fs::write(here.join("filler"), vec![1; 64 << 10]).is_ok() {}
    fs::File::options().read(true).write(true).open(here.join("memory")).ok()
}

/// The guest dies while a handler that was told to stop fills its memory.
#[test]
fn the_final_fill_of_a_guest_stops_when_the_guest_dies() {
    if lacks_poison(this_test!()) {
        return;
    }
    const BYTES: usize = 256 << 20;
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path.as_ref(), BYTES);
        assert_eq!(guest.read(0), pattern(3, 1)[0]);
        ready(path);
        for_ever();
    });
    let bytes = vec![1; 1 << 20];
    let mut attacked = Attacked::with(&Pool::new().unwrap(), BYTES, OnStop::Finish, |file| {
        (1..256).for_each(|at| file.write_all_at(&bytes, at << 20).unwrap());
    });
    let mut hostile = attacked.hostile(body);
    let statm = format!("/proc/{}/statm", hostile.id());
    let resident =
        || fs::read_to_string(&statm).unwrap().split(' ').nth(1).unwrap().parse::<usize>().unwrap();
    let before = resident();
    attacked.handler.request_shutdown();
    until(|| resident() > before + 100);
    hostile.kill();
    let stopped = attacked.handler.try_stop();
    println!("stopped after {stopped:?}");
    assert!(stopped.is_some_and(|took| took < LONG), "{stopped:?}");
}

/// A subscriber that counts log lines.
#[derive(Clone, Default)]
struct Lines(Arc<AtomicUsize>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.level() <= &tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// An owner cannot fill the disk with log lines, neither by moves of announced nor of other memory.
/// The rate of lines is the subject, so a clock measures it.
#[test]
fn moves_of_guest_memory_are_logged_at_a_limited_rate() {
    if lacks_poison(this_test!()) {
        return;
    }
    const MOVES: usize = 200;
    // One range for each move.
    let mut guest = Guest::movable(&[PAGE; MOVES]).unwrap();
    let mut manual = Manual::new().unwrap();
    let memory = guest.memory().unwrap().owner(Process::open(std::process::id()).unwrap());
    let region = Region::builder().chunk(vec![1; MOVES * PAGE]).build_adopted(memory, &manual).unwrap();
    let (lines, began) = (Lines::default(), Instant::now());
    let mover = thread::spawn(move || {
        let mut more = guest.register_more(PAGE).unwrap();
        for _ in 0..MOVES {
            more = guest.move_more(more).unwrap();
            guest.move_range(0).unwrap();
        }
    });
    tracing::subscriber::with_default(lines.clone(), || {
        serve_until(&mut manual, 64, || mover.is_finished());
    });
    mover.join().unwrap();
    let (logged, seconds) = (lines.0.load(Ordering::Relaxed), began.elapsed().as_secs() as usize);
    assert!((1..=seconds + 2).contains(&logged), "{logged} lines in {seconds} s");
    drop(region);
}
