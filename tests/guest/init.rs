//! Process 1 of a throw-away test guest: mounts the file systems that tests need, runs the suite
//! that the command line names, writes the result to the second serial line, and ends the machine.
//!
//! The runner looks for `GUEST-EXIT <status>`. Without that line the guest has died.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use std::env;
use std::error::Error;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};

fn main() {
    let status = run_suite().unwrap_or_else(|error| {
        eprintln!("guest-init: {error}");
        1
    });
    if status != 0 {
        eprintln!("guest-init: status {status}");
    }
    // With -no-reboot this ends the emulator.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

fn run_suite() -> Result<i32, Box<dyn Error>> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(target)?;
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    mount_disk()?;
    mount_cgroups()?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
    // Tests make as many mappings as a process may have.
    fs::write("/proc/sys/vm/max_map_count", "16384")?;
    let serial = open_serial()?;
    let passed = match env::var("TEST_SUITE").as_deref() {
        Ok("physical") => physical(&serial)?,
        Ok("lockdown") => test(&serial, PHYSICAL, ROOT, &["--ignored", "lockdown::"])?,
        Ok("ordinary_user") => promises(&serial, ORDINARY)?,
        _ => promises(&serial, ROOT)?,
    };
    let status = i32::from(!passed);
    writeln!(&serial, "GUEST-EXIT {status}")?;
    tcdrain(&serial)?;
    Ok(status)
}

/// Mounts the disk with fs-verity, if the machine has one, for every user.
fn mount_disk() -> Result<(), Box<dyn Error>> {
    if Path::new(DISK).exists() {
        fs::create_dir_all(VERITY)?;
        mount(Some(DISK), VERITY, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        fs::set_permissions(VERITY, Permissions::from_mode(0o1777))?;
    }
    Ok(())
}

/// Mounts cgroups of version 2, with limits on memory.
fn mount_cgroups() -> Result<(), Box<dyn Error>> {
    mount(Some("cgroup2"), CGROUPS, Some("cgroup2"), MsFlags::empty(), None::<&str>)?;
    Ok(fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), "+memory")?)
}

/// Runs the tests of the guarantees as a user.
fn promises(serial: &File, user: u32) -> Result<bool, Box<dyn Error>> {
    let filter = env::var("TEST_FILTER").ok().filter(|word| !word.is_empty());
    let arguments: Vec<&str> = filter.as_deref().into_iter().collect();
    let mut passed = true;
    for program in ["/tests/all", "/tests/kernel"] {
        passed &= test(serial, program, user, &arguments)?;
    }
    Ok(passed)
}

/// Runs the tests of physical memory: on the stock kernel, then with the module that lets /dev/mem
/// map any page.
fn physical(serial: &File) -> Result<bool, Box<dyn Error>> {
    let mut passed = test(serial, PHYSICAL, ROOT, &["--ignored", "stock::"])?;
    passed &= test(serial, PHYSICAL, ORDINARY, &["--ignored", "ordinary_user::"])?;
    finit_module(File::open("/modules/devmem_any.ko")?, c"", ModuleInitFlags::empty())?;
    passed &= test(serial, PHYSICAL, ROOT, &["--ignored", "lifted::", "--nocapture", "--test-threads=1"])?;
    passed &= run(serial, Command::new(PHYSICAL_C).arg(RESERVED))?.success();
    Ok(passed)
}

/// Runs tests as a user. True if they pass.
fn test(serial: &File, program: &str, user: u32, arguments: &[&str]) -> Result<bool, Box<dyn Error>> {
    writeln!(&*serial, "GUEST-RUN {program} {} as uid {user}", arguments.join(" "))?;
    let mut command = Command::new(program);
    command.uid(user).gid(user).args(arguments);
    // The log tells how long each test takes.
    command.args(["-Zunstable-options", "--report-time"]).env("RUSTC_BOOTSTRAP", "1");
    if !arguments.iter().any(|argument| argument.starts_with("--test-threads")) {
        command.arg("--test-threads=2");
    }
    if Path::new(VERITY).exists() {
        command.env("PAGESTITCH_VERITY", VERITY);
    }
    command
        .env("TMPDIR", "/tmp")
        .env("PROPTEST_CASES", "6")
        .env("PAGESTITCH_EMULATED", "1")
        .env("RUST_BACKTRACE", "0");
    let ended = run(serial, &mut command)?;
    if ended.signal().is_some() {
        // The log names the tests that have ended. The runner takes the others from this list.
        let list = Command::new(program).args(arguments).arg("--list").stdout(serial.try_clone()?).status();
        writeln!(&*serial, "the tests of {program}: {list:?}")?;
    }
    Ok(ended.success())
}

/// Runs a program, and tells its end if it fails.
fn run(serial: &File, command: &mut Command) -> io::Result<ExitStatus> {
    let ended = command.stdout(serial.try_clone()?).stderr(serial.try_clone()?).status()?;
    if !ended.success() {
        writeln!(&*serial, "{} ended with {ended}", command.get_program().display())?;
    }
    Ok(ended)
}

const DISK: &str = "/dev/nvme0n1";
/// The mounted disk.
const VERITY: &str = "/verity";
const CGROUPS: &str = "/sys/fs/cgroup";
const PHYSICAL: &str = "/tests/physical";
/// The program of C, and the memory that the kernel's command line reserves.
const PHYSICAL_C: &str = "/tests/physical-c";
const RESERVED: &str = "0x8000000";
const ROOT: u32 = 0;
const ORDINARY: u32 = 65534;

/// The second serial line carries the tests' output alone; the first is the kernel's.
fn open_serial() -> Result<File, Box<dyn Error>> {
    let serial = OpenOptions::new().read(true).write(true).open("/dev/ttyS1")?;
    let mut settings = tcgetattr(&serial)?;
    cfmakeraw(&mut settings);
    tcsetattr(&serial, SetArg::TCSANOW, &settings)?;
    Ok(serial)
}
