//! The promises on older kernels: the same test programs, statically linked, in an emulated guest.
//!
//! Needs `qemu-system-x86_64` and, for each kernel, a folder `target/guest/kernels/VERSION` with a `vmlinuz`;
//! `ci/guest-kernels` fetches them. Without these the tests are counted as ignored, and a line says why;
//! `PAGESTITCH_REQUIRE_GUEST=1` makes that a failure. `PAGESTITCH_GUEST_FILTER=word` runs the tests with that word.

mod initramfs;

use libtest_mimic::{Arguments, Failed, Trial};
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The guests share the machine's few CPUs, and each is as slow as emulation is.
    arguments.test_threads = Some(1);
    let required = env::var_os("PAGESTITCH_REQUIRE_GUEST").is_some();
    let programs = Arc::new(OnceLock::new());
    let trials = match kernels() {
        Ok(kernels) => kernels.into_iter().map(|kernel| on_kernel(kernel, Arc::clone(&programs))).collect(),
        Err(missing) => {
            eprintln!("SKIPPED the tests in a guest: {missing}");
            let failed = Failed::from(missing);
            vec![Trial::test("the_promises_in_a_guest", || Err(failed)).with_ignored_flag(!required)]
        }
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What there is to test on, or what is missing and the remedy.
fn kernels() -> Result<Vec<PathBuf>, String> {
    if !cfg!(target_arch = "x86_64") {
        return Err(String::from("guests are x86-64, and static programs for them are built on x86-64"));
    }
    let found = Command::new(QEMU).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_err() {
        return Err(format!("there is no {QEMU}: apt-get install --no-install-recommends qemu-system-x86"));
    }
    let kernels = fs::read_dir(target().join("kernels")).map(|entries| {
        let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
        folders.filter(|folder| folder.join("vmlinuz").exists()).collect::<Vec<_>>()
    });
    match kernels {
        Ok(mut kernels) if !kernels.is_empty() => {
            kernels.sort();
            Ok(kernels)
        }
        _ => {
            Err(format!("there is no kernel in {}: run ci/guest-kernels", target().join("kernels").display()))
        }
    }
}

type Programs = Arc<OnceLock<Result<Vec<PathBuf>, String>>>;

fn on_kernel(kernel: PathBuf, programs: Programs) -> Trial {
    let version = kernel.file_name().unwrap_or_else(|| OsStr::new("unknown")).to_string_lossy().into_owned();
    Trial::test(format!("the_promises_on_linux_{}", version.replace('.', "_")), move || {
        let programs = programs.get_or_init(build_programs).as_ref().map_err(String::as_str)?;
        boot(&kernel, &version, programs).map_err(Failed::from)
    })
}

/// Builds `guest-init` and the test programs statically, in a target folder of their own. `guest-init` comes first.
fn build_programs() -> Result<Vec<PathBuf>, String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--no-run", "--message-format=json", "--target", "x86_64-unknown-linux-gnu"]);
    command.args([
        "-p",
        "pagestitch-tests",
        "--bin",
        "guest-init",
        "--test",
        "all",
        "-p",
        "pagestitch-kernel",
        "--test",
        "kernel",
    ]);
    command.arg("--target-dir").arg(target().join("build")).env("RUSTFLAGS", "-C target-feature=+crt-static");
    // A runner for this machine's tests is not one for the build.
    command
        .env_remove("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER")
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.output().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("the static build failed:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    // Not guest-init's own, empty, unit tests.
    let wanted = |message: &serde_json::Value| {
        message["target"]["kind"][0] == "test" || message["profile"]["test"] == false
    };
    let mut programs: Vec<PathBuf> = messages
        .filter(wanted)
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    programs.sort_by_key(|program| !program.ends_with("guest-init"));
    match programs.first() {
        Some(first) if first.ends_with("guest-init") => Ok(programs),
        _ => Err(format!("cargo built no guest-init: {programs:?}")),
    }
}

/// Boots a guest, waits for it to end, and reads its verdict.
fn boot(kernel: &Path, version: &str, programs: &[PathBuf]) -> Result<(), String> {
    let folder = target().join("run").join(version);
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let image =
        initramfs::with_programs(programs).map_err(|error| format!("cannot pack the programs: {error}"))?;
    fs::write(folder.join("initramfs"), image).map_err(|error| error.to_string())?;
    let (console, tests) = (folder.join("console.log"), folder.join("tests.log"));
    for log in [&console, &tests] {
        let _ = fs::remove_file(log);
    }
    let mut command = emulator(kernel, &folder);
    let guest = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {QEMU}: {error}"))?;
    let ended = wait(guest);
    let said = String::from_utf8_lossy(&fs::read(&tests).unwrap_or_default()).into_owned();
    for line in said.lines().filter(|line| line.starts_with("test result") || line.contains("SKIPPED")) {
        eprintln!("linux {version}: {line}");
    }
    match said.lines().find_map(|line| line.strip_prefix("GUEST-EXIT ")) {
        Some("0") => Ok(()),
        Some(_) => Err(format!("tests failed on Linux {version}:\n{}", tail(&tests))),
        None => Err(format!("the guest {ended}:\n{}\n{}", tail(&tests), tail(&console))),
    }
}

fn emulator(kernel: &Path, folder: &Path) -> Command {
    // What the kernel does not know of its command line becomes the environment of process 1.
    let filter = env::var("PAGESTITCH_GUEST_FILTER").unwrap_or_default();
    let serial = |log: &str| format!("file:{}", folder.join(log).display());
    let mut command = Command::new(QEMU);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-accel",
        "tcg,thread=multi",
    ]);
    // 6.12 panics now and then on the emulated cmpxchg16b of QEMU 7.2.
    command.args(["-cpu", "max,-cx16", "-smp", "2", "-m", "1024"]);
    command.arg("-kernel").arg(kernel.join("vmlinuz")).arg("-initrd").arg(folder.join("initramfs"));
    command.args(["-append", &format!("console=ttyS0 panic=-1 loglevel=4 TEST_FILTER={filter}")]);
    command.args(["-serial", &serial("console.log"), "-serial", &serial("tests.log")]);
    command
}

/// Waits for the guest, as long as it makes sense; says how it ended.
fn wait(mut guest: Child) -> &'static str {
    let (send, closed) = mpsc::channel();
    let mut stdout = guest.stdout.take().expect("it was piped");
    // The emulator says nothing there: it ends when the emulator does.
    thread::spawn(move || send.send(io::copy(&mut stdout, &mut io::sink())));
    let in_time = closed.recv_timeout(PATIENCE).is_ok();
    let _ = guest.kill();
    let _ = guest.wait();
    if in_time { "died" } else { "did not end in time" }
}

fn tail(log: &Path) -> String {
    let said = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<_> = said.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Where kernels, static programs and logs are: `target/guest` of the workspace.
fn target() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")).join("guest")
}

const QEMU: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(300);
