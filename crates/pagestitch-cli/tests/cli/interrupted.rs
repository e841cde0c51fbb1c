//! Ctrl-C during a benchmark, whose rounds have processes of their own.

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use pagestitch_testkit::wait::until;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// A benchmark in a process group of its own, and a guest that it measures.
fn measured() -> (Child, String) {
    // A shell has its background jobs ignore SIGINT, and with them the tests of such a job.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_pagestitch")]);
    command.args(["bench", "restore", "--quick", "--rounds", "1000"]).process_group(0);
    let bench = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", bench.id());
    let mut guest = String::new();
    until("a guest is started", || {
        guest = fs::read_to_string(&children).unwrap().trim().to_owned();
        // It has the arguments of the benchmark until it runs the program again, with none.
        let line = fs::read(format!("/proc/{guest}/cmdline")).unwrap_or_default();
        line.iter().filter(|&&byte| byte == 0).count() == 1
    });
    (bench, guest)
}

fn id(bench: &Child) -> Pid {
    Pid::from_raw(bench.id().cast_signed())
}

#[test]
fn a_ctrl_c_ends_a_benchmark_after_its_complete_rounds() {
    let (bench, _) = measured();
    // A terminal sends it to each process of the group.
    killpg(id(&bench), Signal::SIGINT).unwrap();
    let output = bench.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    assert!(said.starts_with("ending after the complete rounds"), "{said}");
}

#[test]
fn a_killed_benchmark_leaves_no_guest() {
    let (bench, guest) = measured();
    kill(id(&bench), Signal::SIGKILL).unwrap();
    bench.wait_with_output().unwrap();
    // A zombie has no arguments.
    let line = format!("/proc/{guest}/cmdline");
    until("the guest has ended", || fs::read(&line).map_or(true, |line| line.is_empty()));
}
