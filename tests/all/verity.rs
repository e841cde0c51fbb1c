//! Files with fs-verity: a slice without a promise, and never other bytes than those of their hashes.
//!
//! `PAGESTITCH_VERITY` names a folder on a file system with fs-verity. Otherwise the folder of temporary
//! files is tried.

use crate::immutable::file_in;
use crate::{PAGE, pattern, reason};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use pagestitch::source::{FailureReason, ImmutableFile};
use pagestitch::{Chunk, Error, ErrorKind, PlanReason, Pool, Region};
use pagestitch_kernel::{Features, Support};
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// A file of these bytes where fs-verity may be, which is not enabled yet. Its bytes are on the disk.
fn unprotected(bytes: &[u8]) -> TempPath {
    let folder = std::env::var_os("PAGESTITCH_VERITY").map_or_else(std::env::temp_dir, PathBuf::from);
    let file = file_in(&folder, bytes);
    file.as_file().sync_all().unwrap();
    file.into_temp_path()
}

/// Enables fs-verity for a file. False if its file system has none.
fn protect(path: &Path) -> bool {
    let errno = match enable_verity(&File::open(path).unwrap()) {
        Ok(()) => return true,
        Err(errno) => errno,
    };
    let required = std::env::var_os("PAGESTITCH_VERITY").is_some();
    assert!(!required, "PAGESTITCH_VERITY names {}, without fs-verity: {errno}", path.display());
    println!(
        "SKIPPED: no fs-verity in {} ({errno}): PAGESTITCH_VERITY names a folder that has it",
        path.display()
    );
    false
}

/// Enables fs-verity for a file that is not open for writing.
#[expect(unsafe_code, reason = "ioctl")]
fn enable_verity(file: &File) -> nix::Result<()> {
    /// `struct fsverity_enable_arg`: version 1, SHA-256, blocks of a page, no salt, no signature.
    #[repr(C)]
    struct Enable {
        words: [u32; 4],
        rest: [u64; 14],
    }
    let enable = Enable { words: [1, 1, PAGE as u32, 0], rest: [0; 14] };
    // SAFETY: the kernel reads the 128 bytes of the structure, which name no other memory.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), 0x4080_6685, &raw const enable) };
    nix::errno::Errno::result(answer).map(drop)
}

#[test]
fn a_file_with_fs_verity_is_a_slice_without_a_promise() {
    let bytes = pattern(10, 4 * PAGE + 10);
    let path = unprotected(&bytes);
    if !protect(&path) {
        return;
    }
    assert!(File::options().write(true).open(&path).is_err(), "the kernel refuses writers");
    let builder = Region::builder().chunk(ImmutableFile::open_verity(&path).unwrap()).require_zero_copy();
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    assert!(region.as_slice() == bytes);
    let plan = region.plan();
    assert_eq!(plan.runs()[0].reason, PlanReason::MappedByVerity, "{plan}");
    println!("{plan}");
}

/// The block device below a folder, open for writing. Only the superuser has it.
fn device_of(path: &Path) -> Option<File> {
    let folder = path.parent()?.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mounted = mounts.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        Some((mount.split(' ').nth(4)?, file_system.split(' ').nth(1)?))
    });
    let below = mounted.filter(|(at, _)| folder.starts_with(at));
    let (_, device) = below.max_by_key(|(at, _)| at.len())?;
    File::options().read(true).write(true).open(device).ok()
}

/// The place on its device, in bytes, of a page of a file. `None` if the file system does not tell.
#[expect(unsafe_code, reason = "ioctl")]
fn place_on_device(file: &File, page: i32) -> Option<u64> {
    let (mut block_bytes, mut block) = (0, page);
    // SAFETY: the kernel writes one `int`.
    let sized = unsafe { libc::ioctl(file.as_raw_fd(), FIGETBSZ, &raw mut block_bytes) };
    // SAFETY: the kernel reads one `int`, and writes another in its place.
    let mapped = unsafe { libc::ioctl(file.as_raw_fd(), FIBMAP, &raw mut block) };
    let told = sized == 0 && mapped == 0 && block_bytes == PAGE as i32 && block > 0;
    told.then_some(block as u64 * PAGE as u64)
}

const FIGETBSZ: libc::Ioctl = 2;
const FIBMAP: libc::Ioctl = 1;

/// Changes a byte of a page on the disk, behind the file system. False where the test must not.
fn corrupt(path: &Path, page: i32) -> bool {
    // Only a disk that is there for the tests.
    let own = std::env::var_os("PAGESTITCH_VERITY").is_some();
    let file = File::open(path).unwrap();
    let place = || Some((device_of(path)?, place_on_device(&file, page)?));
    let Some((device, place)) = own.then(place).flatten() else { return false };
    let mut byte = [0];
    device.read_exact_at(&mut byte, place).unwrap();
    device.write_all_at(&[!byte[0]], place).unwrap();
    device.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    true
}

/// The error of a page whose hash is wrong: the kernel's answer to a read of it.
fn assert_wrong_hash(error: &Error) {
    assert_eq!((error.kind(), reason(error)), (ErrorKind::SourceFailed, FailureReason::Source), "{error}");
    let failure = error.failure().unwrap();
    assert_eq!(failure.io_error().raw_os_error(), Some(libc::EIO), "{error}");
}

#[test]
fn a_page_with_a_wrong_hash_of_fs_verity_has_no_bytes() {
    let bytes = pattern(12, 5 * PAGE);
    let path = unprotected(&bytes);
    if !protect(&path) {
        return;
    }
    if !corrupt(&path, 2) {
        return println!("SKIPPED: the blocks of {} cannot be written", path.display());
    }
    in_place(this_test!(), &path, &bytes);
    if Support::current().has(Features::POISON) {
        copied(&path, &bytes);
    }
}

/// The page shown in place: a read and `populate` are errors, and a touch is a signal.
fn in_place(test: &str, path: &Path, bytes: &[u8]) {
    let builder = Region::builder().chunk(ImmutableFile::open_verity(path).unwrap()).require_zero_copy();
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    let mut read = vec![0; 2 * PAGE];
    assert_wrong_hash(&region.read_at(PAGE as u64, &mut read).unwrap_err());
    region.read_at(3 * PAGE as u64, &mut read).unwrap();
    assert!(read == bytes[3 * PAGE..]);
    assert!(region.as_slice()[..2 * PAGE] == bytes[..2 * PAGE]);
    assert_wrong_hash(&region.populate(..).unwrap_err());
    let end = child::run(test, || {
        std::hint::black_box(region.as_slice()[2 * PAGE]);
    });
    assert_eq!(end.signal(), Some(libc::SIGBUS), "{}", end.output());
}

/// The page copied, because it does not lie at the same place in a page.
fn copied(path: &Path, bytes: &[u8]) {
    let file = Chunk::from(ImmutableFile::open_verity(path).unwrap());
    let builder = Region::builder().chunk(vec![1u8; 10]).chunk(file);
    let region = builder.build(&Pool::new().unwrap()).unwrap();
    assert_wrong_hash(&region.populate(..).unwrap_err());
    assert_wrong_hash(&region.read_at(10 + 2 * PAGE as u64, &mut [0]).unwrap_err());
    assert!(region.as_slice()[10..PAGE] == bytes[..PAGE - 10]);
}
