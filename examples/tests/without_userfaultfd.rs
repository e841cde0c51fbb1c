//! The examples with memory or file sources run where userfaultfd is denied, as Docker's default
//! seccomp profile denies it.

use pagestitch_kernel::Errno;
use pagestitch_testkit::deny::deny_userfaultfd;
use std::env;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

/// The other examples are about a pool, a server that the program chooses, or the userfaultfd of
/// another owner.
const EXAMPLES: [&str; 11] = [
    "quickstart",
    "own_source",
    "shared_source",
    "sealed_memfd",
    "shared_memfd",
    "files_as_one",
    "ring_buffer",
    "hand_over",
    "weights",
    "prometheus",
    "alias_existing_memory",
];

/// The folder of this build, in which this test is in `deps`.
fn build_folder() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    test.ancestors().nth(2).expect("the profile's folder").to_owned()
}

/// The program of an example. `cargo test` does not build an example that has tests.
fn program(name: &str) -> PathBuf {
    let program = build_folder().join("examples").join(name);
    if !program.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        let built = cargo.args(["build", "--quiet", "--example", name, "--target-dir"]);
        let built = built.arg(build_folder().parent().expect("the target folder")).status();
        assert!(built.expect("cargo").success(), "{name} does not build");
    }
    program
}

/// A seccomp filter belongs to a thread, and the process that the thread starts inherits it.
fn run_denied(name: &str) -> Output {
    let program = program(name);
    let run = || {
        deny_userfaultfd(Errno::EPERM);
        Command::new(program).output().expect("an example that is built")
    };
    thread::scope(|scope| scope.spawn(run).join().expect("a filter"))
}

#[test]
fn examples_with_memory_and_files_run_without_userfaultfd() {
    for name in EXAMPLES {
        let output = run_denied(name);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {}: {stderr}", output.status);
    }
}

#[test]
fn examples_of_a_pool_meet_the_denial() {
    for (name, reason) in [("donate", "NoUserfaultfd"), ("adopt", "EPERM")] {
        let output = run_denied(name);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(reason), "{name}: {}: {stderr}", output.status);
    }
}
