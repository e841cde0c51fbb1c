//! The kernel's answer to a fill, as a value.
//!
//! The output field decides before errno, because errno alone misleads: `EAGAIN` with progress
//! means "continue from there", `EAGAIN` without progress means "the map is changing". The field
//! may hold `-EEXIST`; a cast to an unsigned number, which is a common mistake, would turn that
//! into a length.

use crate::errno::Errno;

/// The kernel's answer to one fill operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The whole range is filled, and the threads that waited for it run.
    Done,
    /// The first `bytes` are filled, the rest was not tried. Continue from there to get the reason.
    Partial {
        /// A positive multiple of the page size.
        bytes: usize,
    },
    /// `EEXIST`: the first page is present already. A thread may still wait for it: wake the range.
    AlreadyThere,
    /// `EAGAIN` without progress: a remove, unmap, remap or fork is in progress. Read the events,
    /// then try again.
    Changing,
    /// `ENOENT`: the first page is not registered or not mapped; for a move, the source page is
    /// missing.
    NotRegistered,
    /// `ESRCH`: the process that owned the memory is gone.
    ProcessGone,
    /// `EFAULT`: the source cannot be read; for a continue, the page cache lacks the page.
    SourceUnreadable,
    /// `ENOMEM`: no memory for a page, or for page tables.
    NoMemory,
    /// `EBUSY`, for a move: a source page is pinned, or shared with a forked process.
    Busy,
    /// Another errno: a wrong argument, or a kernel without this operation.
    Refused(Errno),
}

/// The operations that are answered with an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Copy,
    Zero,
    Continue,
    Poison,
    Move,
}

impl Operation {
    /// True if the answer may mean that the range leaves its first mapping. A move answers `EINVAL`
    /// then, the others `ENOENT`.
    pub(super) fn may_cross(self, outcome: Outcome) -> bool {
        match outcome {
            Outcome::NotRegistered => true,
            Outcome::Refused(errno) => self == Self::Move && errno == Errno::EINVAL,
            _ => false,
        }
    }
}

impl Outcome {
    /// The answer for `whole` bytes, of which only the first `part` were tried.
    pub(super) const fn of_part(self, part: usize, whole: usize) -> Self {
        match self {
            Self::Done if part < whole => Self::Partial { bytes: part },
            outcome => outcome,
        }
    }

    /// Reads the output field `done` before the errno of `answer`.
    pub(super) fn interpret(answer: nix::Result<i32>, requested: usize, done: i64) -> Self {
        let progress = usize::try_from(done).unwrap_or(0);
        match answer.map_err(Errno::of) {
            Ok(_) if progress == 0 || progress >= requested => Self::Done,
            Ok(_) => Self::Partial { bytes: progress },
            Err(Errno::EAGAIN) if progress > 0 => Self::Partial { bytes: progress },
            Err(Errno::EAGAIN) => Self::Changing,
            Err(Errno::EEXIST) => Self::AlreadyThere,
            Err(Errno::ENOENT) => Self::NotRegistered,
            Err(Errno::ESRCH) => Self::ProcessGone,
            Err(Errno::EFAULT) => Self::SourceUnreadable,
            Err(Errno::ENOMEM) => Self::NoMemory,
            Err(Errno::EBUSY) => Self::Busy,
            Err(errno) => Self::Refused(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_field_decides_before_errno() {
        let again = Err(nix::errno::Errno::EAGAIN);
        assert_eq!(Outcome::interpret(again, 8192, 4096), Outcome::Partial { bytes: 4096 });
        // Since Linux 6.15 the field repeats the error; before, it is 0.
        assert_eq!(Outcome::interpret(again, 8192, -i64::from(Errno::EAGAIN.raw())), Outcome::Changing);
        assert_eq!(Outcome::interpret(again, 8192, 0), Outcome::Changing);
    }

    #[test]
    fn each_errno_has_its_own_outcome() {
        let said = |errno: Errno| {
            let answer = Err(nix::errno::Errno::from_raw(errno.raw()));
            Outcome::interpret(answer, 4096, -i64::from(errno.raw()))
        };
        assert_eq!(said(Errno::EEXIST), Outcome::AlreadyThere);
        assert_eq!(said(Errno::ENOENT), Outcome::NotRegistered);
        assert_eq!(said(Errno::ESRCH), Outcome::ProcessGone);
        assert_eq!(said(Errno::EFAULT), Outcome::SourceUnreadable);
        assert_eq!(said(Errno::ENOMEM), Outcome::NoMemory);
        assert_eq!(said(Errno::EBUSY), Outcome::Busy);
        assert_eq!(said(Errno::EINVAL), Outcome::Refused(Errno::EINVAL));
    }

    #[test]
    fn a_successful_ioctl_is_done() {
        assert_eq!(Outcome::interpret(Ok(0), 8192, 8192), Outcome::Done);
        // A write-protect has no output field.
        assert_eq!(Outcome::interpret(Ok(0), 8192, 0), Outcome::Done);
    }
}
