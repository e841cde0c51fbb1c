//! Adopting a userfaultfd that another process, or another part of this program, has opened.

use super::Uffd;
use super::kept_fd::KeptFd;
use super::open::kernel_features;
use super::opened::{FaultMode, OpenedBy};
use super::own_process::{self, kept};
use super::read::{ReadMethod, set_nonblocking};
use crate::errno::Errno;
use crate::features::Features;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::OnceLock;

/// A descriptor could not be adopted as a userfaultfd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdoptError {
    /// The descriptor is of this kind instead.
    NotUserfaultfd(String),
    /// The kernel refuses to tell its kind, or to make it non-blocking.
    Refused(Errno),
    /// It fills memory of this process, which needs the promise of [`OwnMemory`].
    OwnMemory,
    /// Its handshake (`UFFDIO_API`) is missing, so no memory can be registered with it.
    NotReady,
}

/// The promise that memory of *this* process which is registered with a userfaultfd may be filled.
///
/// Memory of another process needs no promise, because this process has no reference to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnMemory(());

impl OwnMemory {
    /// Makes the promise.
    ///
    /// # Safety
    ///
    /// For each userfaultfd that is adopted with it ([`Uffd::adopt_own`]), as long as it is used:
    ///
    /// - no missing page of the memory that is, or will be, registered with it belongs to a Rust
    ///   value or a reference that counts on missing pages to read as zeros. Memory of an allocator
    ///   (`Vec`, `Box`) does. A separate mapping does not, if no slice of it was ever read. The
    ///   call that registers memory is a safe function in some crates, and is no such promise.
    ///
    /// ```compile_fail,E0133
    /// let promise = pagestitch_kernel::uffd::OwnMemory::promise();
    /// ```
    #[must_use]
    #[expect(unsafe_code, reason = "declares an obligation")]
    pub const unsafe fn promise() -> Self {
        Self(())
    }
}

impl fmt::Display for AdoptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUserfaultfd(what) => {
                write!(
                    f,
                    "the descriptor is no userfaultfd but {what}: send the one that the memory is registered with"
                )
            }
            Self::Refused(errno) => write!(f, "the descriptor cannot be adopted: {errno}"),
            Self::OwnMemory => write!(
                f,
                "the userfaultfd fills memory of this process, not of another: to fill it, make the promise of OwnMemory"
            ),
            Self::NotReady => {
                write!(
                    f,
                    "the userfaultfd has no memory yet: call UFFDIO_API and register memory before it is handed over"
                )
            }
        }
    }
}

impl std::error::Error for AdoptError {}

impl Uffd {
    /// Adopts a userfaultfd that another process has sent ([`fd_passing`](crate::fd_passing)).
    /// Makes it non-blocking, also for the other processes that hold it.
    ///
    /// The features of its handshake are unknown; [`features`](Self::features) are the operations
    /// of the kernel.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]: the descriptor is not a userfaultfd, its kind cannot be determined, or it
    /// fills memory of *this* process, even if another process has sent it: see
    /// [`adopt_own`](Self::adopt_own).
    pub fn adopt(fd: OwnedFd) -> Result<Self, AdoptError> {
        adopt(fd, None)
    }

    /// Prepares the requests by which [`adopt`](Self::adopt) asks the kernel, because they take descriptors and later
    /// adoptions then take none. A server that may run out of descriptors calls this at its start, after its last
    /// `fork(2)`: each process prepares its own adoptions.
    ///
    /// ```
    /// # fn main() -> Result<(), pagestitch_kernel::Errno> {
    /// pagestitch_kernel::Uffd::prepare_adoption()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// A [transient](Errno::is_transient) one, as `EMFILE`, `ENFILE` and `ENOMEM`, if descriptors or memory are
    /// missing. Any other one means that this process cannot make the second of the two requests: the errno of
    /// `memfd_create(2)` (`ENOSYS`; `EACCES` under `vm.memfd_noexec`), of opening the memfd once more through
    /// `/proc`, of mapping it, or of reading `/proc/self/maps` (`ENOENT`, `EACCES`). Adoptions work nevertheless where the
    /// first request answers: mostly, since Linux 6.9. In any case, a later adoption tries again.
    pub fn prepare_adoption() -> Result<(), Errno> {
        features()?;
        own_process::prepare()
    }

    /// As [`adopt`](Self::adopt), also for memory of this process that another part of the program
    /// has registered.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt), except that memory of this process is allowed.
    pub fn adopt_own(fd: OwnedFd, promise: OwnMemory) -> Result<Self, AdoptError> {
        adopt(fd, Some(promise))
    }
}

/// Adopts a userfaultfd that fills memory of another process, or, with the promise `own`, of this
/// one.
fn adopt(fd: OwnedFd, own: Option<OwnMemory>) -> Result<Uffd, AdoptError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link = link.map_err(|error| AdoptError::Refused(Errno::of(error)))?;
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(AdoptError::NotUserfaultfd(link.display().to_string()));
    }
    if own.is_none() {
        match own_process::is_of_this_process(fd.as_fd()) {
            Ok(false) => {}
            Ok(true) => return Err(AdoptError::OwnMemory),
            Err(Errno::EINVAL) => return Err(AdoptError::NotReady),
            Err(errno) => return Err(AdoptError::Refused(errno)),
        }
    }
    // A blocking userfaultfd can be read but not waited for: poll(2) answers POLLERR.
    set_nonblocking(&fd).map_err(AdoptError::Refused)?;
    let features = features().map_err(AdoptError::Refused)?;
    let read_method = ReadMethod::shared();
    Ok(Uffd { fd: KeptFd::own(fd), opened_by: OpenedBy::Other, mode: FaultMode::All, features, read_method })
}

/// The features of an adopted userfaultfd. The operations of the kernel do not depend on the owner's
/// handshake. A process that may not open a userfaultfd learns them by trying.
fn features() -> Result<Features, Errno> {
    static KNOWN: OnceLock<Features> = OnceLock::new();
    let of_kernel = || match kernel_features() {
        Ok(features) => Ok(features),
        Err(refused) => refused.transient().map_or(Ok(Features::POISON), Err),
    };
    kept(&KNOWN, of_kernel).copied()
}
