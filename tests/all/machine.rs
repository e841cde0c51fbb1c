//! The machine that tests run on: huge pages, users and threads.

use crate::until;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use pagestitch_testkit::child;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::Scope;

/// Reserves huge pages of hugetlbfs for its lifetime. Needs root.
pub(crate) struct HugePages {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    /// Reserves `pages` huge pages. A child finds them reserved by its parent (`Some(None)`). Prints a
    /// line and returns `None` where they cannot be reserved.
    pub(crate) fn or_skip(test: &str, pages: usize) -> Option<Option<Self>> {
        if child::is_child(test) {
            return Some(None);
        }
        let reserved = Self::reserve(pages);
        if reserved.is_none() {
            println!("SKIPPED {test}: no huge pages of hugetlbfs can be reserved here (vm.nr_hugepages)");
        }
        reserved.map(Some)
    }

    /// One test at a time holds a reservation.
    fn reserve(pages: usize) -> Option<Self> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(Self::PATH).ok()?;
        fs::write(Self::PATH, pages.to_string()).ok()?;
        let reserved = Self { before, _alone: alone };
        let there: usize = fs::read_to_string(Self::PATH).ok()?.trim().parse().ok()?;
        (there >= pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, &self.before);
    }
}

/// Becomes an ordinary user, if it is root.
pub(crate) fn become_ordinary_user() {
    if geteuid().is_root() {
        let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
        setgroups(&[]).unwrap();
        setresgid(group, group, group).unwrap();
        setresuid(user, user, user).unwrap();
    }
}

/// The rounds of a long test: so many, or a fifth of them in an emulated guest, whose `init` sets the variable.
pub(crate) fn rounds(all: u64) -> u64 {
    if std::env::var_os("PAGESTITCH_EMULATED").is_some() { all / 5 } else { all }
}

/// True if a process may have more mappings than a test uses up (`vm.max_map_count`). Prints a line then.
pub(crate) fn allows_too_many_mappings(test: &str) -> bool {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let allows = most.trim().parse::<usize>().unwrap() > MAPPINGS_MAX;
    if allows {
        println!(
            "SKIPPED {test}: a process may have more than {MAPPINGS_MAX} mappings here (vm.max_map_count)"
        );
    }
    allows
}

/// The most mappings that a test makes to reach `vm.max_map_count`. The default is 65,530.
pub(crate) const MAPPINGS_MAX: usize = 100_000;

/// True if the thread or process of this folder of `/proc` sleeps, as it does in a page fault.
fn is_asleep(folder: &Path) -> bool {
    fs::read_to_string(folder.join("stat")).is_ok_and(|stat| stat.contains(") S ") || stat.contains(") D "))
}

/// Starts a thread, and returns as soon as it sleeps in `work`, as it does in a page fault.
pub(crate) fn spawn_asleep<'scope, R>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> R + Send + 'scope,
) {
    let (send, folder) = mpsc::channel();
    scope.spawn(move || {
        send.send(Path::new("/proc").join(fs::read_link("/proc/thread-self").unwrap())).unwrap();
        drop(work());
    });
    let folder = folder.recv().unwrap();
    // A loaded machine may run the thread to its end before it is looked at.
    until(|| is_asleep(&folder) || !folder.exists());
}
