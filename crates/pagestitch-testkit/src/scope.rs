//! Scoped threads whose test fails instead of hanging.

use std::any::Any;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process;
use std::sync::mpsc;
use std::thread::{self, Scope};
use std::time::Duration;

/// Runs `body` as [`std::thread::scope`] does, and ends the process if `body` panics while a thread of
/// the scope hangs.
///
/// A scope joins its threads before it passes a panic on. A thread that waits for a page which only
/// the rest of the test would have filled never ends, so that the test hangs and its message is lost.
/// Here the message goes to standard error after five seconds, and the process aborts.
///
/// ```
/// use pagestitch_testkit::scope::scope;
///
/// assert_eq!(scope(|scope| scope.spawn(|| 7).join().unwrap()), 7);
/// ```
///
/// # Panics
///
/// If `body` panics, or a thread that it has not joined.
pub fn scope<'env, F, T>(body: F) -> T
where
    F: for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> T,
{
    // Dropped after the scope, which tells the thread of `abort_unless` that all threads have ended.
    let (_ends_last, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let answer = panic::catch_unwind(AssertUnwindSafe(|| body(scope)));
        answer.unwrap_or_else(|panicked| {
            abort_unless(ended, message(&*panicked));
            panic::resume_unwind(panicked)
        })
    })
}

/// Aborts this process after the time limit, unless the other end of the channel is dropped before.
fn abort_unless(ended: mpsc::Receiver<()>, message: String) {
    let name = thread::current().name().unwrap_or("a thread without a name").to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            // A write to the descriptor, because the test runner captures what the macros print.
            let _ = writeln!(io::stderr(), "{name} panicked, and its threads hang: {message}");
            process::abort();
        }
    });
}

fn message(panicked: &(dyn Any + Send)) -> String {
    let text = panicked.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panicked.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

const LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::scope;
    use crate::{child, this_test};
    use std::thread;

    #[test]
    fn a_panic_beside_a_thread_that_hangs_ends_the_process_with_its_message() {
        let end = child::run(this_test!(), || {
            scope(|scope| {
                scope.spawn(|| {
                    loop {
                        thread::park();
                    }
                });
                panic!("planted");
            });
        });
        assert_eq!(end.signal(), Some(nix::libc::SIGABRT), "{}", end.output());
        assert!(end.output().contains("its threads hang: planted"), "{}", end.output());
    }

    #[test]
    #[should_panic(expected = "planted")]
    fn a_panic_beside_threads_that_end_is_passed_on() {
        scope(|scope| {
            scope.spawn(|| ());
            panic!("planted");
        });
    }
}
