//! The limit that a mapping or a descriptor has met: the kernel answers `ENOMEM` or `EAGAIN` for
//! each of them.

use crate::errno::Errno;
use nix::libc;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fmt, fs, io};

/// Opens a file. If the soft limit on descriptors stops it (`EMFILE`), raises that limit to the
/// hard one and tries again. Programs that use `select(2)` rely on the soft limit, so it stays as
/// it is while it is enough.
///
/// # Errors
///
/// The error of `open`.
pub fn with_descriptors<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match open() {
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
            let raised = getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, hard)| {
                soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok()
            });
            if raised { open() } else { Err(error) }
        }
        opened => opened,
    }
}

/// The kernel refused to reserve a range of addresses, or to open it for access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReserveError {
    /// The size of the range, in bytes.
    pub bytes: usize,
    /// The kernel's answer.
    pub errno: Errno,
    /// The limit that the range has met, as far as this process can tell.
    pub limit: Limit,
}

/// A limit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// `RLIMIT_AS`, in bytes: counts all mappings.
    AddressSpace(u64),
    /// `RLIMIT_DATA`, in bytes: counts private writable mappings.
    Data(u64),
    /// `RLIMIT_MEMLOCK`, in bytes: counts all mappings of a process that has called
    /// `mlockall(MCL_FUTURE)`.
    Locked(u64),
    /// `vm.overcommit_memory` is 2: the kernel charges private writable mappings in full.
    Commit,
    /// `RLIMIT_NOFILE`: counts the open descriptors.
    Descriptors(u64),
    /// `RLIMIT_NPROC`: counts the threads of the user. The kernel gives the same answer at the
    /// limit of the cgroup (`pids.max`), and where no addresses are left for the thread's stack.
    Threads(u64),
    /// The number of threads of the cgroup (`pids.max`) or of the system, or the addresses for the
    /// thread's stack: `RLIMIT_NPROC` is unlimited.
    Tasks,
    /// `RLIMIT_FSIZE`, in bytes: counts the bytes of a memfd too.
    FileSize(u64),
    /// `MemAvailable` of the machine, in bytes.
    AvailableMemory(u64),
    /// The memory of a cgroup (`memory.max`, or `memory.limit_in_bytes`), in bytes.
    CgroupMemory(u64),
    /// Another limit: the size of the address space, the number of mappings (`vm.max_map_count`),
    /// or a limit of the whole system.
    Other,
}

impl ReserveError {
    /// The kernel has refused to map `bytes` bytes: finds out which limit they meet.
    #[must_use]
    pub fn met(bytes: usize, errno: Errno) -> Self {
        Self { bytes, errno, limit: Limit::met(bytes as u64, errno) }
    }
}

impl fmt::Display for ReserveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot reserve {} bytes of addresses: {}; {}", self.bytes, self.errno, self.limit)
    }
}

impl std::error::Error for ReserveError {}

impl Limit {
    /// The name of the limit, as `getrlimit(2)` or `/proc/sys` has it; `None` for
    /// [`Other`](Self::Other).
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::AddressSpace(_) => Some("RLIMIT_AS"),
            Self::Data(_) => Some("RLIMIT_DATA"),
            Self::Locked(_) => Some("RLIMIT_MEMLOCK"),
            Self::Commit => Some("vm.overcommit_memory"),
            Self::Descriptors(_) => Some("RLIMIT_NOFILE"),
            Self::Threads(_) => Some("RLIMIT_NPROC"),
            Self::Tasks => Some("pids.max"),
            Self::FileSize(_) => Some("RLIMIT_FSIZE"),
            Self::AvailableMemory(_) => Some("MemAvailable"),
            Self::CgroupMemory(_) => Some("memory.max"),
            Self::Other => None,
        }
    }

    /// The value of the limit: bytes, descriptors or threads.
    #[must_use]
    pub const fn value(self) -> Option<u64> {
        match self {
            Self::AddressSpace(value)
            | Self::Data(value)
            | Self::Locked(value)
            | Self::Descriptors(value)
            | Self::Threads(value)
            | Self::FileSize(value)
            | Self::AvailableMemory(value)
            | Self::CgroupMemory(value) => Some(value),
            Self::Commit | Self::Tasks | Self::Other => None,
        }
    }

    /// The limit on descriptors, which the kernel has answered with `EMFILE`.
    #[must_use]
    pub fn of_descriptors() -> Self {
        Self::Descriptors(soft(Resource::RLIMIT_NOFILE).unwrap_or(RLIM_INFINITY))
    }

    /// The limit on the bytes of a file, if a file of `bytes` bytes exceeds it. The kernel answers with
    /// a signal (SIGXFSZ), so the caller asks first.
    #[must_use]
    pub fn of_file_size(bytes: u64) -> Option<Self> {
        soft(Resource::RLIMIT_FSIZE).filter(|&limit| bytes > limit).map(Self::FileSize)
    }

    /// The limit on threads, which the kernel has answered with `EAGAIN`.
    #[must_use]
    pub fn of_threads() -> Self {
        soft(Resource::RLIMIT_NPROC).map_or(Self::Tasks, Self::Threads)
    }

    /// The limit that `bytes` more bytes meet, if the kernel has answered with `errno`.
    #[must_use]
    pub fn met(bytes: u64, errno: Errno) -> Self {
        if errno == Errno::EAGAIN {
            return Self::Locked(soft(Resource::RLIMIT_MEMLOCK).unwrap_or(0));
        }
        let used = Used::now().unwrap_or_default();
        let passed = |used: u64, limit: u64| used.saturating_add(bytes) > limit;
        let space = soft(Resource::RLIMIT_AS);
        let data = soft(Resource::RLIMIT_DATA).filter(|&limit| passed(used.data, limit));
        match (space, data) {
            (Some(limit), _) if passed(used.addresses, limit) => Self::AddressSpace(limit),
            (_, Some(limit)) => Self::Data(limit),
            _ if commits_in_full() => Self::Commit,
            (Some(limit), None) => Self::AddressSpace(limit),
            (None, None) => Self::Other,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const GUARDED: &str = "a region that is only read is not counted if it is built hardware_read_only()";
        match self {
            Self::AddressSpace(limit) => {
                write!(f, "this process is limited to {limit} (RLIMIT_AS): raise it with ulimit -v")
            }
            Self::Data(limit) => write!(
                f,
                "writable memory of this process is limited to {limit} (RLIMIT_DATA): raise it with ulimit -d; {GUARDED}"
            ),
            Self::Locked(limit) => write!(
                f,
                "this process locks what it maps (mlockall), and may lock {limit} (RLIMIT_MEMLOCK): raise it with ulimit -l, or build \
                 before mlockall(MCL_FUTURE)"
            ),
            Self::Commit => write!(
                f,
                "vm.overcommit_memory=2 charges writable memory in full: set it to 1, or raise vm.overcommit_ratio; {GUARDED}"
            ),
            Self::Descriptors(limit) => {
                write!(
                    f,
                    "this process may open {limit} descriptors (RLIMIT_NOFILE): raise it with ulimit -n"
                )
            }
            Self::Threads(limit) => write!(
                f,
                "this user may have {limit} threads (RLIMIT_NPROC): raise it with ulimit -u, or pids.max of the cgroup"
            ),
            Self::Tasks => {
                f.write_str("no more threads may run: raise pids.max of the cgroup, or kernel.threads-max")
            }
            Self::FileSize(limit) => {
                write!(f, "a file may have {limit} bytes (RLIMIT_FSIZE): raise it with ulimit -f")
            }
            Self::AvailableMemory(limit) => write!(
                f,
                "the machine has {limit} bytes of memory available: free some, or make the region smaller"
            ),
            Self::CgroupMemory(limit) => write!(
                f,
                "the cgroup may use {limit} bytes (memory.max): raise its limit (docker run --memory), or make the region smaller"
            ),
            Self::Other => f.write_str("make the region smaller, or raise vm.max_map_count"),
        }
    }
}

/// The soft limit on a resource; `None` if it is unlimited.
fn soft(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft).filter(|&soft| soft != RLIM_INFINITY)
}

/// The bytes of this process that count against the limits.
#[derive(Default)]
struct Used {
    addresses: u64,
    data: u64,
}

impl Used {
    fn now() -> Option<Self> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let kibibytes = |name: &str| -> Option<u64> {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_ascii_whitespace().nth(1)?.parse().ok()
        };
        Some(Self { addresses: kibibytes("VmSize:")? * 1024, data: kibibytes("VmData:")? * 1024 })
    }
}

/// The number of mappings that this process may still make (`vm.max_map_count`).
#[must_use]
pub fn mappings_left() -> usize {
    let most =
        fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|most| most.trim().parse().ok());
    let present =
        fs::read("/proc/self/maps").map_or(0, |maps| maps.iter().filter(|&&byte| byte == b'\n').count());
    most.unwrap_or(65_530_usize).saturating_sub(present)
}

/// The number of descriptors that this process may still open (`RLIMIT_NOFILE`), as far as `/proc` tells.
#[must_use]
pub fn descriptors_left() -> usize {
    let most = soft(Resource::RLIMIT_NOFILE).and_then(|most| usize::try_from(most).ok());
    // Since Linux 6.2 the size of the folder is the number of its entries.
    let told = fs::metadata("/proc/self/fd").map_or(0, |folder| folder.len() as usize);
    let open = match told {
        // One entry is the folder itself, which is open meanwhile.
        0 => match fs::read_dir("/proc/self/fd") {
            Ok(open) => open.count().saturating_sub(1),
            // None is left for the folder.
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => usize::MAX,
            Err(_) => 0,
        },
        told => told,
    };
    most.unwrap_or(usize::MAX).saturating_sub(open)
}

/// As [`mappings_left`], for a caller that makes at most `few` mappings.
///
/// A count takes time for each mapping of the process. So one that is less than a second old serves
/// again, less the mappings of such callers since then, as long as it is many times `few`.
#[must_use]
pub fn mappings_left_for(few: usize) -> usize {
    known(few, 0)
}

/// As [`mappings_left_for`], for a caller that does without mappings that the kernel refuses.
///
/// A count takes as long as to open and map ten files. So there is none for the first few hundred
/// mappings of such callers, nor for as many after each count: the answer is many times `few`.
#[must_use]
pub fn mappings_to_try(few: usize) -> usize {
    known(few, UNCOUNTED)
}

fn known(few: usize, uncounted: usize) -> usize {
    static KNOWN: Mutex<Known> = Mutex::new(Known { count: None, uncounted: 0 });
    // Another thread may hold the lock at a fork, so that a child must not wait for it.
    let Ok(mut known) = KNOWN.try_lock() else { return mappings_left() };
    known.answer(few, uncounted, mappings_left)
}

/// The numbers of mappings that are known without a count.
struct Known {
    /// The moment of the last count, and its result less the mappings since then.
    count: Option<(Instant, usize)>,
    /// The mappings since the last count of callers that did not need one.
    uncounted: usize,
}

impl Known {
    /// `uncounted`: the mappings that may be made without a count.
    fn answer(&mut self, few: usize, uncounted: usize, count: impl FnOnce() -> usize) -> usize {
        let serves = |known: &&mut (Instant, usize)| known.0.elapsed() < FRESH && known.1 / MANY >= few;
        if let Some((_, left)) = self.count.as_mut().filter(serves) {
            *left -= few;
            return *left;
        }
        if self.uncounted.saturating_add(few) <= uncounted {
            self.uncounted += few;
            return few * MANY;
        }
        let left = count();
        *self = Self { count: Some((Instant::now(), left.saturating_sub(few))), uncounted: 0 };
        left
    }
}

/// The age up to which a count of mappings serves again.
const FRESH: Duration = Duration::from_secs(1);
/// A count that is so many times the mappings of a caller need not be exact.
const MANY: usize = 64;
/// The mappings that are made between two counts: few beside the 65,530 that Linux allows a process.
const UNCOUNTED: usize = 512;

fn commits_in_full() -> bool {
    fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_mappings_are_counted_once_in_a_while() {
        let mut known = Known { count: None, uncounted: 0 };
        let uncounted = || unreachable!("needs no count");
        for _ in 0..UNCOUNTED / 100 {
            assert_eq!(known.answer(100, UNCOUNTED, uncounted), 100 * MANY);
        }
        assert_eq!(known.answer(100, UNCOUNTED, || 50_000), 50_000, "the allowance is used up");
        assert_eq!(known.answer(100, UNCOUNTED, uncounted), 49_800, "the count is fresh");
        known.count = Some((Instant::now(), 100 * MANY - 1));
        assert_eq!(known.answer(100, 0, || 200), 200, "the caller needs the mappings");
        known.count = None;
        assert_eq!(known.answer(100, UNCOUNTED, uncounted), 100 * MANY, "the allowance begins again");
        assert_eq!(known.answer(UNCOUNTED, UNCOUNTED, || 70), 70, "many mappings are counted at once");
    }
}
