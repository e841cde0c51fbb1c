//! Calls of the application on addresses and threads of a region, past every borrow: the outcome is
//! bytes or a signal.

use crate::{
    PAGE, SIGABRT, SIGBUS, SIGKILL, SIGSEGV, discard, handle_user_signal, pattern, spawn_asleep, touch, until,
};
use io_uring::{IoUring, opcode, types};
use nix::libc;
use nix::sys::mman::munmap;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use pagestitch::{Chunk, Pool, Readahead, Region};
use pagestitch_kernel::Features;
use pagestitch_kernel::Support;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::{NonNull, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

fn region(bytes: &[u8], pool: &Pool) -> Region {
    Region::builder().chunk(bytes.to_vec()).keep_sources().readahead(Readahead::None).build(pool).unwrap()
}

/// Maps shared memory at a second address, which the kernel chooses.
#[expect(unsafe_code, reason = "mremap(2) by the application is part of the test")]
pub(crate) fn duplicate_of(start: usize, bytes: usize) -> usize {
    let start = with_exposed_provenance_mut(start);
    // SAFETY: another mapping of shared pages, at an address that the kernel chooses.
    let to = unsafe { libc::mremap(start, 0, bytes, libc::MREMAP_MAYMOVE) };
    assert_ne!(to, libc::MAP_FAILED);
    to.expose_provenance()
}

/// Moves pages to free addresses and returns them.
#[expect(unsafe_code, reason = "mremap(2) by the application is part of the test")]
pub(crate) fn moved(start: usize, bytes: usize) -> usize {
    // SAFETY: pages of a region, of which no slice is used any more.
    let to = unsafe {
        libc::mremap(
            with_exposed_provenance_mut(start),
            bytes,
            bytes,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            free(bytes),
        )
    };
    assert_ne!(to, libc::MAP_FAILED);
    to.expose_provenance()
}

/// Memory that an io_uring has pinned, so that files are read into its frames and cause no faults.
pub(crate) struct FixedBuffer {
    ring: IoUring,
    start: usize,
    bytes: usize,
}

impl FixedBuffer {
    /// Pins pages. An error where there is no io_uring, where it may not pin so many pages, and for a page that is
    /// absent or write-protected and whose region serves no system calls (`EFAULT`).
    #[expect(unsafe_code, reason = "the kernel changes registered memory at any time")]
    pub(crate) fn pin(start: usize, bytes: usize) -> io::Result<Self> {
        let ring = IoUring::new(4)?;
        let buffer = libc::iovec { iov_base: with_exposed_provenance_mut(start), iov_len: bytes };
        // SAFETY: the pages outlive the ring or keep their frames until it ends, and no reference to the bytes that
        // `read` changes exists.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        Ok(Self { ring, start, bytes })
    }

    /// Has the kernel read bytes of a file to a part of the pinned memory.
    #[expect(unsafe_code, reason = "as above")]
    pub(crate) fn read(&mut self, file: &File, offset: u64, into: Range<usize>) -> io::Result<usize> {
        assert!(into.end <= self.bytes, "inside");
        let to = with_exposed_provenance_mut(self.start + into.start);
        let read = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), to, into.len() as u32, 0);
        // SAFETY: the file and the pinned memory live until the read has ended, for which this call waits.
        unsafe { self.ring.submission().push(&read.offset(offset).build()) }.expect("room for a read");
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("no read: {error}"),
                Ok(_) => {}
            }
            if let Some(answer) = self.ring.completion().next() {
                return usize::try_from(answer.result())
                    .map_err(|_| io::Error::from_raw_os_error(-answer.result()));
            }
        }
    }

    /// Ends the pin before it returns. A drop ends it some time later.
    pub(crate) fn unpin(self) {
        self.ring.submitter().unregister_buffers().unwrap();
    }
}

/// Reserves free addresses.
#[expect(unsafe_code, reason = "as above")]
pub(crate) fn free(bytes: usize) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, which mremap replaces.
    unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) }
}

#[expect(unsafe_code, reason = "munmap(2) by the application is part of the test")]
fn unmapped(start: usize, bytes: usize) {
    // SAFETY: pages of a region, of which no slice is used any more.
    unsafe { munmap(NonNull::new(with_exposed_provenance_mut(start)).unwrap(), bytes) }.unwrap();
}

/// True if the kernel has poison markers. Without them the process aborts when a region is moved,
/// because its unfilled pages would be zeros.
fn has_poison() -> bool {
    Support::current().has(Features::POISON)
}

#[test]
fn mremap_moves_filled_pages_and_makes_unfilled_pages_a_signal() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(1, 10 * PAGE);
        let region = region(&bytes, &Pool::new().unwrap());
        let start = region.as_ptr().expose_provenance().get();
        assert_eq!(touch(start + 4 * PAGE), bytes[4 * PAGE]);
        let to = moved(start + 3 * PAGE, 4 * PAGE);
        assert_eq!(touch(to + PAGE), bytes[4 * PAGE], "a filled page");
        assert_eq!(
            (touch(start), touch(start + 9 * PAGE)),
            (bytes[0], bytes[9 * PAGE]),
            "the rest is served as before"
        );
        println!("so far so good");
        println!("read a byte: {}", touch(to));
    });
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    if !has_poison() {
        return assert_eq!(end.signal(), Some(SIGABRT), "{}", end.output());
    }
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(
        end.output().contains("so far so good") && !end.output().contains("read a byte"),
        "{}",
        end.output()
    );
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "memory of the sanitizer may lie where the region was")]
fn a_region_with_unmapped_pages_is_dropped_and_no_thread_hangs() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(2, 10 * PAGE);
        let region = region(&bytes, &Pool::new().unwrap());
        let start = region.as_ptr().expose_provenance().get();
        unmapped(start + 2 * PAGE, PAGE);
        if has_poison() {
            moved(start + 5 * PAGE, PAGE);
        }
        assert_eq!(touch(start + 8 * PAGE), bytes[8 * PAGE]);
        drop(region);
        println!("dropped");
        println!("read a byte: {}", touch(start));
    });
    assert_eq!(end.signal(), Some(SIGSEGV), "{}", end.output());
    assert!(end.output().contains("dropped") && !end.output().contains("read a byte"), "{}", end.output());
}

/// The only worker is held by another region while a thread waits in pages that are then unmapped
/// or moved.
#[test]
fn a_thread_that_waits_in_an_unmapped_or_moved_page_gets_a_signal() {
    let body = child::body(this_test!(), |variant| {
        let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
        let slow = Arc::new(Scripted::new(10).holding(0..1));
        let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
        let region = region(&pattern(3, 10 * PAGE), &pool);
        let start = region.as_ptr().expose_provenance().get();
        scope(|scope| {
            scope.spawn(|| other.as_slice()[0]);
            slow.wait_until_held(1);
            spawn_asleep(scope, move || println!("read a byte: {}", touch(start + 5 * PAGE)));
            match variant {
                // The move waits until a worker has read its event.
                "moved" => spawn_asleep(scope, move || moved(start + 4 * PAGE, 3 * PAGE)),
                _ => unmapped(start + 4 * PAGE, 3 * PAGE),
            }
            slow.release();
            // The worker finds the unmapped page when it serves the fault.
        });
        drop(region);
    });
    for variant in ["unmapped", "moved"] {
        let end = body.spawn(variant).wait();
        // Without poison markers, an unavailable page is covered by a mapping that is SIGBUS.
        let expected: &[_] = if has_poison() { &[SIGSEGV] } else { &[SIGSEGV, SIGBUS, SIGABRT] };
        assert!(expected.contains(&end.signal().unwrap_or(0)), "{variant}: {}", end.output());
        assert!(!end.output().contains("read a byte"), "{variant}: {}", end.output());
    }
}

/// The handler meets faults in each of their states.
#[test]
fn a_signal_handler_discards_pages_during_faults() {
    static ADDRESS: AtomicU64 = AtomicU64::new(0);
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32) {
        discard(ADDRESS.load(Ordering::SeqCst) as usize, 20 * PAGE);
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    let end = child::run(this_test!(), || {
        let bytes = pattern(4, 100 * PAGE);
        let region = region(&bytes, &Pool::new().unwrap());
        ADDRESS.store(region.as_ptr().expose_provenance().get() as u64, Ordering::SeqCst);
        handle_user_signal(handler);
        let done = AtomicBool::new(false);
        scope(|scope| {
            let (send, threads) = mpsc::channel::<Pthread>();
            for _ in 0..2 {
                let (send, region, bytes, done) = (send.clone(), &region, &bytes, &done);
                scope.spawn(move || {
                    send.send(pthread_self()).unwrap();
                    while !done.load(Ordering::SeqCst) {
                        assert!(region.as_slice() == *bytes);
                    }
                });
            }
            let threads = [threads.recv().unwrap(), threads.recv().unwrap()];
            for _ in 0..300 {
                threads.iter().for_each(|&thread| pthread_kill(thread, Signal::SIGUSR1).unwrap());
                thread::yield_now();
            }
            done.store(true, Ordering::SeqCst);
        });
        assert!(HANDLED.load(Ordering::SeqCst) > 0);
    });
    end.expect_pass();
}

/// Runs `then` while a thread waits for a source that hangs.
fn waiting(then: impl FnOnce(&Arc<Scripted>)) {
    let source = Arc::new(Scripted::new(10).holding(0..1));
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
    scope(|scope| {
        scope.spawn(|| region.as_slice()[0]);
        source.wait_until_held(1);
        then(&source);
    });
}

#[test]
fn a_process_with_a_waiting_thread_can_exec() {
    let end = child::run(this_test!(), || {
        // The test program itself, because a guest has no other program.
        waiting(|_| panic!("not executed: {}", Command::new("/proc/self/exe").arg("--help").exec()));
    });
    end.expect_pass();
}

#[test]
fn a_process_with_a_waiting_thread_can_be_killed() {
    let end = child::run(this_test!(), || {
        waiting(|_| nix::sys::signal::kill(nix::unistd::Pid::this(), Signal::SIGKILL).unwrap());
    });
    assert_eq!(end.signal(), Some(SIGKILL));
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "a signal is delivered when its thread no longer waits")]
fn a_waiting_thread_handles_signals_and_waits_on() {
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    let end = child::run(this_test!(), || {
        handle_user_signal(handler);
        let source = Arc::new(Scripted::new(10).holding(0..1));
        let region =
            Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
        scope(|scope| {
            let (send, thread) = mpsc::channel();
            let region = &region;
            let reader = scope.spawn(move || {
                send.send(pthread_self()).unwrap();
                region.as_slice()[0]
            });
            let thread: Pthread = thread.recv().unwrap();
            source.wait_until_held(1);
            for handled in 1..5 {
                pthread_kill(thread, Signal::SIGUSR1).unwrap();
                until(|| HANDLED.load(Ordering::SeqCst) == handled);
            }
            source.release();
            assert_eq!(reader.join().unwrap(), byte_at(0));
        });
    });
    end.expect_pass();
}
