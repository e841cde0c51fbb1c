//! Locked memory: `mlockall(2)` before a region is built, or while it is touched.

use super::tally::Tally;
use fastrand::Rng;
use nix::libc::MCL_ONFAULT;
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use std::fs;
use std::sync::OnceLock;

/// The locks of a round, until this is dropped.
#[derive(Debug)]
pub(super) struct Locked {
    before: MlockAllFlags,
    meanwhile: MlockAllFlags,
}

impl Locked {
    /// Chooses the locks of a round, and takes those before the build.
    pub(super) fn begin(rng: &mut Rng, tally: &Tally) -> Self {
        let (future, on_fault) = (MlockAllFlags::MCL_FUTURE, MlockAllFlags::from_bits_retain(MCL_ONFAULT));
        let (none, current) = (MlockAllFlags::empty(), MlockAllFlags::MCL_CURRENT);
        let (before, meanwhile) = match rng.u8(..32) {
            0 => (future, none),
            1 => (future | on_fault, none),
            2 => (future | current, none),
            3 => (none, current),
            4 => (none, current | future | on_fault),
            _ => return Self { before: none, meanwhile: none },
        };
        if !may_lock() {
            Tally::count(&tally.locked_skipped, 1);
            return Self { before: none, meanwhile: none };
        }
        let locked = Self { before, meanwhile };
        locked.lock(before, tally);
        locked
    }

    /// True if no memory is locked in this round.
    pub(super) fn is_none(&self) -> bool {
        (self.before | self.meanwhile).is_empty()
    }

    /// Takes the locks that belong into the middle of the round.
    pub(super) fn meanwhile(&self, tally: &Tally) {
        self.lock(self.meanwhile, tally);
    }

    fn lock(&self, flags: MlockAllFlags, tally: &Tally) {
        // A lock touches all mapped memory. Pages may fail meanwhile, which is no error of the
        // lock.
        if !flags.is_empty() && mlockall(flags).is_ok() {
            Tally::count(&tally.locked, 1);
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if !self.is_none() {
            let _ = munlockall();
        }
    }
}

/// True if this process may lock any amount of memory. Under a limit, all later mappings would
/// count against it.
fn may_lock() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let unlimited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY);
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
        unlimited || effective.is_some_and(|capabilities| capabilities >> CAP_IPC_LOCK & 1 == 1)
    })
}

const CAP_IPC_LOCK: u32 = 14;
