//! The event count, notified by a signal handler.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use pagestitch_kernel::sync::EventCount;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::Duration;

static EVENTS: LazyLock<EventCount> = LazyLock::new(EventCount::new);
static OPEN: AtomicBool = AtomicBool::new(false);

extern "C" fn open(_signal: i32) {
    OPEN.store(true, Ordering::SeqCst);
    EVENTS.notify_all();
}

/// A signal handler that fills a page notifies waiters. It may have interrupted a thread at any
/// step of its wait.
#[test]
#[expect(unsafe_code, reason = "a signal handler is part of what is tested")]
fn a_signal_handler_notifies_the_waiting_thread_that_it_interrupts() {
    let action = SigAction::new(SigHandler::Handler(open), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler changes atomics and makes a system call.
    unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
    LazyLock::force(&EVENTS);
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        let looks = AtomicUsize::new(0);
        EVENTS.wait_while(|| {
            if looks.fetch_add(1, Ordering::SeqCst) == 0 {
                raise(Signal::SIGUSR2).unwrap();
                return true;
            }
            !OPEN.load(Ordering::SeqCst)
        });
        done.send(()).unwrap();
    });
    assert_eq!(
        is_done.recv_timeout(Duration::from_secs(20)),
        Ok(()),
        "the thread missed its own notification"
    );
}
