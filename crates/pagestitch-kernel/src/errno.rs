//! The error numbers of the kernel.

use nix::libc;
use std::{error, fmt, io};

/// An error number of the kernel, as in `errno(3)`.
///
/// The constants are the numbers that the calls of this crate name in their docs. Others come from
/// [`from_raw`](Self::from_raw).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The access is not allowed.
    pub const EACCES: Self = Self(libc::EACCES);
    /// The kernel cannot do it now, or a limit is met: try again later.
    pub const EAGAIN: Self = Self(libc::EAGAIN);
    /// The number is no open descriptor.
    pub const EBADF: Self = Self(libc::EBADF);
    /// Another user has the device or the range.
    pub const EBUSY: Self = Self(libc::EBUSY);
    /// It exists already: for a fill, the page is present.
    pub const EEXIST: Self = Self(libc::EEXIST);
    /// The address is not mapped, or its page cannot be read.
    pub const EFAULT: Self = Self(libc::EFAULT);
    /// A signal has interrupted the call.
    pub const EINTR: Self = Self(libc::EINTR);
    /// An argument is not valid, or the kernel does not know it.
    pub const EINVAL: Self = Self(libc::EINVAL);
    /// The device has failed.
    pub const EIO: Self = Self(libc::EIO);
    /// The process has reached its limit on open descriptors.
    pub const EMFILE: Self = Self(libc::EMFILE);
    /// The system has reached its limit on open files.
    pub const ENFILE: Self = Self(libc::ENFILE);
    /// The data is not there.
    pub const ENODATA: Self = Self(libc::ENODATA);
    /// The device or file does not support the call.
    pub const ENODEV: Self = Self(libc::ENODEV);
    /// The file, or the mapping, does not exist.
    pub const ENOENT: Self = Self(libc::ENOENT);
    /// No memory is left, or a limit on memory or mappings is met.
    pub const ENOMEM: Self = Self(libc::ENOMEM);
    /// The socket does not know the option.
    pub const ENOPROTOOPT: Self = Self(libc::ENOPROTOOPT);
    /// No space is left on the file system, or a limit of the system is met.
    pub const ENOSPC: Self = Self(libc::ENOSPC);
    /// The kernel lacks the call, or a filter hides it.
    pub const ENOSYS: Self = Self(libc::ENOSYS);
    /// The file or device does not know the request.
    pub const ENOTTY: Self = Self(libc::ENOTTY);
    /// The offset is past the last data, or the device is gone.
    pub const ENXIO: Self = Self(libc::ENXIO);
    /// The operation is not supported.
    pub const EOPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// The value is too large for its type.
    pub const EOVERFLOW: Self = Self(libc::EOVERFLOW);
    /// The caller lacks the privilege.
    pub const EPERM: Self = Self(libc::EPERM);
    /// The process does not exist, or has ended.
    pub const ESRCH: Self = Self(libc::ESRCH);

    /// The error of this number.
    #[must_use]
    pub const fn from_raw(number: i32) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// True if the same call may succeed in a moment: descriptors, memory or time were missing, or a
    /// signal came. The answer tells nothing about the abilities of the kernel or the process.
    ///
    /// ```
    /// use pagestitch_kernel::Errno;
    ///
    /// assert!(Errno::EMFILE.is_transient());
    /// assert!(!Errno::ENOSYS.is_transient());
    /// ```
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::EMFILE | Self::ENFILE | Self::ENOMEM | Self::EAGAIN | Self::EINTR)
    }

    /// The number in an error of the operating system; [`EIO`](Self::EIO) if the error has none.
    pub fn of(error: impl Into<io::Error>) -> Self {
        error.into().raw_os_error().map_or(Self::EIO, Self)
    }

    /// The answer of a system call, which is -1 if the call has failed.
    pub(crate) fn result<T: PartialEq + From<i8>>(answer: T) -> Result<T, Self> {
        if answer == T::from(-1) { Err(Self::last()) } else { Ok(answer) }
    }

    /// The error of the last failed call of this thread.
    pub(crate) fn last() -> Self {
        Self::of(io::Error::last_os_error())
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nix::errno::Errno::from_raw(self.0) {
            nix::errno::Errno::UnknownErrno => write!(f, "errno {}", self.0),
            known => known.fmt(f),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nix::errno::Errno::from_raw(self.0) {
            nix::errno::Errno::UnknownErrno => write!(f, "Errno({})", self.0),
            known => write!(f, "{known:?}"),
        }
    }
}

impl error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_has_its_name_and_its_number() {
        assert_eq!(Errno::EPERM.to_string(), "EPERM: Operation not permitted");
        assert_eq!(format!("{:?} {:?}", Errno::EPERM, Errno(4000)), "EPERM Errno(4000)");
        assert_eq!(Errno(4000).to_string(), "errno 4000");
        assert_eq!(io::Error::from(Errno::EIO).raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn an_errno_comes_from_any_error_of_the_operating_system() {
        assert_eq!(Errno::of(nix::errno::Errno::ENOMEM), Errno::ENOMEM);
        assert_eq!(Errno::of(std::fs::File::open("/no/such/file").unwrap_err()), Errno::ENOENT);
        assert_eq!(Errno::of(io::ErrorKind::UnexpectedEof), Errno::EIO);
    }
}
