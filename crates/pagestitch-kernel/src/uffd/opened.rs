//! The faults that a uffd serves, and the way in which it was opened.

/// The faults that a uffd serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    /// Every fault: of user code, and of system calls that read or write an absent page.
    All,
    /// Faults of user code. A system call that touches an absent page gets `EFAULT`.
    UserOnly,
}

/// The way in which a uffd was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenedBy {
    /// `/dev/userfaultfd`, since Linux 6.1.
    Device,
    /// The `userfaultfd(2)` system call.
    SystemCall,
    /// By another process, or another part of this program.
    Other,
    /// Not at all: it stands in for the uffd of memory that needs none.
    StandIn,
}
