//! Process 1 of a throw-away test guest: mounts what tests need, runs every program in `/tests`, tells how it ended
//! on the second serial line, and lets the machine go.
//!
//! The runner looks for `GUEST-EXIT <status>`; without that line the guest has died.

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use std::env;
use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn main() {
    let status = run().unwrap_or_else(|error| {
        eprintln!("guest-init: {error}");
        1
    });
    if status != 0 {
        eprintln!("guest-init: status {status}");
    }
    // With -no-reboot this ends the emulator.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

fn run() -> Result<i32, Box<dyn Error>> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(target)?;
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
    let mut serial = open_serial()?;
    let mut status = 0;
    let mut programs: Vec<_> = fs::read_dir("/tests")?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    programs.sort();
    for program in programs {
        for user in [ROOT, NOBODY] {
            writeln!(serial, "GUEST-RUN {} as uid {user}", program.display())?;
            let mut command = Command::new(&program);
            command.uid(user).gid(user);
            command
                .arg("--test-threads=2")
                .args(env::var("TEST_FILTER").ok().filter(|word| !word.is_empty()));
            command.env("TMPDIR", "/tmp").env("PROPTEST_CASES", "6").env("RUST_BACKTRACE", "0");
            let ended = command.stdout(serial.try_clone()?).stderr(serial.try_clone()?).status()?;
            if !ended.success() {
                writeln!(serial, "{} ended with {ended}", program.display())?;
                status = 1;
            }
        }
    }
    writeln!(serial, "GUEST-EXIT {status}")?;
    tcdrain(&serial)?;
    Ok(status)
}

const ROOT: u32 = 0;
const NOBODY: u32 = 65534;

/// The second serial line carries the tests' output alone; the first is the kernel's.
fn open_serial() -> Result<File, Box<dyn Error>> {
    let serial = OpenOptions::new().read(true).write(true).open("/dev/ttyS1")?;
    let mut settings = tcgetattr(&serial)?;
    cfmakeraw(&mut settings);
    tcsetattr(&serial, SetArg::TCSANOW, &settings)?;
    Ok(serial)
}
