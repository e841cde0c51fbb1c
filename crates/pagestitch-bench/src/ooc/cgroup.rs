//! Memory cgroups, of version 1 and 2.

use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A memory cgroup with a limit, without swap. Its drop removes it.
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    pub(super) fn new(bytes: u64) -> io::Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (parent, is_second) = parent().ok_or_else(|| io::Error::other("no memory cgroup"))?;
        let folder = parent.join(format!("pagestitch-bench-{}-{number}", process::id()));
        fs::create_dir(&folder)?;
        let cgroup = Self(folder);
        let (limit, swap) = match is_second {
            true => ("memory.max", "memory.swap.max"),
            false => ("memory.limit_in_bytes", "memory.swappiness"),
        };
        fs::write(cgroup.0.join(limit), bytes.to_string())?;
        // A kernel without swap may lack the file.
        let _ = fs::write(cgroup.0.join(swap), "0");
        Ok(cgroup)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// True if this process can make memory cgroups.
pub(crate) fn has_cgroups() -> bool {
    Cgroup::new(64 << 20).is_ok()
}

/// Puts this process into a cgroup.
pub(super) fn join(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.procs"), Pid::this().to_string())
}

/// The folder in which cgroups can be made, and whether it is of version 2.
fn parent() -> Option<(PathBuf, bool)> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut paths = own.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    let first = paths.clone().find(|(controllers, _)| controllers.split(',').any(|one| one == "memory"));
    if let Some((_, path)) = first {
        return Some((below(Path::new("/sys/fs/cgroup/memory"), path), false));
    }
    let (_, path) = paths.find(|(controllers, _)| controllers.is_empty())?;
    // A cgroup of version 2 with processes has no children with a limit, unless it is the root.
    let own = below(Path::new("/sys/fs/cgroup"), path);
    let parent = if own == Path::new("/sys/fs/cgroup") { own } else { own.parent()?.to_owned() };
    let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
    Some((parent, true))
}

/// A path of a cgroup below its mount. In a container the mount may begin at the process's own cgroup.
fn below(mount: &Path, path: &str) -> PathBuf {
    let folder = mount.join(path.trim_start_matches('/'));
    if folder.is_dir() { folder } else { mount.to_owned() }
}

/// The environment variable with the folder of a reader's cgroup.
pub(super) const VARIABLE: &str = "PAGESTITCH_BENCH_CGROUP";
