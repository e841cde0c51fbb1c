//! Sources that C implements.

use crate::call::{self, CallError};
use crate::handle;
use std::ffi::{c_char, c_int, c_void};
use std::io;
use std::mem::offset_of;
use std::ptr::NonNull;

/// A source that the program implements. Any thread calls its functions, several at once. They are callbacks: see the
/// top.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Source {
    /// sizeof(ps_source).
    pub size: usize,
    /// Passed to each function.
    pub ctx: *mut c_void,
    /// The number of bytes that it has.
    pub bytes: u64,
    /// Fills `count` bytes at `into` with those from `offset` on. Returns 0, or an errno if not all of them can be
    /// had: a touch of the page is then SIGBUS.
    pub read_at:
        Option<extern "C" fn(ctx: *mut c_void, offset: u64, into: *mut c_void, count: usize) -> c_int>,
    /// Called once, when no region uses the source any more, and never in a forked child. May be NULL.
    pub release: Option<extern "C" fn(ctx: *mut c_void)>,
    /// The preferred size of a read in bytes, for compressed or remote sources. 0: no preference.
    pub granularity: u64,
    /// The name in errors and plans. May be NULL.
    pub name: *const c_char,
}

/// The size of the struct's first version, which ends with this field. Later versions have their fields behind it.
const FIRST_SOURCE: usize = offset_of!(Source, name) + size_of::<*const c_char>();
#[cfg(target_pointer_width = "64")]
const _: () = assert!(FIRST_SOURCE == 56 && offset_of!(Source, read_at) == 24, "an ABI stays");

const NO_SOURCE: Source = Source {
    size: 0,
    ctx: std::ptr::null_mut(),
    bytes: 0,
    read_at: None,
    release: None,
    granularity: 0,
    name: std::ptr::null(),
};

/// A source of C, as the library calls it. It is released when it is dropped.
#[derive(Debug)]
pub(crate) struct CSource {
    ctx: Option<NonNull<c_void>>,
    bytes: u64,
    read_at: extern "C" fn(*mut c_void, u64, *mut c_void, usize) -> c_int,
    release: Option<extern "C" fn(*mut c_void)>,
    granularity: u64,
    name: String,
    /// The process that releases it.
    process: u32,
}

// SAFETY: the header asks that the functions may be called with `ctx` from any thread.
unsafe impl Send for CSource {}
// SAFETY: the header asks that several threads may call the functions at once.
unsafe impl Sync for CSource {}

impl CSource {
    pub(crate) fn read(source: *const Source) -> Result<Self, CallError> {
        // SAFETY: all fields are integers, pointers and optional functions.
        let source = unsafe { handle::sized(source, NO_SOURCE, FIRST_SOURCE, "ps_source") }?;
        let read_at = source.read_at.ok_or_else(|| {
            CallError::argument("the field `read_at` of ps_source is NULL: set it to a function")
        })?;
        let name = match source.name.is_null() {
            true => String::from("source"),
            false => {
                handle::text(source.name, "the field `name` of ps_source")?.to_string_lossy().into_owned()
            }
        };
        let Source { ctx, bytes, release, granularity, .. } = source;
        let (ctx, granularity, process) = (NonNull::new(ctx), granularity.max(1), std::process::id());
        Ok(Self { ctx, bytes, read_at, release, granularity, name, process })
    }

    fn ctx(&self) -> *mut c_void {
        self.ctx.map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }
}

impl pagestitch::Source for CSource {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let (start, count) = (into.as_mut_ptr().cast(), into.len());
        match call::callback(|| (self.read_at)(self.ctx(), offset, start, count)) {
            0 => Ok(()),
            errno if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
            other => {
                Err(io::Error::other(format!("read_at returned {other}: return 0, or an errno above 0")))
            }
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn granularity(&self) -> u64 {
        self.granularity
    }
}

impl Drop for CSource {
    fn drop(&mut self) {
        // A forked child has a copy of the source: the parent still uses it.
        let release = self.release.filter(|_| self.process == std::process::id());
        if let Some(release) = release {
            release(self.ctx());
        }
    }
}
