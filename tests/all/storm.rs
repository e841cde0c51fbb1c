//! A storm of signals, in which the interrupted thread still comes forward.

use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use pagestitch_testkit::scope::scope;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// How often a handler of these signals has ended. Each handler says so itself, by [`ended`].
static ENDED: AtomicUsize = AtomicUsize::new(0);

/// Says that a handler has ended.
pub(crate) fn ended() {
    ENDED.fetch_add(1, Ordering::SeqCst);
}

/// Sends SIGUSR1 to the calling thread all the while that `body` runs in it.
pub(crate) fn in_a_storm(body: impl FnOnce()) {
    let (me, done) = (pthread_self(), AtomicBool::new(false));
    scope(|scope| {
        scope.spawn(|| send(me, &done));
        body();
        done.store(true, Ordering::SeqCst);
    });
}

/// Sends signals one by one, because a thread whose next signal waits at the end of each handler executes no
/// instruction of its own. The pauses differ, so that the signals find the thread anywhere.
fn send(thread: Pthread, done: &AtomicBool) {
    for sent in 0.. {
        let ended = ENDED.load(Ordering::SeqCst);
        if done.load(Ordering::SeqCst) || pthread_kill(thread, Signal::SIGUSR1).is_err() {
            return;
        }
        while ENDED.load(Ordering::SeqCst) == ended && !done.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        (0..sent % LONGEST_PAUSE).for_each(|_| spin_loop());
    }
}

/// Turns of a loop, some 10 us.
const LONGEST_PAUSE: usize = 1000;
