//! The body of a test in a process of its own, which may die by a signal or run under a permanent
//! limit.
//!
//! The test binary starts itself again for the one test, so no process forks while it has threads.
//!
//! ```no_run
//! use pagestitch_testkit::{child, this_test};
//!
//! #[test]
//! fn a_null_pointer_is_a_segmentation_fault() {
//!     let end = child::run(this_test!(), || { /* ... */ });
//!     assert_eq!(end.signal(), Some(11));
//! }
//! ```

use crate::wait;
use pagestitch::Process;
use std::env;
use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio, exit};
use std::time::Duration;

/// The end of a child, with its output.
#[derive(Debug)]
pub struct ChildExit(Output);

impl ChildExit {
    /// The signal that killed the child.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        self.0.status.signal()
    }

    /// The exit code of the child, if no signal has killed it.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        self.0.status.code()
    }

    /// True if the body of the child returned.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.0.status.success()
    }

    /// The standard output and standard error of the child.
    #[must_use]
    pub fn output(&self) -> String {
        let Output { stdout, stderr, .. } = &self.0;
        String::from_utf8_lossy(stdout).into_owned() + &String::from_utf8_lossy(stderr)
    }

    /// Fails if no test ran: a test binary also succeeds if it has no test of the given name.
    fn of_a_test(self, test: &str) -> Self {
        assert!(!self.output().contains("running 0 tests"), "the test binary has no test of the name {test}");
        self
    }

    /// Fails if the child failed, with the output of the child.
    ///
    /// # Panics
    ///
    /// If the child did not pass.
    pub fn expect_pass(&self) {
        assert!(self.passed(), "the child ended with {}:\n{}", self.0.status, self.output());
    }
}

/// A child that runs beside the test, and the test's name.
#[derive(Debug)]
pub struct ChildTest(Child, String);

impl ChildTest {
    /// Waits for the end of the child.
    ///
    /// # Panics
    ///
    /// If `wait(2)` fails, or if the test binary has no test of that name.
    pub fn wait(self) -> ChildExit {
        ChildExit(self.0.wait_with_output().expect("a child ends")).of_a_test(&self.1)
    }

    /// Waits for the end of the child, and kills it after the time limit. Its output must fit into a pipe.
    ///
    /// # Panics
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_at_most(mut self, limit: Duration) -> ChildExit {
        let process = Process::open(self.id()).expect("a child of this process");
        if !wait::readable(&process, limit) {
            self.kill();
        }
        self.wait()
    }

    /// Kills the child with SIGKILL.
    ///
    /// # Panics
    ///
    /// If the kernel refuses.
    pub fn kill(&mut self) {
        self.0.kill().expect("a child can be killed");
    }

    /// The pid of the child.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

/// The name of the calling test, as `cargo test` prints it: [`run`] and [`spawn`] take it.
///
/// The macro belongs into the test itself, because in a helper it names the helper. A closure in
/// the test also works.
#[macro_export]
macro_rules! this_test {
    () => {
        $crate::child::name_of(std::any::type_name_of_val(&|| ()))
    };
}

/// The name of the function around a closure, without its crate.
#[doc(hidden)]
#[must_use]
pub fn name_of(closure: &'static str) -> &'static str {
    let function = closure.split("::{{closure}}").next().unwrap_or(closure);
    function.split_once("::").map_or(function, |(_, name)| name)
}

/// True if this process is the child of the test.
#[must_use]
pub fn is_child(test: &str) -> bool {
    env::var_os(CHILD).is_some_and(|name| name == test)
}

/// Code that a test runs in children, each with an argument of its own.
#[derive(Debug, Clone, Copy)]
pub struct Body<'t>(&'t str);

/// Declares the code of a test's children. In a child, it runs with the child's argument and exits.
/// `test` is the full name of the calling test.
///
/// Code of the test before this call runs in both processes, so call it first.
pub fn body(test: &str, body: impl FnOnce(&str)) -> Body<'_> {
    if is_child(test) {
        body(&env::var(ARGUMENT).unwrap_or_default());
        exit(0);
    }
    Body(test)
}

impl Body<'_> {
    /// Starts a child with `argument`, and returns while it runs.
    ///
    /// # Panics
    ///
    /// If the test binary cannot be started again.
    pub fn spawn(&self, argument: impl AsRef<OsStr>) -> ChildTest {
        let mut command = again(self.0);
        command.env(ARGUMENT, argument).stdout(Stdio::piped()).stderr(Stdio::piped());
        ChildTest(command.spawn().expect("a test binary can be started again"), String::from(self.0))
    }
}

/// Starts `body` with `argument` in a child, and returns while it runs. `test` is the full name of
/// the calling test.
///
/// Code of the test before this call runs in both processes, so call it first.
///
/// # Panics
///
/// If the test binary cannot be started again.
pub fn spawn(test: &str, argument: &str, body: impl FnOnce(&str)) -> ChildTest {
    self::body(test, body).spawn(argument)
}

/// Runs `body` in a child. `test` is the calling test's full name, as `cargo test` prints it.
///
/// Code of the test before this call runs in both processes. A panic in `body` makes the child fail.
///
/// # Panics
///
/// If the test binary cannot be started again.
pub fn run(test: &str, body: impl FnOnce()) -> ChildExit {
    if is_child(test) {
        body();
        exit(0);
    }
    ChildExit(again(test).output().expect("a test binary can be started again")).of_a_test(test)
}

fn again(test: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("a test knows its binary"));
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, test)
        .env("RUST_BACKTRACE", "0");
    command
}

const ARGUMENT: &str = "PAGESTITCH_TEST_ARGUMENT";
const CHILD: &str = "PAGESTITCH_TEST_CHILD";
