//! Code that is not ours: sources, their names, errors and destructors, callbacks, subscribers of `tracing`. A worker calls it only
//! through here: a panic in it ends neither the worker nor the process, and loses no page.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

/// Calls code that is not ours; says what its panic said.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let said = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
        discard(panic);
        said.unwrap_or_else(|| String::from("(no message)"))
    })
}

/// Calls code that is not ours, whose panic changes nothing.
pub(crate) fn quietly(call: impl FnOnce()) {
    let _ = guarded(call);
}

/// Drops a value whose destructor is not ours.
pub(crate) fn discard<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        // To drop it could panic once more, and so on: it stays.
        std::mem::forget(panic);
    }
}

/// A value whose destructor and `Display` are not ours.
pub(crate) struct Untrusted<T>(Option<T>);

impl<T> Untrusted<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) const fn get(&self) -> &T {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl<T> Drop for Untrusted<T> {
    fn drop(&mut self) {
        discard(self.0.take());
    }
}

impl<T: fmt::Display> fmt::Display for Untrusted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match guarded(|| self.get().to_string()) {
            Ok(said) => f.write_str(&said),
            Err(panic) => write!(f, "(an error that panics when it is shown: {panic})"),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Untrusted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match guarded(|| format!("{:?}", self.get())) {
            Ok(said) => f.write_str(&said),
            Err(panic) => write!(f, "(an error that panics when it is shown: {panic})"),
        }
    }
}

/// A `tracing` event: the subscriber, and what shows its fields, may panic.
macro_rules! log {
    ($level:ident, $($event:tt)*) => { $crate::guard::quietly(|| tracing::$level!($($event)*)) };
}

/// A span that is entered until it is dropped, by a subscriber that may panic.
#[derive(Debug)]
pub(crate) struct Entered(Option<tracing::span::EnteredSpan>);

impl Entered {
    pub(crate) fn new(span: impl FnOnce() -> tracing::Span) -> Self {
        Self(guarded(|| span().entered()).ok())
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        discard(self.0.take());
    }
}

/// A handler that dies by its own defect leaves threads that wait for ever, or zeros: the process dies with it.
pub(crate) struct AbortOnPanic {
    /// True if this thread unwinds already, from a panic of its caller.
    already: bool,
}

impl AbortOnPanic {
    pub(crate) fn armed() -> Self {
        Self { already: thread::panicking() }
    }
}

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() && !self.already {
            eprintln!("pagestitch: a worker panicked, and nobody would serve its faults: aborting");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::os::unix::process::ExitStatusExt;
    use std::panic::panic_any;
    use std::process::Command;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("a destructor");
        }
    }

    impl fmt::Display for Bomb {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("a display");
        }
    }

    #[test]
    fn a_panic_in_code_that_is_not_ours_is_a_message() {
        assert_eq!(guarded(|| 7), Ok(7));
        assert_eq!(guarded(|| panic!("a defect")), Err::<(), _>(String::from("a defect")));
        assert_eq!(guarded(|| panic_any(Bomb)), Err::<(), _>(String::from("(no message)")));
        quietly(|| panic_any(Bomb));
        let foreign = Untrusted::new(Bomb);
        assert_eq!(foreign.to_string(), "(an error that panics when it is shown: a display)");
        drop(foreign);
    }

    /// The process aborts, because without the worker the waiting threads would hang.
    #[test]
    fn a_worker_that_panics_ends_the_process() {
        const HERE: &str = "guard::tests::a_worker_that_panics_ends_the_process";
        if env::var_os("PANIC").is_some() {
            let _abort = AbortOnPanic::armed();
            panic!("a defect");
        }
        let mut again = Command::new(env::current_exe().unwrap());
        let end = again.args([HERE, "--exact", "--nocapture"]).env("PANIC", "1").output().unwrap();
        assert_eq!(end.status.signal(), Some(6), "SIGABRT: {end:?}");
        let said = String::from_utf8_lossy(&end.stderr);
        assert!(said.contains("a worker panicked, and nobody would serve its faults: aborting"), "{said}");
    }
}
