//! The promises on older kernels, and physical memory: the test programs, statically linked, in emulated guests.
//!
//! Needs `qemu-system-x86_64`, `gcc` and, for each kernel, a folder `target/guest/kernels/VERSION` with a `vmlinuz` and a
//! `devmem_any.ko`; `ci/guest-kernels` fetches and builds them. Without these the tests are counted as ignored, and a line says why;
//! `PAGESTITCH_REQUIRE_GUEST=1` makes that a failure. `PAGESTITCH_GUEST_FILTER=word` runs the tests with that word.

mod c_program;
mod initramfs;

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::collections::{BTreeSet, HashSet};
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A guest is one thread, which emulates its CPUs in turns: two guests keep two CPUs busy, and more would only be slower.
    arguments.test_threads = Some(2);
    let required = env::var_os("PAGESTITCH_REQUIRE_GUEST").is_some();
    let programs = Arc::new(OnceLock::new());
    let mut trials = match kernels() {
        Ok(kernels) => {
            let guests = kernels.iter().flat_map(|kernel| SUITES.map(|suite| Guest::new(kernel, suite)));
            guests.map(|guest| guest.trial(Arc::clone(&programs))).collect()
        }
        Err(missing) => {
            eprintln!("SKIPPED the tests in a guest: {missing}");
            let failed = Failed::from(missing);
            vec![
                Trial::test("the_promises_and_physical_memory_in_a_guest", || Err(failed))
                    .with_ignored_flag(!required),
            ]
        }
    };
    trials.push(Trial::test("the_message_of_a_failed_guest_ends_with_the_names_of_its_tests", || {
        names_end_the_message();
        Ok(())
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The kernels to test on, or the missing thing with its remedy.
fn kernels() -> Result<Vec<PathBuf>, String> {
    if !cfg!(target_arch = "x86_64") {
        return Err(String::from("guests are x86-64, and static programs for them are built on x86-64"));
    }
    for (program, package) in [(QEMU, "qemu-system-x86"), (COMPILER, COMPILER)] {
        let found =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            return Err(format!("there is no {program}: apt-get install --no-install-recommends {package}"));
        }
    }
    let kernels = fs::read_dir(target().join("kernels")).map(|entries| {
        let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
        folders.filter(|folder| folder.join("devmem_any.ko").exists()).collect::<Vec<_>>()
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

/// The tests that a guest runs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Suite {
    /// As root, on two CPUs.
    Promises,
    /// As an ordinary user, on one CPU.
    OrdinaryUser,
    /// With reserved memory, and a device whose memory is a file of the host.
    Physical,
    /// The same machine with a locked-down kernel.
    Lockdown,
}

const SUITES: [Suite; 4] = [Suite::Promises, Suite::OrdinaryUser, Suite::Physical, Suite::Lockdown];

impl Suite {
    /// True if its guest has reserved memory and a device.
    fn is_physical(self) -> bool {
        matches!(self, Self::Physical | Self::Lockdown)
    }
}

/// A kernel and its suite.
struct Guest {
    kernel: PathBuf,
    version: String,
    suite: Suite,
}

/// Builds `guest-init` and the test programs statically. `guest-init` comes first.
fn build_programs() -> Result<Vec<PathBuf>, String> {
    let mut command = cargo();
    command.args(["test", "--no-run", "--message-format=json", "--target", "x86_64-unknown-linux-gnu"]);
    command.args([
        "-p",
        "pagestitch-tests",
        "--bin",
        "guest-init",
        "--test",
        "all",
        "--test",
        "physical",
        "-p",
        "pagestitch-kernel",
        "--test",
        "kernel",
    ]);
    // At fixed addresses, because the emulator translates a program anew at other addresses, and tests start themselves again.
    command.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // Optimised, because emulation is slow. Assertions stay. Guests print no backtraces.
    command.envs([("CARGO_PROFILE_DEV_OPT_LEVEL", "1"), ("CARGO_PROFILE_DEV_DEBUG", "none")]);
    // A runner for tests on this machine must not run in the build.
    command.env_remove("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER");
    let messages = artifacts(&mut command)?;
    // Without the unit tests of guest-init, which are empty.
    let wanted =
        |message: &Value| message["target"]["kind"][0] == "test" || message["profile"]["test"] == false;
    let programs = messages.into_iter().filter(wanted);
    let programs: Vec<PathBuf> =
        programs.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).collect();
    match programs.iter().any(|program| program.ends_with("guest-init")) {
        true => Ok(programs),
        false => Err(format!("cargo built no guest-init: {programs:?}")),
    }
}

/// Runs cargo with `--message-format=json`, and returns what it says of each artifact.
fn artifacts(command: &mut Command) -> Result<Vec<Value>, String> {
    let output = command.output().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// Why the tests in a guest did not pass.
enum Failure {
    /// The guest died before its first program ran, as an emulated kernel does now and then.
    Kernel(String),
    Tests(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Tests(text)
    }
}

impl Guest {
    fn new(kernel: &Path, suite: Suite) -> Self {
        let version =
            kernel.file_name().unwrap_or_else(|| OsStr::new("unknown")).to_string_lossy().into_owned();
        Self { kernel: kernel.to_owned(), version, suite }
    }

    fn trial(self, programs: Programs) -> Trial {
        let suite = match self.suite {
            Suite::Promises => "the_promises",
            Suite::OrdinaryUser => "the_promises_for_an_ordinary_user",
            Suite::Physical => "physical_memory",
            Suite::Lockdown => "lockdown",
        };
        Trial::test(format!("{suite}_on_linux_{}", self.version.replace('.', "_")), move || {
            let programs = programs.get_or_init(build_programs).as_ref().map_err(String::as_str)?;
            let mut result = self.boot(programs);
            for _ in 1..MAX_BOOTS {
                let Err(Failure::Kernel(console)) = &result else { break };
                eprintln!("linux {}: booted again, because its kernel panicked:\n{console}", self.version);
                result = self.boot(programs);
            }
            result.map_err(|(Failure::Kernel(text) | Failure::Tests(text))| Failed::from(text))
        })
    }

    /// Boots the guest, waits for its end, and reads its verdict.
    fn boot(&self, programs: &[PathBuf]) -> Result<(), Failure> {
        let folder = target().join("run").join(format!("{}-{:?}", self.version, self.suite));
        let failed = |error: io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(failed)?;
        let mut programs = programs.to_vec();
        if self.suite == Suite::Physical {
            programs.push(c_program::build(&folder)?);
        }
        let image = initramfs::pack(&programs, &[self.kernel.join("devmem_any.ko")]).map_err(failed)?;
        fs::write(folder.join("initramfs"), image).map_err(failed)?;
        let (console, tests) = (folder.join("console.log"), folder.join("tests.log"));
        for log in [&console, &tests] {
            let _ = fs::remove_file(log);
        }
        if !self.suite.is_physical() {
            make_disk(&disk_in(&folder)).map_err(failed)?;
        }
        let host =
            (self.suite == Suite::Physical).then(|| Host::start(&folder)).transpose().map_err(failed)?;
        let guest = self.emulator(&folder).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let ended = wait(guest.map_err(|error| format!("cannot start {QEMU}: {error}"))?);
        let said = String::from_utf8_lossy(&fs::read(&tests).unwrap_or_default()).into_owned();
        let telling = ["test result", "compaction", "SKIPPED"];
        for line in said.lines().filter(|line| telling.iter().any(|word| line.contains(word))) {
            eprintln!("linux {}: {line}", self.version);
        }
        match said.lines().find_map(|line| line.strip_prefix("GUEST-EXIT ")) {
            Some("0") => {
                host.filter(|_| self.suite == Suite::Physical).map_or(Ok(()), |host| Ok(host.check()?))
            }
            Some(_) => {
                let text = format!("tests failed on Linux {}:\n{}", self.version, failures(&said));
                Err((text + &names(&said)).into())
            }
            None if said.is_empty() && ended == DIED => Err(Failure::Kernel(tail(&console))),
            None => {
                let text = format!("the guest {ended}:\n{}\n{}", tail(&tests), tail(&console));
                Err((text + &names(&said)).into())
            }
        }
    }

    fn emulator(&self, folder: &Path) -> Command {
        // Unknown words of the kernel's command line become the environment of process 1.
        let filter = env::var("PAGESTITCH_GUEST_FILTER").unwrap_or_default();
        let serial = |log: &str| format!("file:{}", folder.join(log).display());
        let mut append = format!("console=ttyS0 panic=-1 loglevel=4 {FASTER} TEST_FILTER={filter}");
        let mut command = Command::new(QEMU);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        // One thread emulates both CPUs in turns. Were each emulated by a thread of its own, one would spin while the other waits for a
        // turn on a busy machine, and a guest would take up to twice the time.
        command.args(["-accel", "tcg,thread=single", "-cpu", CPU, "-m", "1024"]);
        command.args(["-smp", if self.suite == Suite::OrdinaryUser { "1" } else { "2" }]);
        let disk = disk_in(folder);
        if disk.exists() {
            // Both kernels have this driver, ext4 and fs-verity without a module.
            let drive = format!("file={},if=none,id=disk,format=raw", disk.display());
            command.args(["-drive", &drive, "-device", "nvme,drive=disk,serial=disk"]);
        }
        if self.suite.is_physical() {
            let memory = format!(
                "memory-backend-file,id=shm,size=1M,share=on,mem-path={}",
                Host::path(folder).display()
            );
            command.args(["-object", &memory, "-device", "ivshmem-plain,memdev=shm"]);
            // 16 MiB of reserved memory.
            append += " memmap=16M$0x8000000";
        }
        append += match self.suite {
            Suite::Promises => "",
            Suite::OrdinaryUser => " TEST_SUITE=ordinary_user",
            Suite::Physical => " TEST_SUITE=physical",
            Suite::Lockdown => " lockdown=integrity TEST_SUITE=lockdown",
        };
        command.arg("-kernel").arg(self.kernel.join("vmlinuz")).arg("-initrd").arg(folder.join("initramfs"));
        command.args([
            "-append",
            &append,
            "-serial",
            &serial("console.log"),
            "-serial",
            &serial("tests.log"),
        ]);
        command
    }
}

/// The host's part in the test of shared device memory: the file behind the device, and a thread
/// that answers.
struct Host {
    file: File,
    stop: Arc<AtomicBool>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Host {
    fn path(folder: &Path) -> PathBuf {
        folder.join("device-memory")
    }

    /// Starts a thread that answers n at 0x2000 with n + 1 at 0x2008.
    fn start(folder: &Path) -> io::Result<Self> {
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(Self::path(folder))?;
        file.set_len(1 << 20)?;
        file.write_all_at(b"from the host!", 0)?;
        let (stop, memory) = (Arc::new(AtomicBool::new(false)), file.try_clone()?);
        let stopped = Arc::clone(&stop);
        thread::spawn(move || {
            let mut word = [0; 8];
            while !stopped.load(Ordering::Relaxed) {
                if memory.read_exact_at(&mut word, 0x2000).is_ok() && word != [0; 8] {
                    let _ = memory.write_all_at(&(u64::from_le_bytes(word) + 1).to_le_bytes(), 0x2008);
                }
                // A change of memory wakes no thread, so the thread polls, as a device would.
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self { file, stop })
    }

    /// Checks the bytes that the guest wrote.
    fn check(&self) -> Result<(), String> {
        let mut seen = [0; 16 + 15];
        let (first, last) = seen.split_at_mut(16);
        let read = self.file.read_exact_at(first, 0x1000);
        read.and_then(|()| self.file.read_exact_at(last, (1 << 20) - 15))
            .map_err(|error| error.to_string())?;
        match (&*first, &*last) {
            (b"through /dev/mem", b"from the guest!") => Ok(()),
            seen => Err(format!("the host does not see what the guest wrote: {seen:?}")),
        }
    }
}

fn names_end_the_message() {
    let passed = "test a::one ... ok <0.1s>\ntest result: ok. 1 passed; 0 failed";
    assert_eq!(names(passed), "");
    let ended = format!(
        "test b::two ... FAILED <0.1s>\n{passed}\nfailures:\n\n---- b::two stdout ----\n    odd\n\nfailures:\n    b::two\n    c::three\n\n"
    );
    assert_eq!(names(&ended), "\nfailures:\n    b::two\n    c::three\n");
    let hangs = format!("{ended}test d::four{STILL_RUNNING}\ntest a::one{STILL_RUNNING}\n");
    assert_eq!(names(&hangs), "\nfailures:\n    b::two\n    c::three\n    d::four has no result\n");
    let died = format!(
        "{passed}/tests/all ended with signal: 7\nzero: test\na::one: test\ntwo: test\nthree: test\n"
    );
    assert_eq!(names(&died), "\nfailures:\n    two has no result\n    zero has no result\n");
    let alone = format!(
        "test one ... /tests/all ended\n{died}the tests of /tests/all: Ok\none: test\nthree: test\nfour: test\n"
    );
    let four = ["one", "three", "two", "zero"].map(|name| format!("    {name} has no result\n")).concat();
    assert_eq!(names(&alone), format!("\nfailures:\n{four}"));
    let many: String =
        (0..MOST_NAMES + 2).map(|number| format!("test {number} ... FAILED <0.1s>\n")).collect();
    assert!(names(&many).ends_with("\n    and 2 more\n"), "{}", names(&many));
    let of_c = "GUEST-RUN\nphysical.c:7: not true: one == 2\n/tests/physical-c ended with signal: 6\n";
    assert_eq!(failures(of_c).lines().count(), 2);
}

/// The disk of a guest, if it has one.
fn disk_in(folder: &Path) -> PathBuf {
    folder.join("disk")
}

/// Makes a disk with an ext4 that has fs-verity. Without `mkfs.ext4` there is none, and the test of
/// fs-verity is skipped.
fn make_disk(path: &Path) -> io::Result<()> {
    File::create(path)?.set_len(DISK)?;
    // Few features, because an old kernel lacks some of those that a new mkfs.ext4 chooses. Older kernels
    // want blocks of a page.
    let mut command = Command::new("/usr/sbin/mkfs.ext4");
    command.args(["-q", "-F", "-b", "4096", "-O", "none,extent,filetype,verity"]).arg(path);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        failed => {
            eprintln!("SKIPPED the test of fs-verity in a guest: mkfs.ext4 -O verity ({failed:?})");
            fs::remove_file(path)
        }
    }
}

/// Waits for the end of the guest, up to a limit, and says how it ended.
fn wait(mut guest: Child) -> &'static str {
    let (send, closed) = mpsc::channel();
    let mut stdout = guest.stdout.take().expect("it was piped");
    // The emulator writes nothing to this pipe, which closes at its end.
    thread::spawn(move || send.send(io::copy(&mut stdout, &mut io::sink())));
    let in_time = closed.recv_timeout(PATIENCE).is_ok();
    let _ = guest.kill();
    let _ = guest.wait();
    if in_time { DIED } else { "did not end in time" }
}

/// A list of the failed tests, of those that ran for long and have no result, and of those that may have ended their
/// program by a signal. It ends the message, because a long output is often kept only in part. It has the form of the
/// test runner's own list, from which `.ci/run` takes the names.
fn names(said: &str) -> String {
    let tests = || said.lines().filter_map(|line| line.strip_prefix("test "));
    let failed = tests().filter_map(|line| line.split_once(" ... FAILED")).map(|(name, _)| name.to_owned());
    // Where tests run one by one, the name of a test is there before its result.
    let is_result = |rest: &str| ["ok", "FAILED", "ignored"].iter().any(|result| rest.starts_with(result));
    let ended: HashSet<_> = tests()
        .filter_map(|line| line.split_once(" ... "))
        .filter(|(_, rest)| is_result(rest))
        .map(|(name, _)| name)
        .collect();
    let long =
        tests().filter_map(|line| line.strip_suffix(STILL_RUNNING)).filter(|name| !ended.contains(name));
    // A program that a signal has ended is followed by the list of its tests, in the order in which they start.
    let died = said.split("\nthe tests of ").flat_map(|part| {
        let rest = part.lines().filter_map(|line| line.strip_suffix(": test"));
        rest.filter(|name| !ended.contains(name)).take(TESTS_AT_ONCE)
    });
    let unended = long.chain(died).map(|name| format!("{name} has no result"));
    let names: BTreeSet<String> = failed.chain(unended).chain(listed(said).map(str::to_owned)).collect();
    if names.is_empty() {
        return String::new();
    }
    let more = names.len().saturating_sub(MOST_NAMES);
    let mut list: Vec<_> = names.into_iter().take(MOST_NAMES).map(|name| format!("    {name}")).collect();
    list.extend((more > 0).then(|| format!("    and {more} more")));
    format!("\nfailures:\n{}\n", list.join("\n"))
}

/// The names in the lists with which test programs end. The output of failed tests has such a first line, too, and then
/// an empty one.
fn listed(said: &str) -> impl Iterator<Item = &str> {
    let mut list = false;
    said.lines().filter_map(move |line| {
        let name = line.strip_prefix("    ").filter(|name| list && !name.contains(' '));
        list = line == "failures:" || name.is_some();
        name
    })
}

/// The part of a log that tells of failed tests: the output of each one, then their names.
fn failures(said: &str) -> String {
    let mut failed = false;
    let telling = said.lines().filter(|line| {
        failed = (failed || *line == "failures:") && !line.starts_with("test result");
        failed || line.ends_with("FAILED") || line.contains("not true: ") || line.contains(" ended with ")
    });
    telling.collect::<Vec<_>>().join("\n")
}

fn tail(log: &Path) -> String {
    let said = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<_> = said.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// The folder of kernels, static programs and logs: `target/guest` of the workspace.
fn target() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target")).join("guest")
}

/// How often a guest is booted whose kernel panics before its first program.
const MAX_BOOTS: usize = 3;
/// How an emulator ended that was not killed.
const DIED: &str = "died";
/// The bytes of a guest's disk.
const DISK: u64 = 16 << 20;
/// The end of libtest's line about a test that takes long.
const STILL_RUNNING: &str = " has been running for over 60 seconds";
/// The number of tests that run at once in a guest.
const TESTS_AT_ONCE: usize = 2;
/// The most names of failed tests that end a message.
const MOST_NAMES: usize = 10;
const QEMU: &str = "qemu-system-x86_64";
/// Links the static programs.
const COMPILER: &str = "gcc";
/// 6.12 panics now and then on the emulated cmpxchg16b of QEMU 7.2. Without the other features the kernel chooses instructions
/// that are emulated in less time: strings of words and not of bytes, no switch of protections around each copy, four levels of
/// page tables.
const CPU: &str = "max,-cx16,-erms,-fsrm,-smap,-smep,-la57,-pku,-pks";
/// Options of the kernel: no detours for defects that an emulated CPU does not have, and no checks of the clock and of the timer,
/// which a loaded machine fails.
const FASTER: &str = "mitigations=off tsc=reliable no_timer_check";
/// A guest takes two to four minutes of one CPU. A loaded machine takes several times as long.
const PATIENCE: Duration = Duration::from_secs(1800);
