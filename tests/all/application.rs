//! What an application does to a region's addresses and threads past every borrow, and what becomes of it: bytes or a signal.

use crate::{let_go, pattern, touch, until};
use nix::libc;
use nix::sys::mman::munmap;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pagestitch::{Chunk, Pool, Readahead, Region};
use pagestitch_kernel::Features;
use pagestitch_kernel::Support;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr::{NonNull, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::{fs, thread};

const PAGE: usize = 4096;
const SIGSEGV: i32 = 11;
const SIGKILL: i32 = 9;
const SIGABRT: i32 = 6;

fn region(bytes: &[u8], pool: &Pool) -> Region {
    Region::builder().chunk(bytes.to_vec()).readahead(Readahead::None).build(pool).unwrap()
}

/// Moves pages to wherever the kernel likes; says where that is.
#[expect(unsafe_code, reason = "mremap by an application is what is tested")]
fn moved(start: usize, bytes: usize) -> usize {
    // SAFETY: pages of a region, which nobody has a slice of any more.
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

/// Addresses that nothing is at.
#[expect(unsafe_code, reason = "as above")]
fn free(bytes: usize) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, which mremap replaces.
    unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) }
}

#[expect(unsafe_code, reason = "munmap by an application is what is tested")]
fn unmapped(start: usize, bytes: usize) {
    // SAFETY: pages of a region, which nobody has a slice of any more.
    unsafe { munmap(NonNull::new(with_exposed_provenance_mut(start)).unwrap(), bytes) }.unwrap();
}

/// Whether a thread waits, in whatever way.
fn waits(thread: &Path) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(thread).join("stat"));
    stat.is_ok_and(|stat| stat.contains(") S ") || stat.contains(") D "))
}

/// Whether there are marks for bad pages. Without, a region that is moved ends the process: what was not filled would be zeros.
fn has_marks() -> bool {
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
        assert_eq!(touch(to + PAGE), bytes[4 * PAGE], "it was filled");
        assert_eq!(
            (touch(start), touch(start + 9 * PAGE)),
            (bytes[0], bytes[9 * PAGE]),
            "the rest is served as before"
        );
        println!("so far so good");
        println!("read a byte: {}", touch(to));
    });
    assert!(!end.output().contains("read a byte"), "{}", end.output());
    if !has_marks() {
        return assert_eq!(end.signal(), Some(SIGABRT), "{}", end.output());
    }
    assert_eq!(end.signal(), Some(crate::SIGBUS), "{}", end.output());
    assert!(
        end.output().contains("so far so good") && !end.output().contains("read a byte"),
        "{}",
        end.output()
    );
}

#[test]
fn a_region_with_unmapped_pages_is_dropped_and_no_thread_hangs() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(2, 10 * PAGE);
        let region = region(&bytes, &Pool::new().unwrap());
        let start = region.as_ptr().expose_provenance().get();
        unmapped(start + 2 * PAGE, PAGE);
        if has_marks() {
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

/// The only worker is held by another region; somebody waits in pages that are unmapped then, and moved.
#[test]
fn a_thread_that_waits_in_an_unmapped_or_moved_page_gets_a_signal() {
    for moves in [false, true] {
        let end = child::run(this_test!(), || {
            let pool = Pool::builder().workers(1).max_workers(1).start().unwrap();
            let slow = Arc::new(Scripted::new(10).holding(0..1));
            let other = Region::builder().chunk(Chunk::source(Arc::clone(&slow))).build(&pool).unwrap();
            let region = region(&pattern(3, 10 * PAGE), &pool);
            let start = region.as_ptr().expose_provenance().get();
            thread::scope(|scope| {
                scope.spawn(|| other.as_slice()[0]);
                slow.wait_until_held(1);
                let (send, waiter) = mpsc::channel();
                scope.spawn(move || {
                    send.send(fs::read_link("/proc/thread-self").unwrap()).unwrap();
                    println!("read a byte: {}", touch(start + 5 * PAGE));
                });
                let waiter = waiter.recv().unwrap();
                until(|| waits(&waiter));
                if moves {
                    // Who moves waits until somebody has read of it.
                    let (send, mover) = mpsc::channel();
                    scope.spawn(move || {
                        send.send(fs::read_link("/proc/thread-self").unwrap()).unwrap();
                        moved(start + 4 * PAGE, 3 * PAGE)
                    });
                    let mover = mover.recv().unwrap();
                    until(|| waits(&mover));
                } else {
                    unmapped(start + 4 * PAGE, 3 * PAGE);
                }
                slow.release();
                // One that was unmapped is found out when its fault is served.
            });
            drop(region);
        });
        // On kernels without marks, what cannot be had is covered by what is SIGBUS.
        let expected: &[_] = if has_marks() { &[SIGSEGV] } else { &[SIGSEGV, crate::SIGBUS, SIGABRT] };
        assert!(expected.contains(&end.signal().unwrap_or(0)), "{}", end.output());
        assert!(!end.output().contains("read a byte"), "{}", end.output());
    }
}

/// In every state that a fault can be in.
#[test]
fn a_signal_handler_discards_pages_during_faults() {
    static ADDRESS: AtomicU64 = AtomicU64::new(0);
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32) {
        let_go(ADDRESS.load(Ordering::SeqCst) as usize, 20 * PAGE);
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    let end = child::run(this_test!(), || {
        let bytes = pattern(4, 100 * PAGE);
        let region = region(&bytes, &Pool::new().unwrap());
        ADDRESS.store(region.as_ptr().expose_provenance().get() as u64, Ordering::SeqCst);
        on_user_signal(handler);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
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

#[expect(unsafe_code, reason = "an application's signal handler is part of what is tested")]
fn on_user_signal(handler: extern "C" fn(i32)) {
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handlers of these tests use atomics and system calls.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
}

/// A thread that waits for a source that hangs.
fn waiting(then: impl FnOnce(&Arc<Scripted>)) {
    let source = Arc::new(Scripted::new(10).holding(0..1));
    let region =
        Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| region.as_slice()[0]);
        source.wait_until_held(1);
        then(&source);
    });
}

#[test]
fn a_process_with_a_waiting_thread_can_exec() {
    let end = child::run(this_test!(), || {
        // There is no other program in a guest.
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
fn a_waiting_thread_handles_signals_and_waits_on() {
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    let end = child::run(this_test!(), || {
        on_user_signal(handler);
        let source = Arc::new(Scripted::new(10).holding(0..1));
        let region =
            Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&Pool::new().unwrap()).unwrap();
        thread::scope(|scope| {
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
