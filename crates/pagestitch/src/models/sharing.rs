//! A userfaultfd that regions share: regions are built and dropped while workers read its events. The
//! steps are those of `serve/shared_uffds.rs`, `api/any.rs` and `Mapping::close`.
//!
//! The kernel here has two places. A region at the first one is dropped, and the next region takes its
//! address. A region at the second one stays.

use crate::serve::weak_handle::RegionHandle;
use crate::space::Readers;
use pagestitch_kernel::gate::Gate;
use pagestitch_kernel::sync::atomic::{AtomicUsize, Ordering};
use pagestitch_kernel::sync::model::explore;
use pagestitch_kernel::sync::{Condvar, Mutex, MutexGuard, RwLock};
use shuttle::thread;
use std::sync::Arc;

/// A region of one page: its number is that of its bytes.
struct Region {
    number: usize,
    place: usize,
    gate: Arc<Gate>,
    /// Its faults that workers have read and not served.
    in_flight: AtomicUsize,
}

type Handle = Arc<RegionHandle<Region>>;

#[derive(Default)]
struct Place {
    /// The region whose range is mapped there.
    region: Option<usize>,
    is_fenced: bool,
    is_present: bool,
}

#[derive(Default)]
struct Waiter {
    number: usize,
    place: usize,
    is_unread: bool,
}

#[derive(Default)]
struct Memory {
    places: [Place; 2],
    waiting: Vec<Waiter>,
    /// The waiters that a fill has woken, with their bytes.
    filled: Vec<(usize, usize)>,
    next: usize,
    is_stopped: bool,
}

struct Shared {
    memory: Mutex<Memory>,
    changed: Condvar,
    readers: Readers,
    /// The regions at each place. `Err` while one is built.
    table: RwLock<[Option<Result<Handle, ()>>; 2]>,
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap()
    }

    /// Touches a region's page; `None` is a signal.
    fn touch(&self, region: usize, place: usize) -> Option<usize> {
        let mut memory = self.memory();
        if memory.places[place].region != Some(region) {
            return None;
        }
        loop {
            let found = &memory.places[place];
            let number = found.region.filter(|_| !found.is_fenced)?;
            if found.is_present {
                return Some(number);
            }
            memory.next += 1;
            let number = memory.next;
            memory.waiting.push(Waiter { number, place, is_unread: true });
            self.changed.notify_all();
            while memory.waiting.iter().any(|waiter| waiter.number == number) {
                memory = self.changed.wait(memory).unwrap();
            }
            // The thread that a drop has woken runs at any later time.
            if let Some((_, bytes)) = memory.filled.iter().find(|(filled, _)| *filled == number) {
                return Some(*bytes);
            }
        }
    }

    /// UFFDIO_COPY.
    fn copy(&self, region: &Region) {
        let memory = &mut *self.memory();
        memory.places[region.place].is_present = true;
        let woken = memory.waiting.iter().filter(|waiter| waiter.place == region.place);
        memory.filled.extend(woken.map(|waiter| (waiter.number, region.number)));
        memory.waiting.retain(|waiter| waiter.place != region.place);
        self.changed.notify_all();
    }

    fn wake(&self, place: usize) {
        self.memory().waiting.retain(|waiter| waiter.place != place);
        self.changed.notify_all();
    }

    fn has_unread(&self) -> bool {
        self.memory().waiting.iter().any(|waiter| waiter.is_unread)
    }

    fn work(&self) {
        let mut queued = Vec::new();
        while self.wait() {
            self.read(&mut queued);
            for handle in queued.drain(..) {
                let Some(region) = handle.enter() else { continue };
                self.copy(&region);
                region.in_flight.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn wait(&self) -> bool {
        let mut memory = self.memory();
        while !memory.waiting.iter().any(|waiter| waiter.is_unread) {
            if memory.is_stopped {
                return false;
            }
            memory = self.changed.wait(memory).unwrap();
        }
        true
    }

    /// Reads the events, and tells the region of each fault.
    fn read(&self, queued: &mut Vec<Handle>) {
        let _reading = self.readers.reading();
        let mut places = Vec::new();
        for waiter in self.memory().waiting.iter_mut().filter(|waiter| waiter.is_unread) {
            waiter.is_unread = false;
            places.push(waiter.place);
        }
        let table = self.table.read().unwrap();
        for place in places {
            match &table[place] {
                Some(Ok(handle)) => match handle.enter() {
                    Some(region) => {
                        region.in_flight.fetch_add(1, Ordering::SeqCst);
                        queued.push(Arc::clone(handle));
                    }
                    None => handle.note_stray(),
                },
                Some(Err(())) | None => self.wake(place),
            }
        }
    }

    fn build(&self, number: usize, place: usize) -> (Arc<Region>, Handle) {
        self.table.write().unwrap()[place] = Some(Err(()));
        self.memory().places[place] = Place { region: Some(number), ..Place::default() };
        let region = Arc::new(Region { number, place, gate: Arc::default(), in_flight: AtomicUsize::new(0) });
        let handle = Arc::new(RegionHandle::new(&region.gate, &region));
        self.table.write().unwrap()[place] = Some(Ok(Arc::clone(&handle)));
        (region, handle)
    }

    /// Drops a region. True if its addresses stay closed for a while.
    fn drop_region(&self, region: &Region, handle: &Handle) -> bool {
        let are_under_way = || self.readers.have_faults_under_way(|| self.has_unread());
        let mut lingers = are_under_way() || region.in_flight.load(Ordering::SeqCst) > 0;
        region.gate.close();
        lingers |= region.in_flight.swap(0, Ordering::SeqCst) > 0;
        self.memory().places[region.place].is_fenced = true;
        lingers |= are_under_way() || handle.has_stray();
        self.wake(region.place);
        self.table.write().unwrap()[region.place] = None;
        if !lingers {
            self.memory().places[region.place] = Place::default();
        }
        lingers
    }
}

/// `crowd`: with a second worker, a second thread in the dropped region, and one in the other region.
fn run(crowd: bool) {
    let shared = Arc::new(Shared {
        memory: Mutex::default(),
        changed: Condvar::new(),
        readers: Readers::default(),
        table: RwLock::default(),
    });
    let spawn = |body: fn(&Shared)| {
        let shared = Arc::clone(&shared);
        thread::spawn(move || body(&shared))
    };
    let (dropped, _standing) = (shared.build(FIRST, 0), shared.build(STANDING, 1));
    let workers: Vec<_> = (0..if crowd { 2 } else { 1 }).map(|_| spawn(Shared::work)).collect();
    let touches = |shared: &Shared| assert!(shared.touch(FIRST, 0).is_none_or(|bytes| bytes == FIRST));
    let mut touchers = vec![spawn(touches)];
    if crowd {
        touchers.push(spawn(touches));
        touchers.push(spawn(|shared| assert_eq!(shared.touch(STANDING, 1), Some(STANDING))));
    }
    let lingers = shared.drop_region(&dropped.0, &dropped.1);
    // Alive until the threads have their bytes.
    let _next = (!lingers).then(|| {
        let next = shared.build(NEXT, 0);
        assert_eq!(shared.touch(NEXT, 0), Some(NEXT));
        next
    });
    touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
    shared.memory().is_stopped = true;
    shared.changed.notify_all();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

const FIRST: usize = 1;
const STANDING: usize = 2;
const NEXT: usize = 3;

#[test]
fn a_thread_that_waits_in_a_dropped_region_gets_its_bytes_or_a_signal() {
    explore("regions that share a userfaultfd", || run(false));
}

#[test]
fn threads_that_wait_in_regions_get_their_bytes_or_a_signal() {
    explore("regions that share a userfaultfd, and more threads", || run(true));
}
