//! The numbers of errors.

use pagestitch::{Error, ErrorKind};

/// The answers of calls. An older library may have fewer: a program treats an unknown one as PS_OTHER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
#[expect(clippy::enum_variant_names, reason = "C has no name spaces")]
pub enum Status {
    /// The call has done its work.
    PsOk = 0,
    /// An argument is a null pointer, an empty or overflowing range, or a struct of another size.
    PsInvalidArgument = -1,
    /// A handle was freed, or is of another type. Only libraries with debug assertions find this.
    #[cfg_attr(not(debug_assertions), expect(dead_code, reason = "a part of the ABI in each build"))]
    PsInvalidHandle = -2,
    /// The library has panicked, which is a defect of it: report it.
    PsPanic = -3,
    /// The builder has no chunk.
    PsNoChunks = -4,
    /// A chunk is empty, or reaches past its source's end.
    PsInvalidChunk = -5,
    /// The region has more bytes or chunks than a region can have.
    PsTooLarge = -6,
    /// An option has a value that cannot be used.
    PsInvalidOption = -7,
    /// An option excludes another one.
    PsOptionConflict = -8,
    /// An offset or range lies outside the region, or a write outside the chunks of a file that is shown in place.
    PsOutOfRange = -9,
    /// The region is only read: call ps_builder_writable() before the build.
    PsReadOnly = -10,
    /// A forked child uses a server or region of its parent.
    PsForkedChild = -11,
    /// The server cannot serve such a region.
    PsUnsuitableServer = -12,
    /// A chunk is memory of another region of the same server.
    PsNestedRegion = -13,
    /// A byte would have to be copied, and the builder requires zero-copy.
    PsNotZeroCopy = -14,
    /// A file is of a sort that does not suit its use.
    PsUnusableFile = -15,
    /// Memory cannot be mapped a second time, or is no physical memory to map.
    PsUnusableMemory = -16,
    /// The kernel lacks userfaultfd, or the process may not use it: use ps_server_eager() or ps_server_best().
    PsNoUserfaultfd = -17,
    /// The kernel lacks a feature that the call needs.
    PsUnsupported = -18,
    /// The process lacks a right that the call needs.
    PsPermissionDenied = -19,
    /// A limit of the process or the system is reached: raise it, or free some of it.
    PsLimitReached = -20,
    /// The kernel has no memory.
    PsOutOfMemory = -21,
    /// A call or the kernel still uses the thing: let that end first.
    PsInUse = -22,
    /// The bytes of a page cannot be had, because its source has failed.
    PsSourceFailed = -23,
    /// A fault took longer than its limit.
    PsTimedOut = -24,
    /// The system refuses to open, read or write a file.
    PsIo = -25,
    /// A part of the region was unmapped or moved.
    PsMemoryGone = -26,
    /// The server has ended.
    PsServerStopped = -27,
    /// The kernel refuses a step for an unknown reason: ps_last_errno() tells more.
    PsKernel = -28,
    /// Another reason: ps_last_error() tells more.
    PsOther = -99,
}

impl Status {
    pub(crate) fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::NoChunks => Self::PsNoChunks,
            ErrorKind::InvalidChunk => Self::PsInvalidChunk,
            ErrorKind::TooLarge => Self::PsTooLarge,
            ErrorKind::InvalidOption => Self::PsInvalidOption,
            ErrorKind::OptionConflict => Self::PsOptionConflict,
            ErrorKind::OutOfRange => Self::PsOutOfRange,
            ErrorKind::ReadOnly => Self::PsReadOnly,
            ErrorKind::ForkedChild => Self::PsForkedChild,
            ErrorKind::UnsuitableServer => Self::PsUnsuitableServer,
            ErrorKind::NestedRegion => Self::PsNestedRegion,
            ErrorKind::NotZeroCopy => Self::PsNotZeroCopy,
            ErrorKind::UnusableFile => Self::PsUnusableFile,
            ErrorKind::UnusableMemory => Self::PsUnusableMemory,
            ErrorKind::NoUserfaultfd => Self::PsNoUserfaultfd,
            ErrorKind::Unsupported => Self::PsUnsupported,
            ErrorKind::PermissionDenied => Self::PsPermissionDenied,
            ErrorKind::LimitReached => Self::PsLimitReached,
            ErrorKind::OutOfMemory => Self::PsOutOfMemory,
            ErrorKind::InUse => Self::PsInUse,
            ErrorKind::SourceFailed => Self::PsSourceFailed,
            ErrorKind::TimedOut => Self::PsTimedOut,
            ErrorKind::Io => Self::PsIo,
            ErrorKind::MemoryGone => Self::PsMemoryGone,
            ErrorKind::ServerStopped => Self::PsServerStopped,
            ErrorKind::Kernel => Self::PsKernel,
            _ => Self::PsOther,
        }
    }
}
