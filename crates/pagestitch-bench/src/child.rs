//! The program started again, as a process that a round measures.

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::env;
use std::os::unix::process::{CommandExt, parent_id};
use std::process::{self, Command, exit};

/// This program, in a process group of its own: a Ctrl-C ends the benchmark after the complete
/// rounds, so it must not end a process that a round measures.
pub(crate) fn this_program() -> Command {
    let mut command = Command::new(env::current_exe().expect("a program knows its file"));
    command.env(PARENT_VARIABLE, process::id().to_string()).process_group(0);
    command
}

/// Has the kernel end this process when the benchmark ends, because no Ctrl-C does.
pub(crate) fn end_with_the_benchmark() {
    set_pdeathsig(Signal::SIGKILL).expect("a kernel with PR_SET_PDEATHSIG");
    let parent = env::var(PARENT_VARIABLE).ok().and_then(|pid| pid.parse().ok());
    if parent.is_some_and(|parent: u32| parent != parent_id()) {
        // It has ended before.
        exit(1);
    }
}

const PARENT_VARIABLE: &str = "PAGESTITCH_BENCH_PARENT";
