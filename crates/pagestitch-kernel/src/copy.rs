//! Copies of bytes that other code may change meanwhile, without a reference to them. The kernel
//! copies: it has no data races, and an unreadable page is an error. It does not copy `/dev/mem` or
//! a device's memory; there, volatile accesses do.

use crate::errno::Errno;
use crate::mapping::OwnedMapping;
use nix::fcntl::OFlag;
use nix::libc::{self, c_void};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::{self, Pid, pipe2};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

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
///
/// It pins the frames of some pages and then writes to them. A page with a pinned frame does not move,
/// but a scan for written pages arms it, so that the caller has to know of scans meanwhile.
pub(crate) fn write(mapping: &OwnedMapping, offset: u64, from: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < from.len() {
        let remote = remote(mapping, offset, done, from.len());
        match process_vm_writev(Pid::this(), &[IoSlice::new(&from[done..])], &[remote]).map_err(Errno::of) {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(written) => done += written,
            Err(refused @ (Errno::EPERM | Errno::ENOSYS)) => {
                return store_through_pipe(place(mapping, offset, done, from.len()), &from[done..], refused);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The fallback for containers whose seccomp profile forbids `process_vm_writev(2)`, which has answered
/// `refused`. Stores bytes to an owned mapping, from `to` on.
///
/// `read(2)` stores as a thread of the program does, through the page table. A write to `/proc/self/mem`
/// does not: it takes the frame of a page without a pin, so that the page can move away before the bytes
/// are in the frame, and it ignores the protection of the page.
#[cold]
fn store_through_pipe(to: NonNull<c_void>, from: &[u8], refused: Errno) -> Result<(), Errno> {
    let (output, input) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .map_err(|errno| of_fallback(Errno::of(errno), refused))?;
    let (mut to, mut rest) = (to.as_ptr(), from);
    while !rest.is_empty() {
        // As many bytes as the pipe has room for.
        let mut inside = unistd::write(&input, rest).map_err(Errno::of)?;
        rest = &rest[inside..];
        while inside > 0 {
            // SAFETY: from `to` on, an owned mapping has room for the bytes of the pipe, and its owner
            // allows writes. Where a page is not mapped for writing, the answer is EFAULT. Not the
            // function of the C library, which sanitizers take for a plain write: a race is defined here.
            #[expect(unsafe_code, reason = "the kernel stores through a raw pointer")]
            let stored = unsafe { libc::syscall(libc::SYS_read, output.as_raw_fd(), to, inside) };
            let stored = usize::try_from(Errno::result(stored)?).unwrap_or(0);
            inside -= stored;
            to = to.wrapping_byte_add(stored);
        }
    }
    Ok(())
}

/// The fallback for containers whose seccomp profile forbids `process_vm_readv(2)`, which has
/// answered `refused`.
fn read_through_file(address: usize, into: &mut [u8], refused: Errno) -> Result<(), Errno> {
    let memory = File::open(OWN_MEMORY).map_err(|error| of_fallback(Errno::of(error), refused))?;
    memory.read_exact_at(into, address as u64).map_err(|_| Errno::EFAULT)
}

/// The error where the fallback of a refused call fails: a lack of descriptors or memory has another remedy
/// than the refusal.
fn of_fallback(errno: Errno, refused: Errno) -> Errno {
    if errno.is_transient() { errno } else { refused }
}

fn remote(mapping: &OwnedMapping, offset: u64, done: usize, len: usize) -> RemoteIoVec {
    RemoteIoVec { base: place(mapping, offset, done, len).addr().get(), len: len - done }
}

/// The address of the byte at `done` of a range of `len` bytes, which lies inside the mapping.
fn place(mapping: &OwnedMapping, offset: u64, done: usize, len: usize) -> NonNull<c_void> {
    let start = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(done));
    let start =
        start.filter(|start| mapping.bytes().checked_sub(*start).is_some_and(|left| len - done <= left));
    mapping.at(start.expect("inside the mapping"))
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
