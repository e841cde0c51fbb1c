//! The errors of sources become errors of the library by `?`, and those become I/O errors.

use crate::PAGE;
use pagestitch::source::{
    AliasError, FileError, FileSource, Pages, PagesError, PhysicalError, SharedFile, UnsealedMemfd,
};
use pagestitch::{Access, Chunk, Error, ErrorKind, Pool, Region, Source};
use pagestitch_kernel::physical::Refusal;
use pagestitch_kernel::{Errno, PageSize};
use pagestitch_testkit::scripted::Scripted;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;

/// The error as the library has it.
fn converted<T, E: Into<Error>>(made: Result<T, E>) -> Error {
    made.err().expect("it cannot be made").into()
}

fn facts(error: &Error) -> (ErrorKind, Option<i32>, Option<&Path>) {
    (error.kind(), error.raw_os_error(), error.path())
}

#[test]
fn a_file_that_cannot_be_opened_is_the_same_error_for_each_source() {
    let path = Path::new("/missing/file");
    for error in [converted(FileSource::open(path)), converted(SharedFile::open(path, Access::ReadOnly))] {
        assert_eq!(facts(&error), (ErrorKind::Io, Some(ENOENT), Some(path)), "{error}");
        assert_eq!(error.io_error().map(io::Error::kind), Some(io::ErrorKind::NotFound));
    }
    let folder = Path::new("/");
    for error in [converted(FileSource::open(folder)), converted(SharedFile::open(folder, Access::ReadOnly))]
    {
        assert_eq!(facts(&error), (ErrorKind::UnusableFile, None, Some(folder)), "{error}");
    }
}

#[test]
fn errors_of_memfds_pages_and_memory_have_a_kind_to_act_on() {
    let empty = UnsealedMemfd::create("empty", 0).unwrap();
    assert_eq!(converted(SharedFile::try_from(&empty)).kind(), ErrorKind::UnusableFile);
    assert_eq!(converted(SharedFile::try_from(File::open("/").unwrap())).kind(), ErrorKind::UnusableFile);
    assert_eq!(facts(&converted(UnsealedMemfd::create("a\0b", 1))), (ErrorKind::Io, Some(EINVAL), None));
    let errors: [(Error, ErrorKind); 8] = [
        (converted(Pages::new(0)), ErrorKind::InvalidOption),
        (converted(Pages::new(usize::MAX)), ErrorKind::OutOfMemory),
        (PagesError { bytes: 1, errno: Errno::EMFILE }.into(), ErrorKind::LimitReached),
        (AliasError::Private { address: 4096 }.into(), ErrorKind::UnusableMemory),
        (
            AliasError::Unaligned { start: 1, bytes: 1, page: PageSize::system() }.into(),
            ErrorKind::UnusableMemory,
        ),
        (AliasError::Refused { start: 0, bytes: 1, errno: Errno::EPERM }.into(), ErrorKind::PermissionDenied),
        (refused(Refusal::Lockdown), ErrorKind::PermissionDenied),
        (refused(Refusal::SystemRam(String::from("System RAM"))), ErrorKind::UnusableMemory),
    ];
    for (error, kind) in errors {
        assert_eq!(error.kind(), kind, "{error}");
    }
}

fn refused(refusal: Refusal) -> Error {
    PhysicalError { name: String::from("physical 0x0..0x1000"), refusal }.into()
}

#[test]
fn an_io_error_keeps_the_kind_and_the_error() {
    let region = Region::builder().chunk("text").build(&Pool::new().unwrap()).unwrap();
    let outside = region.populate(5..).unwrap_err();
    let texts = outside.to_string();
    let error = io::Error::from(outside);
    assert_eq!((error.kind(), error.to_string()), (io::ErrorKind::InvalidInput, texts));
    let back = Error::from(error);
    assert_eq!(back.kind(), ErrorKind::OutOfRange);

    let missing = io::Error::from(FileSource::open("/missing").unwrap_err());
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    let error = SharedFile::open("/missing", Access::ReadOnly).unwrap_err();
    assert_eq!(io::Error::from(error).raw_os_error(), Some(ENOENT));
    assert_eq!(io::Error::from(Pages::new(0).unwrap_err()).raw_os_error(), Some(EINVAL));
    let stored = FileError { path: "/x".into(), error: io::ErrorKind::StorageFull.into() };
    assert_eq!(io::Error::from(Error::from(stored)).kind(), io::ErrorKind::StorageFull);
}

/// A source that reads another region, and returns its errors by `?`.
struct Above(Region);

impl Source for Above {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        Ok(self.0.read_at(offset, into)?)
    }
}

#[test]
fn the_error_of_a_region_below_is_the_error_of_a_source() {
    let broken = Scripted::new(2 * PAGE as u64).failing(0..1);
    let pool = || Pool::new().unwrap();
    let below = Region::builder().chunk(Chunk::source(Arc::new(broken))).build(&pool()).unwrap();
    let above = Region::builder().chunk(Chunk::source(Arc::new(Above(below)))).build(&pool()).unwrap();
    let error = above.populate(..).unwrap_err();
    let inner = error.io_error().and_then(io::Error::get_ref).and_then(|inner| inner.downcast_ref::<Error>());
    assert_eq!(inner.expect("the error of the region below").kind(), ErrorKind::SourceFailed);
    above.populate(PAGE as u64..).unwrap();
}
