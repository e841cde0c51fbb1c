//! The abilities of this kernel and this process, probed at run time, each with the reason and the
//! remedy if it is missing.
//!
//! Kernel support is never a Cargo feature, because a binary runs on other kernels than the one it
//! was built on.

use crate::features::Features;
use crate::page::PageSize;
use crate::staging;
use crate::uffd::{FaultMode, OpenError, OpenedBy, Uffd, handshake_probe};
use nix::unistd::geteuid;
use std::fs;
use std::sync::OnceLock;

/// The abilities of the running kernel and this process.
#[derive(Debug, Clone)]
pub struct Support {
    kernel: String,
    page: PageSize,
    userfaultfd: Result<Opened, OpenError>,
}

#[derive(Debug, Clone, Copy)]
struct Opened {
    by: OpenedBy,
    mode: FaultMode,
    features: Features,
    /// True if this process may open a userfaultfd with fork events.
    follows_forks: bool,
}

/// An ability that a kernel or process may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Its name; the kernel's name if it has one.
    pub name: &'static str,
    /// The first Linux version that has it.
    pub since: &'static str,
    /// Its use.
    pub unlocks: &'static str,
    /// Whether this kernel and process have it.
    pub verdict: Verdict,
}

/// Whether this kernel and process have an ability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// They have it.
    Yes,
    /// They lack it.
    No {
        /// The reason.
        reason: String,
        /// The consequence.
        cost: &'static str,
        /// The remedy for the user of this process.
        remedy: String,
    },
}

impl Support {
    /// Probes the kernel with a userfaultfd that is closed again.
    #[must_use]
    pub fn probe() -> Self {
        let userfaultfd = handshake_probe().and_then(|features| {
            let uffd = Uffd::open(Features::NONE)?;
            let (by, mode) = (uffd.opened_by(), uffd.mode());
            drop(uffd);
            let follows_forks = match Uffd::open(Features::EVENT_FORK) {
                Err(refused) if refused.transient().is_some() => return Err(refused),
                opened => opened.is_ok(),
            };
            Ok(Opened { by, mode, features, follows_forks })
        });
        let kernel =
            fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| String::from("unknown"));
        Self { kernel: kernel.trim().to_owned(), page: PageSize::system(), userfaultfd }
    }

    /// The result of the first probe in this process. As long as descriptors or memory are missing, each
    /// call probes again.
    pub fn current() -> &'static Self {
        static CURRENT: OnceLock<Support> = OnceLock::new();
        static FOR_NOW: OnceLock<Support> = OnceLock::new();
        if let Some(support) = CURRENT.get() {
            return support;
        }
        let support = Self::probe();
        let is_for_now = support.userfaultfd.is_err_and(|refused| refused.transient().is_some());
        if is_for_now { &FOR_NOW } else { &CURRENT }.get_or_init(|| support)
    }

    /// The running kernel's release, as `uname -r` prints it.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// The size of base pages.
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page
    }

    /// The userfaultfd features of this kernel.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the ways that were tried and the remedy.
    pub fn features(&self) -> Result<Features, OpenError> {
        self.userfaultfd.map(|opened| opened.features)
    }

    /// True if this process has a userfaultfd, and the kernel has all of `features`.
    #[must_use]
    pub fn has(&self, features: Features) -> bool {
        self.userfaultfd.is_ok_and(|opened| opened.features.contains(features))
    }

    /// Every ability that was probed, in the order of the kernel versions that introduced it.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        let mut all = vec![self.userfaultfd_itself(), self.device(), self.kernel_faults()];
        all.extend(FEATURES.iter().map(|row| self.feature(row)));
        all.push(self.staging());
        all
    }

    fn userfaultfd_itself(&self) -> Capability {
        let verdict = match self.userfaultfd {
            Ok(_) => Verdict::Yes,
            Err(error) => Verdict::No {
                reason: match error.errno() {
                    errno if errno == error.system_call => format!("userfaultfd(2) answers {errno}"),
                    errno => format!("/dev/userfaultfd answers {errno}"),
                },
                cost: "no page is filled on first touch: the server Eager fills regions when they are built, and still works",
                remedy: error.remedy().to_owned(),
            },
        };
        Capability { name: "userfaultfd", since: "4.3", unlocks: "regions filled on first touch", verdict }
    }

    fn device(&self) -> Capability {
        let verdict = match self.userfaultfd {
            Ok(Opened { by: OpenedBy::Device, .. }) => Verdict::Yes,
            opened => {
                let refusal = fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").err();
                let kind = refusal.as_ref().map(std::io::Error::kind);
                Verdict::No {
                    reason: refusal.map_or_else(
                        || String::from("it opens, but makes no userfaultfd"),
                        |error| format!("the kernel answers: {error}"),
                    ),
                    cost: match opened {
                        Ok(Opened { mode: FaultMode::All, .. }) => {
                            "nothing: the system call offers the same to this process"
                        }
                        Ok(_) => "see kernel-mode faults below",
                        Err(_) => "see userfaultfd above",
                    },
                    remedy: if kind == Some(std::io::ErrorKind::NotFound) {
                        String::from(
                            "use Linux 6.1 or newer; in a container, add the node (docker run --device /dev/userfaultfd)",
                        )
                    } else {
                        access_to_device()
                    },
                }
            }
        };
        Capability {
            name: "/dev/userfaultfd",
            since: "6.1",
            unlocks: "serving the kernel's own faults without a capability",
            verdict,
        }
    }

    fn kernel_faults(&self) -> Capability {
        let verdict = match self.userfaultfd {
            Ok(Opened { mode: FaultMode::All, .. }) => Verdict::Yes,
            Ok(_) => Verdict::No {
                reason: String::from(
                    "this process lacks /dev/userfaultfd and CAP_SYS_PTRACE, and vm.unprivileged_userfaultfd is 0",
                ),
                cost: "a system call that reads an absent page returns EFAULT, unless populate() has filled the page",
                remedy: format!("{}; or {GRANT_PTRACE}", access_to_device()),
            },
            Err(_) => no_userfaultfd(),
        };
        Capability {
            name: "kernel-mode faults",
            since: "4.3",
            unlocks: "handing absent pages to system calls (write(2) from a region)",
            verdict,
        }
    }

    fn staging(&self) -> Capability {
        let verdict = match self.userfaultfd.map(|opened| staging::available(opened.features)) {
            Ok(Ok(())) => Verdict::Yes,
            Ok(Err(why)) => {
                let (reason, remedy) = why.split_once(": ").unwrap_or((why, "use Linux 6.8 or newer"));
                Verdict::No {
                    reason: reason.to_owned(),
                    cost: "whole blocks are copied in page by page, which takes longer",
                    remedy: remedy.to_owned(),
                }
            }
            Err(_) => no_userfaultfd(),
        };
        let unlocks = "filling whole blocks of 2 MiB in a huge page, and moving them in at once";
        Capability { name: "huge staging", since: "6.8", unlocks, verdict }
    }

    fn feature(&self, row: &FeatureRow) -> Capability {
        let verdict = match self.userfaultfd {
            Ok(opened) if row.feature == Features::EVENT_FORK && !opened.follows_forks => Verdict::No {
                reason: String::from(
                    "the kernel reports forks only to processes with CAP_SYS_PTRACE, which this one lacks",
                ),
                cost: row.cost,
                remedy: GRANT_PTRACE.to_owned(),
            },
            Ok(opened) if opened.features.contains(row.feature) => Verdict::Yes,
            Ok(_) => Verdict::No {
                reason: format!("Linux {} does not offer it", self.kernel),
                cost: row.cost,
                remedy: format!("use Linux {} or newer, built with it", row.since),
            },
            Err(_) => no_userfaultfd(),
        };
        Capability { name: row.name, since: row.since, unlocks: row.unlocks, verdict }
    }
}

fn no_userfaultfd() -> Verdict {
    Verdict::No {
        reason: String::from("no userfaultfd"),
        cost: "see userfaultfd above",
        remedy: String::from("see userfaultfd above"),
    }
}

/// The command that gives the user of this process access to the device.
fn access_to_device() -> String {
    format!("as root: setfacl -m u:{}:rw /dev/userfaultfd", geteuid())
}

const GRANT_PTRACE: &str =
    "as root: setcap cap_sys_ptrace+ep PROGRAM; for a container: docker run --cap-add SYS_PTRACE";

struct FeatureRow {
    name: &'static str,
    feature: Features,
    since: &'static str,
    unlocks: &'static str,
    cost: &'static str,
}

macro_rules! feature_rows {
    ($($name:literal $feature:ident $since:literal $unlocks:literal $cost:literal;)*) => {
        &[$(FeatureRow {
            name: $name, feature: Features::$feature, since: $since, unlocks: $unlocks, cost: $cost,
        }),*]
    };
}

const FEATURES: &[FeatureRow] = feature_rows! {
    "EVENT_REMOVE" EVENT_REMOVE "4.11" "knowing at once which pages were discarded (MADV_DONTNEED)" "a discarded page is filled again when it is touched";
    "EVENT_FORK" EVENT_FORK "4.11" "serving forked children" "children do not inherit regions";
    "MISSING_SHMEM" MISSING_SHMEM "4.11" "missing faults on memfds" "memory that is mapped from a memfd is not filled on first touch";
    "MISSING_HUGETLBFS" MISSING_HUGETLBFS "4.11" "missing faults on huge pages" "memory of hugetlbfs pages is not filled on first touch";
    "SIGBUS" SIGBUS "4.14" "filling a page in the thread that touched it" "the server Inline is refused: use a pool";
    "THREAD_ID" THREAD_ID "4.14" "naming the thread that waits" "reports of faults do not name the waiting thread";
    "PAGEFAULT_FLAG_WP" WRITE_PROTECT "5.7" "letting writers into adopted memory that its owner has protected" "nothing: without it, no owner can protect its memory";
    "MINOR_HUGETLBFS" MINOR_HUGETLBFS "5.13" "sharing huge pages that are filled later; not used for regions yet" "nothing yet";
    "MINOR_SHMEM" MINOR_SHMEM "5.14" "sharing memfd pages that are filled later" "a memfd that is filled later (LazyMemfd) is refused";
    "EXACT_ADDRESS" EXACT_ADDRESS "5.18" "the byte that was touched, not its page; not used yet" "nothing yet";
    "WP_HUGETLBFS_SHMEM" WRITE_PROTECT_SHMEM "5.19" "the same for memfds and huge pages; not used for regions yet" "nothing yet";
    "WP_UNPOPULATED" WRITE_PROTECT_UNPOPULATED "6.4" "a part of WP_ASYNC, which implies it" "see WP_ASYNC";
    "POISON" POISON "6.6" "SIGBUS for a page whose source failed" "an empty memfd is mapped over it: one more mapping a run of pages";
    "WP_ASYNC" WRITE_PROTECT_ASYNC "6.7" "records of written pages: changes(), and write-back by flush()" "track_changes() and write_back() are refused";
    "MOVE" MOVE "6.8" "moving pages in without a copy" "pages are copied";
};
