//! The description of a region: its chunks and options.

use crate::budget::Budget;
use crate::call::{self, CallError};
use crate::handle::{self, Handle};
use crate::names::in_c;
use crate::ranges::{Extent, PS_TO_END, Piece};
use crate::region::Region;
use crate::server::Server;
use crate::source::{CSource, Source};
use pagestitch::source::{Alias, Caching, FileSource, Physical, SharedFile};
use pagestitch::{Access, Chunk, IntoChunk};
use std::ffi::{CString, c_char, c_int, c_void};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Describes a region: chunks, which lie end to end in the order in which they are added, and options.
#[derive(Debug)]
pub struct Builder {
    description: Mutex<Description>,
}

#[derive(Debug, Default)]
struct Description {
    builder: pagestitch::Builder,
    writable: bool,
}

impl Handle for Builder {
    const NAME: &'static str = "builder";
}

impl Builder {
    fn new() -> Self {
        Self { description: Mutex::default() }
    }

    /// Changes the description, as a call of C asks.
    fn change(&self, change: impl FnOnce(pagestitch::Builder) -> pagestitch::Builder) {
        let mut description = self.locked();
        description.builder = change(mem::take(&mut description.builder));
    }

    fn add(&self, chunk: impl IntoChunk) -> Result<(), CallError> {
        let chunk = chunk.into_chunk()?;
        self.change(|builder| builder.chunk(chunk));
        Ok(())
    }

    fn access(&self) -> Access {
        if self.locked().writable { Access::Writable } else { Access::ReadOnly }
    }

    fn locked(&self) -> MutexGuard<'_, Description> {
        self.description.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_writable(&self) {
        self.change(pagestitch::Builder::writable);
        self.locked().writable = true;
    }

    /// Builds the region. The builder is empty afterwards.
    fn build(&self, server: &Server) -> Result<Region, CallError> {
        let Description { builder, writable } = mem::take(&mut *self.locked());
        Ok(Region::new(builder.build_shared(server.of_builder())?, writable))
    }
}

fn range_of(chunk: Chunk, extent: Extent) -> Result<Chunk, CallError> {
    if extent.bytes == PS_TO_END {
        return Ok(chunk.range(extent.offset..));
    }
    let end = extent.offset.checked_add(extent.bytes);
    let end = end.ok_or_else(|| {
        CallError::argument(format_args!(
            "{} bytes from offset {} on reach 2^64, and no file does: PS_TO_END stands for the end of the file",
            extent.bytes, extent.offset
        ))
    })?;
    Ok(chunk.range(extent.offset..end))
}

/// Starts a description.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_new(builder: *mut *mut Builder) -> c_int {
    call::status("ps_builder_new", || Builder::new().give(builder))
}

/// Gives a description up. NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_free(builder: *mut Builder) -> c_int {
    call::status("ps_builder_free", || Builder::free(builder).map(drop))
}

/// Names the region in errors and plans.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_name(builder: *mut Builder, name: *const c_char) -> c_int {
    call::status("ps_builder_name", || {
        let name = handle::text(name, "the name")?.to_string_lossy();
        Builder::borrow(builder)?.change(|builder| builder.name(name));
        Ok(())
    })
}

/// Allows writes to the region, by ps_region_write() and through ps_region_data_mut(). Sources in memory and files
/// that are not in place stay as they are.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_writable(builder: *mut Builder) -> c_int {
    call::status("ps_builder_writable", || {
        Builder::borrow(builder)?.make_writable();
        Ok(())
    })
}

/// Starts each later chunk in a page of its own. A part of a file in place keeps its offset within the page, so that
/// its pages can be shown: ps_region_offset_of() tells where a chunk starts. Bytes between chunks are zeros, and beside
/// a part in place those of the file: ps_region_write() refuses to change them, and a write by pointer changes the file.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_page_aligned(builder: *mut Builder) -> c_int {
    call::status("ps_builder_page_aligned", || {
        Builder::borrow(builder)?.change(pagestitch::Builder::page_aligned);
        Ok(())
    })
}

/// Makes a byte that would have to be copied an error of the build.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_require_zero_copy(builder: *mut Builder) -> c_int {
    call::status("ps_builder_require_zero_copy", || {
        Builder::borrow(builder)?.change(pagestitch::Builder::require_zero_copy);
        Ok(())
    })
}

/// Bounds the memory of the region, which is only read then. The sources are read again for pages that have left, and
/// must have the same bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_budget(builder: *mut Builder, budget: *const Budget) -> c_int {
    call::status("ps_builder_budget", || {
        let budget = &Budget::borrow(budget)?.budget;
        Builder::borrow(builder)?.change(|builder| builder.budget(budget));
        Ok(())
    })
}

/// Gives forked children the region, with pages of their own. Without it, its addresses are inaccessible there. Needs
/// ps_server_pool(), CAP_SYS_PTRACE and Linux 6.6.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_inherit_on_fork(builder: *mut Builder) -> c_int {
    call::status("ps_builder_inherit_on_fork", || {
        Builder::borrow(builder)?.change(pagestitch::Builder::inherit_on_fork);
        Ok(())
    })
}

/// Has the kernel record which pages are written, for ps_region_changes(). Needs Linux 6.7.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_track_changes(builder: *mut Builder) -> c_int {
    call::status("ps_builder_track_changes", || {
        Builder::borrow(builder)?.change(pagestitch::Builder::track_changes);
        Ok(())
    })
}

/// Reserves addresses for so many bytes, so that ps_region_append() can add memory later. Not with ps_server_eager().
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_capacity(builder: *mut Builder, bytes: u64) -> c_int {
    call::status("ps_builder_capacity", || {
        Builder::borrow(builder)?.change(|builder| builder.capacity(bytes));
        Ok(())
    })
}

/// Has `tell` called for each page whose bytes cannot be had, with its offset in the region and the reason, which is
/// valid until `tell` returns. `ctx` stays valid until the region is freed, or the builder if it builds none. The
/// thread that has tried to fill the page calls `tell`: one of the library, that of ps_region_populate(),
/// ps_region_read(), ps_server_serve() or ps_builder_build(), or with ps_server_inline() the touching thread in its
/// handler of SIGBUS. So `tell` waits for no lock that the program holds in such a call. It is a callback: see the top.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_on_page_failure(
    builder: *mut Builder,
    tell: Option<extern "C" fn(ctx: *mut c_void, offset: u64, reason: *const c_char)>,
    ctx: *mut c_void,
) -> c_int {
    call::status("ps_builder_on_page_failure", || {
        let tell = tell.ok_or_else(|| CallError::argument("the function is NULL: pass one"))?;
        let ctx = Context(ctx);
        Builder::borrow(builder)?.change(|builder| {
            builder.on_page_failure(move |offset, failure| {
                let reason = in_c(&failure.to_string()).replace('\0', "?");
                let reason = CString::new(reason).unwrap_or_default();
                call::callback(|| tell(ctx.pointer(), offset, reason.as_ptr()));
            })
        });
        Ok(())
    })
}

/// The pointer that a function of C is called with.
struct Context(*mut c_void);

impl Context {
    const fn pointer(&self) -> *mut c_void {
        self.0
    }
}

// SAFETY: the header says that any thread may call the function with this pointer.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Adds a piece of memory. The program keeps it valid and unchanged until the region is freed.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_memory(builder: *mut Builder, start: *const c_void, bytes: usize) -> c_int {
    call::status("ps_add_memory", || Builder::borrow(builder)?.add(Piece { start, bytes }.memory()?))
}

/// Adds a part of a file, which is read on first touch. `bytes` may be PS_TO_END.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_file(builder: *mut Builder, path: *const c_char, offset: u64, bytes: u64) -> c_int {
    call::status("ps_add_file", || {
        let file = FileSource::open(handle::path(path)?)?;
        Builder::borrow(builder)?.add(range_of(file.into(), Extent { offset, bytes })?)
    })
}

/// Adds a part of a file, whose whole pages are shown in place: without a copy, and with all later changes of
/// the file. `bytes` may be PS_TO_END. Call ps_builder_writable() before it to write to the file through the region.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_file_in_place(
    builder: *mut Builder,
    path: *const c_char,
    offset: u64,
    bytes: u64,
) -> c_int {
    call::status("ps_add_file_in_place", || {
        let builder = Builder::borrow(builder)?;
        let file = SharedFile::open(handle::path(path)?, builder.access())?;
        builder.add(range_of(file.into(), Extent { offset, bytes })?)
    })
}

/// As ps_add_file_in_place(), for an open file or memfd. The descriptor is duplicated.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_fd(builder: *mut Builder, fd: c_int, offset: u64, bytes: u64) -> c_int {
    call::status("ps_add_fd", || {
        Builder::borrow(builder)?.add(range_of(shared(fd)?.into(), Extent { offset, bytes })?)
    })
}

fn shared(fd: c_int) -> Result<Arc<SharedFile>, CallError> {
    Ok(Arc::new(SharedFile::try_from(handle::duplicate(fd)?)?))
}

/// Adds zeros.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_hole(builder: *mut Builder, bytes: u64) -> c_int {
    call::status("ps_add_hole", || Builder::borrow(builder)?.add(Chunk::hole(bytes)))
}

/// Adds a source that the program implements. The struct is copied. Its function `release` is called also if this
/// call fails, unless the struct is refused: if its pointer, `size`, `read_at` or `name` is wrong.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_source(builder: *mut Builder, source: *const Source) -> c_int {
    call::status("ps_add_source", || {
        // First, because the library releases the source if the builder is refused.
        let source = CSource::read(source)?;
        Builder::borrow(builder)?.add(Chunk::source(Arc::new(source)))
    })
}

/// Adds memory of a shared mapping of this process, in whole pages, whatever file it shows: without a copy. The region
/// has a mapping of its own, so that the program may unmap its one.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_alias(builder: *mut Builder, start: *const c_void, bytes: usize) -> c_int {
    call::status("ps_add_alias", || {
        let builder = Builder::borrow(builder)?;
        let (start, bytes) = Piece { start, bytes }.checked()?;
        // SAFETY: the caller passes memory of its own, which other code may change: a region of this
        // library is read through raw pointers.
        let alias = unsafe { Alias::of(start, bytes) }?;
        builder.add(alias)
    })
}

/// Adds physical memory, through /dev/mem: `address` and `bytes` are whole pages. The program vouches that reads of it
/// (and writes, after ps_builder_writable()) disturb neither the kernel nor a device: it is reserved memory, or that
/// of a device that allows accesses of any size.
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_physical(builder: *mut Builder, address: u64, bytes: u64) -> c_int {
    call::status("ps_add_physical", || {
        let builder = Builder::borrow(builder)?;
        let end = address.checked_add(bytes);
        let end = end.ok_or_else(|| {
            CallError::argument(format_args!(
                "{bytes} bytes from {address:#x} on reach 2^64, and no memory does"
            ))
        })?;
        // SAFETY: the caller vouches for accesses of this range, as the header says.
        let physical = unsafe { Physical::dev_mem(address..end, builder.access(), Caching::Cached) }?;
        builder.add(physical)
    })
}

/// Adds the page frames behind private memory of this process, found by pagemap and mapped through /dev/mem, in whole
/// pages: without a copy. The frames are pinned. Until the region is freed, the program keeps the memory mapped where it
/// is: no munmap(), no MADV_DONTNEED, no mapping over it. Most kernels refuse it (CONFIG_STRICT_DEVMEM).
#[unsafe(no_mangle)]
pub extern "C" fn ps_add_frames(builder: *mut Builder, start: *const c_void, bytes: usize) -> c_int {
    call::status("ps_add_frames", || {
        let builder = Builder::borrow(builder)?;
        let (start, bytes) = Piece { start, bytes }.checked()?;
        // SAFETY: the caller passes memory of its own, which stays mapped until the region is freed, as the header
        // says. Programs of C have no references of Rust to it.
        let frames = unsafe { Physical::own_memory(start, bytes, builder.access()) }?;
        frames.into_iter().try_for_each(|part| builder.add(part))
    })
}

/// Builds the region. The builder is empty afterwards, also after an error, and can be used again.
#[unsafe(no_mangle)]
pub extern "C" fn ps_builder_build(
    builder: *mut Builder,
    server: *const Server,
    region: *mut *mut Region,
) -> c_int {
    call::status("ps_builder_build", || {
        handle::place(region, "the place for the region")?;
        Builder::borrow(builder)?.build(Server::borrow(server)?)?.give(region)
    })
}

/// Shows pieces of memory as one, read-only: a page is copied from its pieces when it is first touched. The program
/// keeps the pieces valid and unchanged until the region is freed.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_of_pieces(
    server: *const Server,
    pieces: *const Piece,
    count: usize,
    region: *mut *mut Region,
) -> c_int {
    call::status("ps_region_of_pieces", || {
        let pieces = Listed { noun: "piece", elements: handle::list(pieces, count, "the list", "pieces")? };
        stitched(server, region, &pieces, |builder, piece| builder.add(piece.memory()?))
    })
}

/// Shows parts of a memfd (or a file) as one, writable: the same memory, without a copy. Each part is whole pages.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_of_memfd(
    server: *const Server,
    fd: c_int,
    parts: *const Extent,
    count: usize,
    region: *mut *mut Region,
) -> c_int {
    call::status("ps_region_of_memfd", || {
        let file = shared(fd)?;
        let parts = Listed { noun: "part", elements: handle::list(parts, count, "the list", "parts")? };
        stitched(server, region, &parts, |builder, part| {
            builder.make_writable();
            builder.change(pagestitch::Builder::require_zero_copy);
            builder.add(range_of(Arc::clone(&file).into(), part)?)
        })
    })
}

/// Shows pieces of memory as one, read-only: the same page frames, by pagemap and /dev/mem, without a copy. Each
/// piece is whole pages. As ps_add_frames().
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_of_frames(
    server: *const Server,
    pieces: *const Piece,
    count: usize,
    region: *mut *mut Region,
) -> c_int {
    call::status("ps_region_of_frames", || {
        let pieces = Listed { noun: "piece", elements: handle::list(pieces, count, "the list", "pieces")? };
        stitched(server, region, &pieces, |builder, piece| {
            let (start, bytes) = piece.checked()?;
            // SAFETY: as in `ps_add_frames`.
            let frames = unsafe { Physical::own_memory(start, bytes, Access::ReadOnly) }?;
            frames.into_iter().try_for_each(|part| builder.add(part))
        })
    })
}

/// A list of C, and the word for one of its elements.
struct Listed<'call, T> {
    noun: &'static str,
    elements: &'call [T],
}

/// A region of a list, in one call.
fn stitched<T: Copy>(
    server: *const Server,
    region: *mut *mut Region,
    list: &Listed<'_, T>,
    add: impl Fn(&Builder, T) -> Result<(), CallError>,
) -> Result<(), CallError> {
    handle::place(region, "the place for the region")?;
    let (server, builder) = (Server::borrow(server)?, Builder::new());
    for (number, &element) in list.elements.iter().enumerate() {
        add(&builder, element).map_err(|error| error.of_element(list.noun, number))?;
    }
    builder.build(server)?.give(region)
}
