//! Taking over a userfaultfd that another process, or another part of this program, has opened.

use super::open::{kernel_features, wrap};
use super::own_process::is_of_this_process;
use super::read::{ReadMethod, set_nonblocking};
use super::{FaultMode, OpenedBy, Uffd};
use crate::features::Features;
use nix::errno::Errno;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A descriptor could not be taken over as a userfaultfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdoptError {
    /// It is a descriptor of this, instead.
    NotUserfaultfd(String),
    /// The kernel would not tell, or not make it non-blocking.
    Refused(Errno),
    /// It fills memory of this process, for which a promise has to be made: see [`OwnMemory`].
    OwnMemory,
    /// It was not asked for its features yet (`UFFDIO_API`): so it has no memory.
    NotReady,
}

/// The promise that memory of *this* process which is registered with a userfaultfd may be filled.
///
/// Memory of other processes needs none: what is filled there is nothing that this process has a reference to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnMemory(());

impl OwnMemory {
    /// Makes the promise.
    ///
    /// # Safety
    ///
    /// For each userfaultfd that is adopted with it ([`Uffd::adopt_own`]), as long as it is used:
    ///
    /// - no missing page of the memory that is, or will be, registered with it belongs to a Rust value or a reference which counts on
    ///   what missing pages read as: zeros. Memory of an allocator (`Vec`, `Box`) does; a mapping of its own, of which nothing was ever
    ///   read as a slice, does not. Registering is a safe function in some crates, and is no such promise.
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
            Self::Refused(errno) => write!(f, "the descriptor cannot be taken over: {errno}"),
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

/// Takes over one that fills memory of another process, or of this one, for which `own` is promised then.
pub(super) fn adopt(fd: OwnedFd, own: Option<OwnMemory>) -> Result<Uffd, AdoptError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link =
        link.map_err(|error| AdoptError::Refused(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(AdoptError::NotUserfaultfd(link.display().to_string()));
    }
    if own.is_none() {
        match is_of_this_process(fd.as_fd()) {
            Ok(false) => {}
            Ok(true) => return Err(AdoptError::OwnMemory),
            Err(Errno::EINVAL) => return Err(AdoptError::NotReady),
            Err(errno) => return Err(AdoptError::Refused(errno)),
        }
    }
    // A blocking one can be read, but not waited for: poll(2) answers POLLERR.
    set_nonblocking(&fd).map_err(AdoptError::Refused)?;
    // What the kernel can fill does not depend on what the owner asked for. Who may not open one finds out by
    // trying.
    let features = kernel_features().unwrap_or(Features::POISON);
    let read_method = ReadMethod::shared();
    Ok(Uffd { fd: wrap(fd), opened_by: OpenedBy::Other, mode: FaultMode::All, features, read_method })
}
