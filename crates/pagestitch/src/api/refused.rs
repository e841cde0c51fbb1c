//! The errors of `read_at`, `write_at` and `populate` where the kernel does not copy or read the bytes of a region.

use crate::api::AnyRegion;
use crate::error::{Bytes, Error, ErrorKind, FailureReason};
use crate::source::{Backing, Shared};
use crate::space::layout::Piece;
use nix::sys::statvfs::fstatvfs;
use pagestitch_kernel::{Errno, PageSize, Span};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

impl AnyRegion {
    /// The error for pages of a file in place that cannot be read.
    pub(super) fn unread(&self, span: Span, errno: Errno) -> Error {
        let mut range = self.served.page_size().offsets(span);
        range.end = range.end.min(self.len() as u64);
        refused(self, "read", &range, errno)
    }
}

/// The error for bytes that the kernel does not copy.
pub(super) fn refused(region: &AnyRegion, done: &str, range: &Range<u64>, errno: Errno) -> Error {
    let (name, Range { start, end }) = (region.name(), range);
    match errno {
        Errno::EACCES => region.read_only(),
        Errno::EFAULT => {
            let what = format!("region {name}: bytes {start}..{end} cannot be {done}");
            let failed = |piece: Piece<'_>| {
                let (why, error) = why_not(&piece)?;
                let error = Arc::new(piece.failed(error));
                Some(Error::new(error.reason().kind(), format!("{what}: {why}")).with_failure(error))
            };
            region.served.layout.pieces(range.clone()).find_map(failed).unwrap_or_else(|| {
                let why = "a page is poisoned, or was discarded meanwhile, or its file has changed or is gone (EFAULT)";
                Error::new(ErrorKind::SourceFailed, format!("{what}: {why}"))
            })
        }
        Errno::EPERM | Errno::ENOSYS => {
            let what = format!(
                "region {name}: bytes {start}..{end} cannot be {done}: neither process_vm_readv(2) and process_vm_writev(2) nor \
                 /proc/self/mem and pipes are allowed here ({errno}): let the container's seccomp profile pass them"
            );
            Error::new(ErrorKind::PermissionDenied, what)
        }
        errno => {
            let what = format!("region {name}: bytes {start}..{end} cannot be {done}");
            Error::refused(what, errno)
        }
    }
}

/// The reason why the bytes of a file that is mapped in place cannot be accessed; `None` if they
/// can be read. The kernel reports only `EFAULT` for a mapping, so this reads the file to find out.
fn why_not(piece: &Piece<'_>) -> Option<(String, io::Error)> {
    let reopened;
    let file = match piece.backing {
        Backing::Shared(Shared::File(file, _)) => file.file(),
        Backing::Immutable(file) => file.stable().file(),
        Backing::Mapped(mapped) => {
            reopened = mapped.reopen()?;
            &reopened
        }
        _ => return None,
    };
    let (source, expected) = (piece.backing.source().name(), piece.offset + piece.bytes);
    let metadata = file.metadata().ok()?;
    if metadata.len() < expected {
        let why = format!("{source} is shorter than it was: {}", Bytes(metadata.len()));
        return Some((why.clone(), FailureReason::Truncated.error(why)));
    }
    let page = PageSize::system().bytes();
    let read = |offset| file.read_exact_at(&mut [0], offset);
    let failed = (piece.offset..expected).step_by(page).chain([expected - 1]).find_map(|at| read(at).err());
    if let Some(error) = failed {
        return Some((format!("{source}: {error}"), error));
    }
    let free = fstatvfs(file).ok()?.blocks_available();
    let why = format!("no space is left for {source} on its file system (ENOSPC)");
    (free == 0).then(|| (why.clone(), FailureReason::NoSpace.error(why)))
}
