//! Calls of foreign code: sources, their names, errors and destructors, callbacks, `tracing`
//! subscribers. Workers call it only through this module, so that its panics end neither the worker
//! nor the process, and lose no page.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

/// Calls foreign code; returns the message of its panic as an error.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let said = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
        discard(panic);
        said.unwrap_or_else(|| String::from("(no message)"))
    })
}

/// Calls foreign code and ignores its panic.
pub(crate) fn quietly(call: impl FnOnce()) {
    let _ = guarded(call);
}

/// Drops a value with a foreign destructor.
pub(crate) fn discard<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        // Leak the payload, because its own destructor could panic again, and so on.
        std::mem::forget(panic);
    }
}

/// A value with a foreign destructor and a foreign `Display`.
pub(crate) struct Untrusted<T>(Option<T>);

impl<T> Untrusted<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) const fn get(&self) -> &T {
        self.0.as_ref().expect("only the drop takes the value")
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

/// Emits a `tracing` event; the subscriber, and the `Debug` of its fields, may panic.
macro_rules! log {
    ($level:ident, $($event:tt)*) => { $crate::guard::quietly(|| tracing::$level!($($event)*)) };
}

/// A `tracing` span, entered until the drop; the subscriber may panic.
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

/// Aborts the process if the thread panics. A server that ends by its own defect would leave
/// threads that wait forever, or that read zeros.
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
            eprintln!("pagestitch: a worker panicked, and its faults would never be served: aborting");
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
    fn a_panic_in_foreign_code_is_a_message() {
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
        assert!(said.contains("a worker panicked, and its faults would never be served: aborting"), "{said}");
    }
}
