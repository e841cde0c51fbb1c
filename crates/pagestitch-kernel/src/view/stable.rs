//! A view with slices.

use super::View;
use crate::access::Access;
use crate::errno::Errno;
use crate::page::Span;
use std::ptr::NonNull;
use std::slice;

impl View {
    /// Turns this into a view with slices, if no other process can change its bytes.
    ///
    /// # Errors
    ///
    /// The view itself, if another process can.
    pub fn into_stable(self) -> Result<StableView, Self> {
        if !self.stable {
            return Err(self);
        }
        let start = Start(self.as_ptr());
        Ok(StableView { view: self, start })
    }
}

/// A view whose bytes no other process can change.
#[derive(Debug)]
pub struct StableView {
    /// Invariant: the view is stable, and nothing more is mapped into it.
    view: View,
    /// Invariant: the start of the view.
    start: Start,
}

/// The address of the first byte, also kept here so that a touch need not find it in the reservation
/// first.
#[derive(Debug)]
struct Start(NonNull<u8>);

// SAFETY: an address. The view decides which code accesses the bytes.
#[expect(unsafe_code, reason = "holds a raw pointer")]
unsafe impl Send for Start {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "holds a raw pointer")]
unsafe impl Sync for Start {}

impl StableView {
    /// As [`View::hide_from`].
    pub fn hide_from(&mut self, len: usize) {
        self.view.hide_from(len);
    }

    /// As [`View::reveal`].
    ///
    /// # Errors
    ///
    /// As [`View::reveal`].
    ///
    /// # Panics
    ///
    /// As [`View::reveal`].
    pub fn reveal(&self, first: &[u8], len: usize) -> Result<(), Errno> {
        self.view.reveal(first, len)
    }

    /// The bytes of all pages, without [hidden](View::hide_from) ones.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is readable as long as `self` keeps its reservation. A missing page
        // gets its value at its first read, and no safe function gives a filled page other bytes
        // (see the safety argument of the crate). Writes go through `as_mut_slice`, which excludes
        // this borrow.
        #[expect(unsafe_code, reason = "the invariant is the vouching")]
        unsafe {
            slice::from_raw_parts(self.start.0.as_ptr(), self.view.visible())
        }
    }

    /// As [`View::read_at`]: an unreadable byte is an error and no signal.
    ///
    /// # Errors
    ///
    /// As [`View::read_at`].
    ///
    /// # Panics
    ///
    /// If the range is not inside the reservation.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.view.read_at(offset, into)
    }

    /// As [`View::discard`]. It excludes the slices, because other bytes may follow.
    ///
    /// # Errors
    ///
    /// As [`View::discard`].
    ///
    /// # Panics
    ///
    /// As [`View::discard`].
    pub fn discard(&mut self, span: Span) -> Result<(), Errno> {
        self.view.discard(span)
    }

    /// As [`View::write_at`]. It excludes the slices, because it changes their bytes.
    ///
    /// # Errors
    ///
    /// As [`View::write_at`].
    ///
    /// # Panics
    ///
    /// If the range is not inside the reservation.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        self.view.write_at(offset, from)
    }

    /// The bytes for writing; `None` if the reservation is not writable.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        if self.view.access != Access::Writable {
            return None;
        }
        let mapping = &self.view.reservation.mapping;
        // SAFETY: as in `as_slice`, and mapped for writing. This is the only view, and it is
        // borrowed mutably.
        #[expect(unsafe_code, reason = "owned memory becomes a slice")]
        Some(unsafe { slice::from_raw_parts_mut(mapping.start().as_ptr().cast(), self.view.visible()) })
    }

    /// The address of the first byte, for code that works with raw pointers.
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view.as_ptr()
    }
}
