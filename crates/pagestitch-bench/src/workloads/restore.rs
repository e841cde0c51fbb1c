//! A guest restored from a memory file: another process with four virtual CPUs, which touches a
//! tenth of its memory.

use crate::case::{Case, Options, Sample};
use crate::guest::{GuestMemory, GuestTask, Restored, spawn, wait};
use crate::manual_page::serve_plainly;
use crate::measure::{processor_time, warm};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch::source::{FileSource, Memfd, UnsealedMemfd};
use pagestitch::{AdoptedMemory, AdoptedRegion, Builder, Chunk, FillRate, Pool, Readahead, Region};
use pagestitch_kernel::fd_passing;
use pagestitch_kernel::memfd::SealedMemfd;
use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{env, fs, process, thread};

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let bytes = options.size(2 << 30);
    warm(2 * bytes);
    let snapshot = Arc::new(Snapshot::new(bytes));
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for (threads, name) in options.thread_points(THREADS) {
        for point in [FIRST, ALL, EACH] {
            let others: &[&str] = match point {
                EACH => &[PLAIN],
                ALL => &[EAGER, PLAIN, MAPPING],
                _ => &[EAGER, PLAIN],
            };
            for (system, restore) in handlers(&pool) {
                // Each touch of an eager copy finds its page present, so it has no latency to compare.
                if (system, point) == (EAGER, EACH) {
                    continue;
                }
                // The pages of a new mapping cost time up to the last touch.
                if system == MAPPING && point != ALL {
                    continue;
                }
                let snapshot = Arc::clone(&snapshot);
                let run = move |seed| sample(&snapshot, point, Touching { threads, seed }, &restore);
                let name = format!("{name} {point}");
                cases.push(Case::new(system, run).at(name.trim_start()).by(threads).against(others));
            }
        }
    }
    cases
}

/// The ways to restore a guest, by their names.
fn handlers(pool: &Pool) -> [(&'static str, Box<Restore>); 8] {
    let plain = |snapshot: &Snapshot, guest| {
        snapshot.restore(guest, |fd, start| serve(Arc::clone(&snapshot.memfd), fd, start))
    };
    let mapping = |snapshot: &Snapshot, guest| {
        snapshot.restore(guest, |fd, start| serve(Arc::new(snapshot.mapped_anew()), fd, start))
    };
    let eager =
        |snapshot: &Snapshot, guest| wait(spawn(&snapshot.task(GuestMemory::Eager(snapshot.path()), guest)));
    [
        (OURS, on_touch(pool, Readahead::Adaptive)),
        (BARE, on_touch(pool, Readahead::None)),
        (SEALED, from_memfd(pool)),
        (FILLING, in_background(pool)),
        (REPLAY, replayed(pool)),
        (PLAIN, Box::new(plain)),
        (MAPPING, Box::new(mapping)),
        (EAGER, Box::new(eager)),
    ]
}

fn on_touch(pool: &Pool, readahead: Readahead) -> Box<Restore> {
    let pool = pool.clone();
    Box::new(move |snapshot, guest| {
        snapshot.restore(guest, |fd, start| {
            let region = snapshot.region(fd, start, &pool, |builder| builder.readahead(readahead));
            move || drop(region)
        })
    })
}

/// As the plain handler, this copies from a mapping, because a sealed memfd cannot be truncated. A
/// file is read, because the rest of a page in which it ends would be zeros in a mapping.
fn from_memfd(pool: &Pool) -> Box<Restore> {
    let pool = pool.clone();
    Box::new(move |snapshot, guest| {
        snapshot.restore(guest, |fd, start| {
            let memory = snapshot.memory(fd, start);
            let builder = Region::builder().chunk(Chunk::source(Arc::clone(&snapshot.mapped)));
            let region = builder.build_adopted(memory, &pool).expect("a region");
            move || drop(region)
        })
    })
}

fn in_background(pool: &Pool) -> Box<Restore> {
    let pool = pool.clone();
    Box::new(move |snapshot, guest| {
        snapshot.restore(guest, |fd, start| {
            let region = snapshot.region(fd, start, &pool, |builder| builder);
            let fill = region.fill_in_background(FillRate::Unlimited).expect("a pool");
            move || drop((fill, region))
        })
    })
}

fn replayed(pool: &Pool) -> Box<Restore> {
    let pool = pool.clone();
    Box::new(move |snapshot, guest| {
        let recording = RefCell::new(None);
        snapshot.restore(guest, |fd, start| {
            let region = snapshot.region(fd, start, &pool, Builder::record);
            let recording = &recording;
            move || *recording.borrow_mut() = region.recording()
        });
        let recording = recording.take().expect("it was recorded");
        snapshot.restore(guest, |fd, start| {
            let region = snapshot.region(fd, start, &pool, |builder| builder.replay(&recording));
            move || drop(region)
        })
    })
}

fn sample(snapshot: &Snapshot, point: &str, guest: Touching, restore: &Restore) -> Sample {
    let before = processor_time();
    let Restored { first, all, latencies } = restore(snapshot, guest);
    let processor = processor_time() - before;
    // The server goes on after the first touch, so its processor time would be arbitrary here.
    let (time, pages, processor) = match point {
        FIRST => (first, 1, Duration::ZERO),
        _ => (all, snapshot.touches() as u64, processor),
    };
    let latencies = (point == EACH).then_some(latencies);
    Sample { time, processor, pages, bytes: snapshot.bytes() as u64, latencies, ..Sample::default() }
}

/// The touches of a guest: the number of its threads, and the seed that decides their order.
#[derive(Debug, Clone, Copy)]
struct Touching {
    threads: usize,
    seed: u64,
}

/// Restores a guest.
type Restore = dyn Fn(&Snapshot, Touching) -> Restored;

/// A memory file, all of it in the page cache.
struct Snapshot {
    memfd: Arc<SealedMemfd>,
    /// The same memfd as a source, which keeps its mapping from guest to guest.
    mapped: Arc<Memfd>,
}

impl Snapshot {
    fn new(bytes: usize) -> Self {
        let memfd = UnsealedMemfd::create("snapshot", bytes as u64).expect("a memfd");
        let block = vec![7; 1 << 20];
        for start in (0..bytes).step_by(block.len()) {
            memfd
                .file()
                .write_all_at(&block[..block.len().min(bytes - start)], start as u64)
                .expect("memory");
        }
        let memfd = memfd.seal().expect("no other holder of the memfd");
        let mapped = Arc::new(Memfd::from(mapped_anew(&memfd)));
        Self { memfd: Arc::new(memfd), mapped }
    }

    fn mapped_anew(&self) -> SealedMemfd {
        mapped_anew(&self.memfd)
    }

    fn bytes(&self) -> usize {
        self.memfd.as_ref().as_ref().len()
    }

    fn touches(&self) -> usize {
        self.bytes() / 4096 / 10
    }

    /// Its path, valid in other processes too.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", process::id(), self.memfd.as_fd().as_raw_fd()))
    }

    fn memory(&self, fd: OwnedFd, start: usize) -> AdoptedMemory {
        AdoptedMemory::new(fd).expect("a userfaultfd").range(start, self.bytes())
    }

    /// A region that fills a guest's memory, with the options of `configure`.
    fn region(
        &self,
        fd: OwnedFd,
        start: usize,
        pool: &Pool,
        configure: impl FnOnce(Builder) -> Builder,
    ) -> AdoptedRegion {
        let memory = self.memory(fd, start);
        let file = FileSource::open(self.path()).expect("the snapshot");
        configure(Region::builder().chunk(file)).build_adopted(memory, pool).expect("a region")
    }

    fn task(&self, memory: GuestMemory, Touching { threads, seed }: Touching) -> GuestTask {
        GuestTask { memory, bytes: self.bytes(), touches: self.touches(), threads, seed }
    }

    /// Starts a guest, serves it, and ends the service after the guest has ended.
    fn restore<E: FnOnce()>(&self, touching: Touching, serve: impl FnOnce(OwnedFd, usize) -> E) -> Restored {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("pagestitch-bench-{}-{number}", process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let guest = spawn(&self.task(GuestMemory::Handler(path.clone()), touching));
        let (stream, _) = listener.accept().expect("a guest");
        let _ = fs::remove_file(&path);
        let (fd, start) = handshake(&stream);
        let end = serve(fd, start);
        let restored = wait(guest);
        end();
        restored
    }
}

/// Serves in the plain way: one thread, the file mapped, one page at a time.
fn serve(memfd: Arc<SealedMemfd>, fd: OwnedFd, start: usize) -> impl FnOnce() {
    let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd"));
    let stopped = Arc::clone(&stop);
    let thread = thread::spawn(move || {
        serve_plainly(fd, &stopped, start, &|offset| &memfd.as_ref().as_ref()[offset..offset + 4096]);
    });
    move || {
        stop.write(1).expect("an eventfd takes a 1");
        thread.join().expect("a handler");
    }
}

/// The memfd with a new mapping, whose page tables are empty.
fn mapped_anew(memfd: &SealedMemfd) -> SealedMemfd {
    let copy = memfd.as_fd().try_clone_to_owned().expect("a descriptor");
    SealedMemfd::try_from(copy).expect("a sealed memfd")
}

fn handshake(stream: &UnixStream) -> (OwnedFd, usize) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut message = [0; 1024];
    let (bytes, mut fds) = fd_passing::receive(stream, &mut message).expect("a handshake");
    let told: serde_json::Value = serde_json::from_slice(&message[..bytes]).expect("JSON");
    let start = told[0]["base_host_virt_addr"].as_u64().expect("an address") as usize;
    (fds.pop().expect("a userfaultfd"), start)
}

const THREADS: usize = 4;
const OURS: &str = "pool, defaults";
const REPLAY: &str = "pool, replaying";
const FILLING: &str = "pool, in background";
const BARE: &str = "pool, no readahead";
const SEALED: &str = "pool, from a sealed memfd";
/// It has the mapping of the guests before, so most pages of the file are mapped.
pub(crate) const PLAIN: &str = "plain handler";
/// A handler that is started for its guest, as that of Firecracker's documentation.
pub(crate) const MAPPING: &str = "plain handler, new mapping";
const EAGER: &str = "eager copy";
const FIRST: &str = "to the first touch";
const ALL: &str = "to the last touch";
const EACH: &str = "each touch";
