//! Opening a userfaultfd in the first way that the kernel allows.
//!
//! ```text
//!   /dev/userfaultfd ──ok──▶ all faults          needs access to the node
//!        │ any refusal (ENOENT, EACCES, EPERM of a device cgroup ...)
//!        ▼
//!   userfaultfd(0) ──ok──▶ all faults            needs CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1
//!        │ EPERM, and the refusal of the device is lasting
//!        ▼
//!   userfaultfd(UFFD_USER_MODE_ONLY) ──ok──▶ faults of user code only       any user, since Linux 5.11
//! ```
//!
//! A refusal for a lack of descriptors or memory is transient ([`OpenError::transient`]). It ends the search,
//! because a userfaultfd of user faults would miss the other faults for all of its life.

use super::kept_fd::KeptFd;
use super::opened::{FaultMode, OpenedBy};
use super::read::ReadMethod;
use super::{Uffd, abi};
use crate::errno::Errno;
use crate::features::Features;
use nix::fcntl::{OFlag, open as open_file};
use nix::libc;
use nix::sys::stat::Mode;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// No userfaultfd could be opened: both ways were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenError {
    /// The answer to the open of `/dev/userfaultfd`.
    pub device: Errno,
    /// The answer to the system call, for user faults only.
    pub system_call: Errno,
}

impl OpenError {
    /// The answer that another attempt may change ([`Errno::is_transient`]), to either way. `None`: this
    /// process has no userfaultfd.
    ///
    /// A process may be without the one way for good, and without the other for a moment.
    ///
    /// ```
    /// use pagestitch_kernel::Errno;
    /// use pagestitch_kernel::uffd::OpenError;
    ///
    /// let error = OpenError { device: Errno::EMFILE, system_call: Errno::EPERM };
    /// assert_eq!(error.transient(), Some(Errno::EMFILE));
    /// let error = OpenError { device: Errno::ENOENT, system_call: Errno::EPERM };
    /// assert_eq!(error.transient(), None);
    /// ```
    #[must_use]
    pub const fn transient(&self) -> Option<Errno> {
        match (self.system_call, self.device) {
            (errno, _) | (_, errno) if errno.is_transient() => Some(errno),
            _ => None,
        }
    }

    /// The answer that decides: the [transient](Self::transient) one, or else that to the system call.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self.transient() {
            Some(errno) => errno,
            None => self.system_call,
        }
    }

    /// The remedy, for the person that runs the program.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self.errno() {
            Errno::ENOSYS => {
                "boot a kernel built with CONFIG_USERFAULTFD, or let the container's seccomp profile pass it"
            }
            Errno::EPERM | Errno::EACCES => {
                "let the container's seccomp profile pass userfaultfd, hand it /dev/userfaultfd, \
                 or on Linux before 5.11 set vm.unprivileged_userfaultfd=1"
            }
            Errno::EMFILE | Errno::ENFILE => "raise the limit on open files (ulimit -n): a region takes one",
            Errno::EINVAL => "use Linux 4.11 or newer: this kernel does not know the UFFD_API handshake",
            _ => "see userfaultfd(2)",
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no userfaultfd: the system call answers {}, /dev/userfaultfd {}; {}",
            self.system_call,
            self.device,
            self.remedy()
        )
    }
}

impl std::error::Error for OpenError {}

impl Uffd {
    /// Opens a non-blocking, close-on-exec userfaultfd with the features of `wanted` that this
    /// kernel has.
    ///
    /// Tries `/dev/userfaultfd` first, then the system call. Since Linux 5.11 an ordinary user may
    /// make that call for faults of user code, but not for faults of the kernel itself (a
    /// `write(2)` from an absent page): see [`Uffd::mode`].
    ///
    /// # Errors
    ///
    /// [`OpenError`] names both refusals and the remedy.
    #[doc(alias = "UFFDIO_API")]
    pub fn open(wanted: Features) -> Result<Self, OpenError> {
        // A second handshake on one descriptor is EINVAL, and so is a feature that the kernel
        // lacks: so the features come from another descriptor.
        let supported = kernel_features()?;
        let opened = open_fd()?;
        let features = wanted & supported;
        handshake(&opened.fd, features).map_err(|errno| OpenError { device: errno, system_call: errno })?;
        let read_method = ReadMethod::Own;
        Ok(Self {
            fd: KeptFd::own(opened.fd),
            opened_by: opened.by,
            mode: opened.mode,
            features,
            read_method,
        })
    }
}

/// Opens a userfaultfd, reads the features of this kernel, and closes it.
///
/// # Errors
///
/// [`OpenError`], as [`Uffd::open`].
pub fn handshake_probe() -> Result<Features, OpenError> {
    let opened = open_fd()?;
    handshake(&opened.fd, Features::NONE).map_err(|errno| OpenError { device: errno, system_call: errno })
}

/// The features of this kernel. Probed once, because the answer does not change (a forked child has
/// the same kernel), and the close of a uffd takes time for each mapping of the process.
///
/// # Errors
///
/// As [`handshake_probe`].
pub fn kernel_features() -> Result<Features, OpenError> {
    static KNOWN: AtomicU64 = AtomicU64::new(0);
    match KNOWN.load(Ordering::Relaxed) {
        0 => handshake_probe().inspect(|features| KNOWN.store(features.bits(), Ordering::Relaxed)),
        known => Ok(Features::from_bits(known)),
    }
}

pub(super) struct Opened {
    pub(super) fd: OwnedFd,
    by: OpenedBy,
    mode: FaultMode,
}

pub(super) fn open_fd() -> Result<Opened, OpenError> {
    #[cfg(test)]
    tests::OPENED.set(tests::OPENED.get() + 1);
    let device = match from_device() {
        Ok(fd) => return Ok(Opened { fd, by: OpenedBy::Device, mode: FaultMode::All }),
        Err(errno) => errno,
    };
    let refused = match from_system_call(0) {
        Ok(fd) => return Ok(Opened { fd, by: OpenedBy::SystemCall, mode: FaultMode::All }),
        Err(system_call) => OpenError { device, system_call },
    };
    if refused.transient().is_some() {
        return Err(refused);
    }
    match from_system_call(abi::USER_MODE_ONLY) {
        Ok(fd) => Ok(Opened { fd, by: OpenedBy::SystemCall, mode: FaultMode::UserOnly }),
        Err(system_call) => Err(OpenError { device, system_call }),
    }
}

fn from_device() -> Result<OwnedFd, Errno> {
    let device =
        open_file("/dev/userfaultfd", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(Errno::of)?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and touches no memory of this process.
    #[expect(unsafe_code, reason = "an ioctl")]
    let fd = unsafe { abi::new_from_device(device.as_raw_fd(), FLAGS) }.map_err(Errno::of)?;
    Ok(own(fd))
}

fn from_system_call(mode: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: userfaultfd(2) takes flags by value and touches no memory of this process.
    #[expect(unsafe_code, reason = "a system call without a wrapper")]
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS | mode) };
    Errno::result(fd).map(|fd| own(i32::try_from(fd).expect("a descriptor is an int")))
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

pub(super) fn handshake(fd: &OwnedFd, features: Features) -> Result<Features, Errno> {
    let mut request = abi::UffdioApi { api: abi::API, features: features.bits(), ioctls: 0 };
    // SAFETY: the kernel reads and writes `request`, which has the layout of a uffdio_api.
    #[expect(unsafe_code, reason = "an ioctl")]
    unsafe { abi::api(fd.as_raw_fd(), &raw mut request) }.map_err(Errno::of)?;
    Ok(Features::from_bits(request.features))
}

const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::fd::AsFd;

    thread_local! {
        pub(super) static OPENED: Cell<usize> = const { Cell::new(0) };
    }

    #[test]
    fn a_kept_userfaultfd_stays_open_after_its_drop() {
        let Ok(uffd) = Uffd::open(Features::NONE) else {
            println!("SKIPPED a_kept_userfaultfd_stays_open_after_its_drop: no userfaultfd");
            return;
        };
        let link = format!("/proc/self/fd/{}", uffd.as_fd().as_raw_fd());
        uffd.keep_open();
        drop(uffd);
        assert_eq!(std::fs::read_link(link).unwrap().as_os_str(), "anon_inode:[userfaultfd]");
    }

    #[test]
    fn the_features_of_the_kernel_are_probed_once() {
        let Ok(features) = kernel_features() else {
            println!("SKIPPED the_features_of_the_kernel_are_probed_once: no userfaultfd");
            return;
        };
        let before = OPENED.get();
        let opened: Vec<_> = (0..3).map(|_| Uffd::open(Features::POISON).unwrap()).collect();
        assert_eq!(OPENED.get(), before + 3, "no userfaultfd is opened to be thrown away");
        assert_eq!(opened[0].features(), features & Features::POISON);
    }
}
