//! Ranges of memory and of files.

use crate::call::CallError;
use pagestitch::source::Memory;
use std::ffi::c_void;
use std::ptr::NonNull;

/// A piece of memory. It has the layout of struct iovec.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Piece {
    /// Its address, of any alignment.
    pub start: *const c_void,
    /// Its length in bytes.
    pub bytes: usize,
}

/// A range of a file.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Extent {
    /// The offset of its first byte.
    pub offset: u64,
    /// Its length in bytes. PS_TO_END: up to the end of the file.
    pub bytes: u64,
}

/// As a number of bytes of a file: up to its end.
pub const PS_TO_END: u64 = u64::MAX;

/// Memory of the program, which stays valid and unchanged until the region is freed.
struct Lent(Piece);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the caller of the C function has promised that the bytes stay valid and unchanged
        // until the region that holds `self` is freed.
        unsafe { std::slice::from_raw_parts(self.0.start.cast(), self.0.bytes) }
    }
}

// SAFETY: threads only read the bytes, which do not change.
unsafe impl Send for Lent {}

impl Piece {
    pub(crate) fn checked(self) -> Result<(NonNull<u8>, usize), CallError> {
        let start = NonNull::new(self.start.cast::<u8>().cast_mut());
        let start =
            start.ok_or_else(|| CallError::argument("the memory is a null pointer: pass its address"))?;
        let end = start.as_ptr().addr().checked_add(self.bytes);
        if end.is_none() || isize::try_from(self.bytes).is_err() {
            return Err(CallError::argument(format_args!(
                "the memory of {} bytes at {:#x} leaves the address space: pass its length",
                self.bytes,
                start.addr()
            )));
        }
        Ok((start, self.bytes))
    }

    pub(crate) fn memory(self) -> Result<Memory, CallError> {
        self.checked()?;
        Ok(Memory::new(Lent(self)))
    }
}
