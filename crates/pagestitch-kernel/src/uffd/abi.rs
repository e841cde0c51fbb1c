//! The ioctls as the kernel defines them in `include/uapi/linux/userfaultfd.h`, through Linux 6.8.
//!
//! Written out here, because system headers lag behind the running kernel. The end of this file
//! proves the sizes; the request numbers follow from them.

use super::outcome::Waiters;
use crate::page::AddressRange;
use nix::{ioctl_read, ioctl_readwrite, ioctl_write_int_bad, request_code_none};

const UFFDIO: u8 = 0xAA;

#[repr(C)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Range {
    start: u64,
    len: u64,
}

/// `uffdio_copy`, and `uffdio_move`, which has the same fields.
#[repr(C)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copied: i64,
}

/// `uffdio_zeropage`, `uffdio_continue` and `uffdio_poison`, which have the same fields.
#[repr(C)]
pub(super) struct Progress {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) done: i64,
}

impl Copy {
    pub(super) fn new(range: AddressRange, source: usize, waiters: Waiters) -> Self {
        let (dst, len) = (range.start() as u64, range.bytes() as u64);
        Self { dst, src: source as u64, len, mode: waiters.mode(), copied: 0 }
    }
}

impl Progress {
    pub(super) fn new(range: AddressRange, waiters: Waiters) -> Self {
        Self { range: range.into(), mode: waiters.mode(), done: 0 }
    }
}

#[repr(C)]
pub(super) struct WriteProtect {
    pub(super) range: Range,
    pub(super) mode: u64,
}

#[repr(C)]
pub(super) struct Register {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

pub(super) const API: u64 = 0xAA;
pub(super) const USER_MODE_ONLY: i32 = 1;
pub(super) const REGISTER_MODE_MISSING: u64 = 1;
pub(super) const WRITEPROTECT_MODE_WP: u64 = 1;

ioctl_readwrite!(api, UFFDIO, 0x3F, Api);
ioctl_readwrite!(register, UFFDIO, 0x00, Register);
// The header declares both as reads.
ioctl_read!(unregister, UFFDIO, 0x01, Range);
ioctl_read!(wake, UFFDIO, 0x02, Range);
ioctl_readwrite!(copy, UFFDIO, 0x03, Copy);
ioctl_readwrite!(zeropage, UFFDIO, 0x04, Progress);
ioctl_readwrite!(r#move, UFFDIO, 0x05, Copy);
ioctl_readwrite!(write_protect, UFFDIO, 0x06, WriteProtect);
ioctl_readwrite!(r#continue, UFFDIO, 0x07, Progress);
ioctl_readwrite!(poison, UFFDIO, 0x08, Progress);
// USERFAULTFD_IOC_NEW of /dev/userfaultfd. The header declares it without an argument, but it takes
// the flags of userfaultfd(2).
ioctl_write_int_bad!(new_from_device, request_code_none!(UFFDIO, 0x00));

impl From<AddressRange> for Range {
    fn from(range: AddressRange) -> Self {
        Self { start: range.start() as u64, len: range.bytes() as u64 }
    }
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<Progress>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);
const _: () = assert!(size_of::<Register>() == 32);
// The answer is the last field of each struct: the kernel does not read it, and writes nothing
// after it.
const _: () = assert!(std::mem::offset_of!(Copy, copied) == 32);
const _: () = assert!(std::mem::offset_of!(Progress, done) == 24);
