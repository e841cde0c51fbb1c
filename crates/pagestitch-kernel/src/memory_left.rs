//! The memory that this process may still fill before the kernel ends a process for the lack of it.
//!
//! The least of two answers counts: `MemAvailable` of the machine, and for each memory cgroup of the
//! process, up to the root, its limit without the memory in use. Pages of files that the kernel can
//! drop (`inactive_file`) do not count as in use. Other processes take memory meanwhile, so the answer
//! is an estimate.

use crate::limits::Limit;
use std::fs;
use std::path::{Path, PathBuf};

/// The memory that is left, and the limit that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLeft {
    /// The number of bytes.
    pub bytes: u64,
    /// The limit.
    pub limit: Limit,
}

impl MemoryLeft {
    /// The memory that is left to this process; `None` if the kernel does not tell.
    #[must_use]
    pub fn now() -> Option<Self> {
        Self::under(Path::new("/"))
    }

    /// The memory that this process can ever have: that of the machine, or the least limit of a memory cgroup
    /// above the process. `None` if the kernel does not tell.
    #[must_use]
    pub fn most() -> Option<u64> {
        Self::most_under(Path::new("/"))
    }

    fn most_under(root: &Path) -> Option<u64> {
        let cgroups = groups(root).into_iter().filter_map(|group| group.limit());
        meminfo(root, "MemTotal:").into_iter().chain(cgroups).min()
    }

    /// As [`now`](Self::now), with `/proc` and the mounts of cgroups below another folder.
    fn under(root: &Path) -> Option<Self> {
        let available = meminfo(root, "MemAvailable:");
        let machine = available.map(|bytes| Self { bytes, limit: Limit::AvailableMemory(bytes) });
        let cgroups = groups(root).into_iter().filter_map(|group| group.left());
        machine.into_iter().chain(cgroups).min_by_key(|left| left.bytes)
    }
}

/// A line of `/proc/meminfo`. `MemAvailable` is the memory that new programs can take without swapping, as
/// the kernel estimates.
fn meminfo(root: &Path, name: &str) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// A memory cgroup: its folder, and the names of its files.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Group {
    /// Its limit, if it has one.
    fn limit(&self) -> Option<u64> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        // `max` is no number, and means no limit.
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }

    /// Its limit without the memory in use; `None` if it has no limit.
    fn left(&self) -> Option<MemoryLeft> {
        let (usage, inactive) = match self.version {
            Version::One => ("memory.usage_in_bytes", "total_inactive_file"),
            Version::Two => ("memory.current", "inactive_file"),
        };
        let read = |file| fs::read_to_string(self.folder.join(file)).ok();
        let limit = self.limit()?;
        let used: u64 = read(usage)?.trim().parse().ok()?;
        let stat = read("memory.stat").unwrap_or_default();
        let inactive = stat.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok());
        let used = used.saturating_sub(inactive.unwrap_or(0));
        Some(MemoryLeft { bytes: limit.saturating_sub(used), limit: Limit::CgroupMemory(limit) })
    }
}

/// The memory cgroups of this process, from its own up to the root of each mount.
fn groups(root: &Path) -> Vec<Group> {
    let read = |file: &str| fs::read_to_string(root.join("proc/self").join(file)).unwrap_or_default();
    let (own, mounts) = (read("cgroup"), read("mountinfo"));
    let paths = own.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        match controllers {
            "" => Some((Version::Two, path)),
            some if some.split(',').any(|one| one == "memory") => Some((Version::One, path)),
            _ => None,
        }
    });
    paths.flat_map(|(version, path)| groups_of(root, &mounts, version, path)).collect()
}

/// The folder of this process's own cgroup of version 2, with the mounts of cgroups below another folder.
pub(crate) fn own_cgroup(root: &Path) -> Option<PathBuf> {
    let own = groups(root).into_iter().find(|group| group.version == Version::Two)?;
    Some(own.folder)
}

/// The cgroups from `path` up, in the first mount of that version.
fn groups_of(root: &Path, mounts: &str, version: Version, path: &str) -> Vec<Group> {
    let mount = mounts.lines().find_map(|line| mount_of(line, version));
    let Some((top, mounted_at)) = mount else { return Vec::new() };
    // In a container, the mount may begin at the process's own cgroup, whose path is of the host.
    let below = Path::new(path).strip_prefix(top).unwrap_or_else(|_| Path::new(""));
    let mounted_at = root.join(mounted_at.trim_start_matches('/'));
    let deepest = mounted_at.join(below);
    let up = deepest.ancestors().take_while(|folder| folder.starts_with(&mounted_at));
    up.map(|folder| Group { folder: folder.to_owned(), version }).collect()
}

/// The root and the folder of a mount of memory cgroups, from a line of `/proc/self/mountinfo`.
fn mount_of(line: &str, version: Version) -> Option<(&str, &str)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (top, folder) = (mount.next()?, mount.next()?);
    let mut file_system = file_system.split(' ');
    let (kind, options) = (file_system.next()?, file_system.nth(1).unwrap_or_default());
    let is_it = match version {
        Version::Two => kind == "cgroup2",
        Version::One => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    is_it.then_some((top, folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A folder with files, removed when it is dropped.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let folder =
                std::env::temp_dir().join(format!("pagestitch-memory-{name}-{}", std::process::id()));
            for (file, text) in files {
                let path = folder.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(folder)
        }

        fn most(&self) -> Option<u64> {
            MemoryLeft::most_under(&self.0)
        }

        fn left(&self) -> Option<(u64, Limit)> {
            MemoryLeft::under(&self.0).map(|left| (left.bytes, left.limit))
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 4096 kB\nMemAvailable:    2048 kB\nBuffers: 1 kB\n");

    #[test]
    fn without_cgroups_the_machine_decides() {
        let tree = Tree::new("machine", &[MEMINFO]);
        assert_eq!(tree.left(), Some((2 * MIB, Limit::AvailableMemory(2 * MIB))));
        assert_eq!(tree.most(), Some(4 * MIB));
        assert_eq!(Tree::new("nothing", &[]).left(), None);
    }

    #[test]
    fn the_tightest_cgroup_above_the_process_decides() {
        let two = "sys/fs/cgroup";
        let tree = Tree::new(
            "two",
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/outer/inner\n"),
                ("proc/self/mountinfo", "25 30 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"),
                (&format!("{two}/outer/inner/memory.max"), "max\n"),
                (&format!("{two}/outer/inner/memory.current"), "4096\n"),
                (&format!("{two}/outer/memory.max"), "1048576\n"),
                (&format!("{two}/outer/memory.current"), "786432\n"),
                (&format!("{two}/outer/memory.stat"), "anon 1\ninactive_file 262144\nactive_file 9\n"),
            ],
        );
        assert_eq!(tree.left(), Some((MIB / 2, Limit::CgroupMemory(MIB))));
        assert_eq!(own_cgroup(&tree.0), Some(tree.0.join(two).join("outer/inner")));
        assert_eq!(tree.most(), Some(MIB));
    }

    #[test]
    fn a_mount_that_begins_at_the_own_cgroup_is_found() {
        let one = "sys/fs/cgroup/memory";
        let tree = Tree::new(
            "one",
            &[
                MEMINFO,
                ("proc/self/cgroup", "4:cpu,cpuacct:/docker/7f\n3:memory:/docker/7f\n0::/\n"),
                (
                    "proc/self/mountinfo",
                    "31 30 0:26 /docker/7f /sys/fs/cgroup/memory ro master:9 - cgroup cgroup rw,memory\n",
                ),
                (&format!("{one}/memory.limit_in_bytes"), "1048576\n"),
                (&format!("{one}/memory.usage_in_bytes"), "1000000\n"),
            ],
        );
        assert_eq!(tree.left(), Some((48_576, Limit::CgroupMemory(MIB))));
    }
}
