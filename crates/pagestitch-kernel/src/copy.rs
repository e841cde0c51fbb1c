//! Copies of bytes that other code may change meanwhile, without a reference to them. The kernel
//! copies: it has no data races, and an unreadable page is an error. It does not copy `/dev/mem` or
//! a device's memory; there, volatile accesses do.

use crate::errno::Errno;
use crate::mapping::OwnedMapping;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::ptr;

/// Lets the kernel copy bytes out of an owned mapping.
pub(crate) fn read(mapping: &OwnedMapping, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < into.len() {
        let remote = remote(mapping, offset, done, into.len());
        match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut into[done..])], &[remote])
            .map_err(Errno::of)
        {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(read) => done += read,
            Err(refused @ (Errno::EPERM | Errno::ENOSYS)) => {
                return read_through_file(remote.base, &mut into[done..], refused);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Lets the kernel copy bytes into an owned mapping.
pub(crate) fn write(mapping: &OwnedMapping, offset: u64, from: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < from.len() {
        let remote = remote(mapping, offset, done, from.len());
        match process_vm_writev(Pid::this(), &[IoSlice::new(&from[done..])], &[remote]).map_err(Errno::of) {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(written) => done += written,
            Err(refused @ (Errno::EPERM | Errno::ENOSYS)) => {
                return write_through_file(remote.base, &from[done..], refused);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The fallback for containers whose seccomp profile forbids `process_vm_readv(2)`, which has
/// answered `refused`.
fn read_through_file(address: usize, into: &mut [u8], refused: Errno) -> Result<(), Errno> {
    let memory = File::open(OWN_MEMORY).map_err(|_| refused)?;
    memory.read_exact_at(into, address as u64).map_err(|_| Errno::EFAULT)
}

fn write_through_file(address: usize, from: &[u8], refused: Errno) -> Result<(), Errno> {
    let memory = File::options().write(true).open(OWN_MEMORY).map_err(|_| refused)?;
    memory.write_all_at(from, address as u64).map_err(|_| Errno::EFAULT)
}

fn remote(mapping: &OwnedMapping, offset: u64, done: usize, len: usize) -> RemoteIoVec {
    let start = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(done));
    let start =
        start.filter(|start| mapping.bytes().checked_sub(*start).is_some_and(|left| len - done <= left));
    let start = start.expect("inside the mapping");
    RemoteIoVec { base: mapping.at(start).addr().get(), len: len - done }
}

/// Copies from `from` into `into`, with one access for each word, in order, because a device may be
/// behind the memory. Accesses are of eight bytes where they are aligned, and of one byte
/// elsewhere.
///
/// # Safety
///
/// - `from` is readable for `into.len()` bytes. Concurrent writes to them are allowed: the copy may
///   be torn.
#[expect(unsafe_code, reason = "reads through a raw pointer")]
pub(crate) unsafe fn read_words(from: *const u8, into: &mut [u8]) {
    let mut done = 0;
    while done < into.len() {
        // SAFETY: `done` is less than `into.len()`, so the address is inside the readable bytes.
        let next = unsafe { from.add(done) };
        if next.cast::<u64>().is_aligned() && into.len() - done >= WORD {
            // SAFETY: aligned, and inside the readable bytes: at least eight are left.
            let word = unsafe { ptr::read_volatile(next.cast::<u64>()) };
            into[done..done + WORD].copy_from_slice(&word.to_ne_bytes());
            done += WORD;
        } else {
            // SAFETY: inside the readable bytes: at least one is left.
            into[done] = unsafe { ptr::read_volatile(next) };
            done += 1;
        }
    }
}

/// Copies from `from` to `to`, likewise.
///
/// # Safety
///
/// - `to` is writable for `from.len()` bytes, and no reference to them exists.
#[expect(unsafe_code, reason = "writes through a raw pointer")]
pub(crate) unsafe fn write_words(to: *mut u8, from: &[u8]) {
    let mut done = 0;
    while done < from.len() {
        // SAFETY: `done` is less than `from.len()`, so the address is inside the writable bytes.
        let next = unsafe { to.add(done) };
        match from[done..].first_chunk::<WORD>() {
            Some(&word) if next.cast::<u64>().is_aligned() => {
                // SAFETY: aligned, and inside the writable bytes, to which no reference exists: at
                // least eight are left.
                unsafe { ptr::write_volatile(next.cast::<u64>(), u64::from_ne_bytes(word)) };
                done += WORD;
            }
            _ => {
                // SAFETY: inside the writable bytes, to which no reference exists: at least one is
                // left.
                unsafe { ptr::write_volatile(next, from[done]) };
                done += 1;
            }
        }
    }
}

const WORD: usize = size_of::<u64>();
/// The memory of this process as a file; the offset is the address.
const OWN_MEMORY: &str = "/proc/self/mem";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn read_words_and_write_words_copy_every_byte_and_no_other(start in 0usize..20, len in 0usize..60) {
            let from: Vec<u8> = (1..=100).collect();
            let (mut there, mut back) = (vec![0u8; 100], vec![0u8; len]);
            // SAFETY: start + len is below 100.
            #[expect(unsafe_code, reason = "the function under test")]
            unsafe { read_words(from.as_ptr().wrapping_add(start), &mut back) };
            prop_assert_eq!(&back[..], &from[start..start + len]);
            // SAFETY: start + len is below 100, and no reference to `there` exists meanwhile.
            #[expect(unsafe_code, reason = "the function under test")]
            unsafe { write_words(there.as_mut_ptr().wrapping_add(start), &back) };
            prop_assert_eq!(&there[start..start + len], &from[start..start + len]);
            prop_assert!(there[..start].iter().chain(&there[start + len..]).all(|&byte| byte == 0));
        }
    }
}
