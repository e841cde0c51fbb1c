//! The ioctls as the kernel defines them in `include/uapi/linux/userfaultfd.h`, through Linux 6.8.
//!
//! Written out here, because system headers lag behind the running kernel, and because bindings
//! made from a header need libclang at build time. The end of this file proves the sizes; the
//! request numbers follow from them. The layout of messages is in `message.rs`.

use crate::page::AddressRange;
use nix::{ioctl_read, ioctl_readwrite, ioctl_write_int_bad, request_code_none};

/// `UFFDIO`
const UFFDIO: u8 = 0xAA;

/// `struct uffdio_api`
#[repr(C)]
pub(super) struct UffdioApi {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
pub(super) struct UffdioRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`, and `struct uffdio_move`, which has the same fields.
#[repr(C)]
pub(super) struct UffdioCopy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copied: i64,
}

/// `struct uffdio_zeropage`, `struct uffdio_continue` and `struct uffdio_poison`, which have the
/// same fields.
#[repr(C)]
pub(super) struct UffdioProgress {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) done: i64,
}

impl UffdioCopy {
    pub(super) fn new(range: AddressRange, source: usize, waiters: Waiters) -> Self {
        let (dst, len) = (range.start() as u64, range.bytes() as u64);
        Self { dst, src: source as u64, len, mode: waiters.mode(), copied: 0 }
    }

    /// The same copy, with pages that arrive write-protected.
    pub(super) const fn protected(self, protected: bool) -> Self {
        let mode = self.mode | if protected { COPY_MODE_WP } else { 0 };
        Self { mode, ..self }
    }
}

impl UffdioProgress {
    pub(super) fn new(range: AddressRange, waiters: Waiters) -> Self {
        Self { range: range.into(), mode: waiters.mode(), done: 0 }
    }
}

/// `struct uffdio_writeprotect`
#[repr(C)]
pub(super) struct UffdioWriteProtect {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
}

/// `struct uffdio_register`
#[repr(C)]
pub(super) struct UffdioRegister {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// Whether a fill wakes the threads that wait for its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiters {
    Woken,
    /// As if another thread had filled the pages without waking.
    #[cfg(feature = "inject")]
    LeftAsleep,
}

impl Waiters {
    /// The mode of the operation.
    pub(super) const fn mode(self) -> u64 {
        match self {
            Self::Woken => 0,
            #[cfg(feature = "inject")]
            Self::LeftAsleep => MODE_DONTWAKE,
        }
    }
}

/// `UFFD_API`
pub(super) const API: u64 = 0xAA;
/// `UFFD_USER_MODE_ONLY`
pub(super) const USER_MODE_ONLY: i32 = 1;
/// `UFFDIO_REGISTER_MODE_MISSING`
pub(super) const REGISTER_MODE_MISSING: u64 = 1 << 0;
/// `UFFDIO_REGISTER_MODE_WP`
pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_REGISTER_MODE_MINOR`
pub(super) const REGISTER_MODE_MINOR: u64 = 1 << 2;
/// `UFFDIO_COPY_MODE_WP`
const COPY_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`
pub(super) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// `UFFDIO_COPY_MODE_DONTWAKE`, and `UFFDIO_ZEROPAGE_MODE_DONTWAKE` and its like: the same bit for
/// each operation.
#[cfg(feature = "inject")]
const MODE_DONTWAKE: u64 = 1 << 0;

// Each request is named as its UFFDIO_* in the header.
ioctl_readwrite!(api, UFFDIO, 0x3F, UffdioApi);
ioctl_readwrite!(register, UFFDIO, 0x00, UffdioRegister);
// The header declares both as reads.
ioctl_read!(unregister, UFFDIO, 0x01, UffdioRange);
ioctl_read!(wake, UFFDIO, 0x02, UffdioRange);
ioctl_readwrite!(copy, UFFDIO, 0x03, UffdioCopy);
ioctl_readwrite!(zeropage, UFFDIO, 0x04, UffdioProgress);
ioctl_readwrite!(r#move, UFFDIO, 0x05, UffdioCopy);
ioctl_readwrite!(write_protect, UFFDIO, 0x06, UffdioWriteProtect);
ioctl_readwrite!(r#continue, UFFDIO, 0x07, UffdioProgress);
ioctl_readwrite!(poison, UFFDIO, 0x08, UffdioProgress);
// USERFAULTFD_IOC_NEW of /dev/userfaultfd. The header declares it without an argument, but it takes
// the flags of userfaultfd(2).
ioctl_write_int_bad!(new_from_device, request_code_none!(UFFDIO, 0x00));

impl From<AddressRange> for UffdioRange {
    fn from(range: AddressRange) -> Self {
        Self { start: range.start() as u64, len: range.bytes() as u64 }
    }
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioRange>() == 16);
const _: () = assert!(size_of::<UffdioCopy>() == 40);
const _: () = assert!(size_of::<UffdioProgress>() == 32);
const _: () = assert!(size_of::<UffdioWriteProtect>() == 24);
const _: () = assert!(size_of::<UffdioRegister>() == 32);
// The answer is the last field of each struct: the kernel does not read it, and writes nothing
// after it.
const _: () = assert!(std::mem::offset_of!(UffdioCopy, copied) == 32);
const _: () = assert!(std::mem::offset_of!(UffdioProgress, done) == 24);
const _: () = assert!(std::mem::offset_of!(UffdioRegister, ioctls) == 24);
const _: () = assert!(std::mem::offset_of!(UffdioApi, features) == 8);
