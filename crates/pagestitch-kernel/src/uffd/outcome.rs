//! What the kernel answered to a fill, as a value.
//!
//! The output field is read before errno, because errno alone lies: `EAGAIN` with progress means "go on from
//! there", `EAGAIN` without means "the map is changing". Casting the field to an unsigned number, as is often
//! done, turns the `-EEXIST` in it into a length.

use nix::errno::Errno;

/// The kernel's answer to one fill operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The whole range was filled, and who waited for it runs.
    Done,
    /// The first `bytes` were filled; the rest was not tried. Go on from there to learn why.
    Partial {
        /// A positive multiple of the page size.
        bytes: usize,
    },
    /// `EEXIST`: the first page is there already. Who waits for it may still sleep: wake it.
    AlreadyThere,
    /// `EAGAIN` without progress: a remove, unmap, remap or fork is in progress. Read events, then try again.
    Changing,
    /// `ENOENT`: the first page is not registered, or not mapped at all; to a move: the source is a hole.
    NotRegistered,
    /// `ESRCH`: the process that owned the memory is gone.
    ProcessGone,
    /// `EFAULT`: the source cannot be read; to a continue: the page cache has no such page.
    SourceUnreadable,
    /// `ENOMEM`: no memory for a page, or for page tables.
    NoMemory,
    /// `EBUSY`: to a move: a source page is pinned, or shared with a forked process.
    Busy,
    /// Anything else: a wrong argument, or a kernel without this operation.
    Refused(Errno),
}

/// What is answered with an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Copy,
    Zero,
    Continue,
    Poison,
    Move,
}

impl Operation {
    /// Whether an answer may mean that the range leaves the mapping that it begins in. A move says `EINVAL` then, all others
    /// `ENOENT`.
    pub(super) fn may_cross(self, outcome: Outcome) -> bool {
        match outcome {
            Outcome::NotRegistered => true,
            Outcome::Refused(errno) => self == Self::Move && errno == Errno::EINVAL,
            _ => false,
        }
    }
}

/// Whether a fill wakes whoever waits for its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiters {
    Woken,
    /// As if somebody else had filled them, without a thought of us.
    #[cfg(feature = "inject")]
    LeftAsleep,
}

impl Waiters {
    /// `UFFDIO_*_MODE_DONTWAKE` is the same bit for each operation.
    pub(super) const fn mode(self) -> u64 {
        match self {
            Self::Woken => 0,
            #[cfg(feature = "inject")]
            Self::LeftAsleep => 1,
        }
    }
}

impl Outcome {
    /// The answer for `whole` bytes, of which the first `part` were asked for.
    pub(super) const fn of_part(self, part: usize, whole: usize) -> Self {
        match self {
            Self::Done if part < whole => Self::Partial { bytes: part },
            outcome => outcome,
        }
    }

    /// Reads the output field `done` before the errno of `answer`.
    pub(super) fn interpret(answer: nix::Result<i32>, requested: usize, done: i64) -> Self {
        let progress = usize::try_from(done).unwrap_or(0);
        match answer {
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
        let again = Err(Errno::EAGAIN);
        assert_eq!(Outcome::interpret(again, 8192, 4096), Outcome::Partial { bytes: 4096 });
        // Since Linux 6.15 the field repeats the error; before, it is 0.
        assert_eq!(Outcome::interpret(again, 8192, -i64::from(Errno::EAGAIN as i32)), Outcome::Changing);
        assert_eq!(Outcome::interpret(again, 8192, 0), Outcome::Changing);
    }

    #[test]
    fn each_errno_has_its_own_outcome() {
        let said = |errno: Errno| Outcome::interpret(Err(errno), 4096, -i64::from(errno as i32));
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
