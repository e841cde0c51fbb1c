//! Regions: one contiguous range of addresses.

use crate::call::{self, CallError};
use crate::handle::{self, Handle};
use crate::ranges::{PS_TO_END, Piece};
use crate::status::Status;
use pagestitch::{Metrics, SharedRegion};
use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::Range;
use std::sync::OnceLock;

/// A contiguous range of addresses. A page has its bytes from its first touch on.
#[derive(Debug)]
pub struct Region {
    region: SharedRegion,
    writable: bool,
}

impl Handle for Region {
    const NAME: &'static str = "region";
}

impl Region {
    pub(crate) const fn new(region: SharedRegion, writable: bool) -> Self {
        Self { region, writable }
    }

    /// A range of a call. PS_TO_END: up to the end of the region.
    fn range(&self, offset: u64, bytes: u64) -> Range<u64> {
        let len = self.region.len() as u64;
        let to_end = bytes == PS_TO_END;
        offset..if to_end { len } else { offset.saturating_add(bytes) }
    }

    /// An error if a range leaves the region. A wrong length is found before the buffer is touched.
    fn check(&self, offset: u64, bytes: usize) -> Result<(), CallError> {
        let len = self.region.len() as u64;
        if offset.checked_add(bytes as u64).is_some_and(|end| end <= len) {
            return Ok(());
        }
        let name = self.region.name();
        let message = format!("region {name}: {bytes} bytes from offset {offset} on leave its {len} bytes");
        Err(CallError::new(Status::PsOutOfRange, message))
    }

    /// An error if a buffer is memory of this region, which a call would read and write at once.
    fn check_foreign(&self, buffer: *const c_void, bytes: usize) -> Result<(), CallError> {
        let own = self.region.as_ptr().addr().get();
        let (start, own_end) = (buffer.addr(), own.saturating_add(self.region.len()));
        if bytes > 0 && start < own_end && start.saturating_add(bytes) > own {
            return Err(CallError::argument(
                "the buffer is memory of the region itself: copy by memmove() at ps_region_data_mut()",
            ));
        }
        Ok(())
    }
}

/// The address of the first byte, valid until the region is freed. NULL: an error.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_data(region: *const Region) -> *const c_void {
    call::value("ps_region_data", std::ptr::null(), || {
        Ok(Region::borrow(region)?.region.as_ptr().as_ptr().cast_const().cast())
    })
}

/// As ps_region_data(), for writing. NULL: an error, also if the region is only read.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_data_mut(region: *mut Region) -> *mut c_void {
    call::value("ps_region_data_mut", std::ptr::null_mut(), || {
        let region = Region::borrow(region)?;
        if region.writable {
            return Ok(region.region.as_ptr().as_ptr().cast());
        }
        Err(CallError::new(
            Status::PsReadOnly,
            "the region is only read: call ps_builder_writable() before the build",
        ))
    })
}

/// The number of bytes of the region. 0: an error.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_bytes(region: *const Region) -> usize {
    call::value("ps_region_bytes", 0, || Ok(Region::borrow(region)?.region.len()))
}

/// The offset in the region at which a chunk starts. Chunks are numbered from 0, in the order in which they were added.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_offset_of(region: *const Region, chunk: usize, offset: *mut u64) -> c_int {
    call::status("ps_region_offset_of", || {
        let region = &Region::borrow(region)?.region;
        let start = region.offset_of(chunk).ok_or_else(|| {
            let (name, chunks) = (region.name(), region.chunk_ranges().count());
            let message = format!("region {name} has {chunks} chunks, and no chunk {chunk}");
            CallError::new(Status::PsOutOfRange, message)
        })?;
        handle::place(offset, "the place for the offset")?.write(start);
        Ok(())
    })
}

/// Copies bytes out. Bytes that cannot be had are an error, and not SIGBUS. `into` is no memory of the region.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_read(
    region: *const Region,
    offset: u64,
    into: *mut c_void,
    bytes: usize,
) -> c_int {
    call::status("ps_region_read", || {
        let region = Region::borrow(region)?;
        region.check(offset, bytes)?;
        region.check_foreign(into, bytes)?;
        Ok(region.region.read_at(offset, handle::buffer(into.cast(), bytes, "the buffer")?)?)
    })
}

/// Copies bytes in, if the region is writable. `from` is no memory of the region.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_write(
    region: *mut Region,
    offset: u64,
    from: *const c_void,
    bytes: usize,
) -> c_int {
    call::status("ps_region_write", || {
        let region = Region::borrow(region)?;
        region.check_foreign(from, bytes)?;
        Ok(region.region.write_at(offset, handle::list(from.cast::<u8>(), bytes, "the buffer", "bytes")?)?)
    })
}

/// Fills the absent pages of a range, in this thread; more threads of the library help with a large one. An error if
/// bytes cannot be had. Of files in place, it reads the pages of the range from the disk, and no others. `bytes` may be
/// PS_TO_END.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_populate(region: *const Region, offset: u64, bytes: u64) -> c_int {
    call::status("ps_region_populate", || {
        let region = Region::borrow(region)?;
        Ok(region.region.populate(region.range(offset, bytes))?)
    })
}

/// Asks the server to fill the absent pages of a range, and does not wait. `bytes` may be PS_TO_END. Of files
/// in place, it has the server read the pages of the range from the disk, and no others.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_prefetch(region: *const Region, offset: u64, bytes: u64) -> c_int {
    call::status("ps_region_prefetch", || {
        let region = Region::borrow(region)?;
        region.region.prefetch(region.range(offset, bytes))?.detach();
        Ok(())
    })
}

/// Tries the pages of a range again whose bytes could not be had. `bytes` may be PS_TO_END.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_retry_failed(region: *const Region, offset: u64, bytes: u64) -> c_int {
    call::status("ps_region_retry_failed", || {
        let region = Region::borrow(region)?;
        Ok(region.region.retry_failed(region.range(offset, bytes))?)
    })
}

/// Adds memory at the end of a region that ps_builder_capacity() has reserved addresses for. The program keeps it valid
/// and unchanged until the region is freed. `offset`, which may be NULL, becomes its offset in the region.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_append(
    region: *mut Region,
    start: *const c_void,
    bytes: usize,
    offset: *mut u64,
) -> c_int {
    call::status("ps_region_append", || {
        let place = handle::optional_place(offset, "the place for the offset")?;
        let appended = Region::borrow(region)?.region.append(Piece { start, bytes }.memory()?)?;
        place.map(|place| place.write(appended.start as u64));
        Ok(())
    })
}

/// Calls `tell`, in this thread, with each range that was written since the last such call. Needs
/// ps_builder_track_changes(). Read the bytes afterwards: they then include each write that was told. A transfer that
/// pins pages of the region has ended before the call, or its bytes may be missed: an O_DIRECT read, an io_uring, a
/// process_vm_writev(2), a write to /proc/PID/mem. A buffered read(2) and ps_region_write() are safe.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_changes(
    region: *mut Region,
    tell: Option<extern "C" fn(ctx: *mut c_void, offset: u64, bytes: u64)>,
    ctx: *mut c_void,
) -> c_int {
    call::status("ps_region_changes", || {
        let tell = tell.ok_or_else(|| CallError::argument("the function is NULL: pass one"))?;
        let changes = Region::borrow(region)?.region.changes()?;
        call::callback(|| changes.for_each(|range| tell(ctx, range.start, range.end - range.start)));
        Ok(())
    })
}

/// Writes the pages that were written since the last such call to an open file, each at its offset in the region. All
/// other pages are holes. Replaces the contents of the file, and does not sync it.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_save_changes(region: *mut Region, fd: c_int) -> c_int {
    call::status("ps_region_save_changes", || {
        let file = std::fs::File::from(handle::duplicate(fd)?);
        Region::borrow(region)?.region.save_changes(&file)?;
        Ok(())
    })
}

/// Writes the plan as text: how the pages of each chunk come, and why. As snprintf(3): `into` has room for `room` bytes
/// with the zero at the end, and may be NULL if `room` is 0. `bytes` becomes the length of the whole text.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_plan(
    region: *const Region,
    into: *mut c_char,
    room: usize,
    bytes: *mut usize,
) -> c_int {
    call::status("ps_region_plan", || {
        let plan = Region::borrow(region)?.region.plan().to_string();
        handle::optional_place(bytes, "the place for the length")?.map(|place| place.write(plan.len()));
        let into = handle::buffer(into.cast(), room, "the buffer")?;
        let fits = plan.len().min(room.saturating_sub(1));
        into[..fits].copy_from_slice(&plan.as_bytes()[..fits]);
        Ok(())
    })
}

/// Reads a counter of the region, such as "faults" or "bytes_copied".
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_metric(region: *const Region, name: *const c_char, value: *mut u64) -> c_int {
    call::status("ps_region_metric", || {
        let metrics = Region::borrow(region)?.region.metrics();
        let name = handle::text(name, "the name of the counter")?.to_string_lossy();
        let found = metrics.all().find(|&(counter, _)| counter == name);
        let (_, found) = found.ok_or_else(|| {
            CallError::argument(format_args!("there is no counter {name:?}: ps_metric_name() has the names"))
        })?;
        handle::place(value, "the place for the value")?.write(found);
        Ok(())
    })
}

/// The name of a counter, numbered from 0. NULL after the last one.
#[unsafe(no_mangle)]
pub extern "C" fn ps_metric_name(number: usize) -> *const c_char {
    static NAMES: OnceLock<Vec<CString>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        Metrics::default().all().map(|(name, _)| CString::new(name).unwrap_or_default()).collect()
    });
    names.get(number).map_or(std::ptr::null(), |name| name.as_ptr())
}

/// Frees the region: its addresses become invalid. Waits for reads of its sources. NULL is ignored. A callback cannot
/// call it, except for `release` of a source.
#[unsafe(no_mangle)]
pub extern "C" fn ps_region_free(region: *mut Region) -> c_int {
    call::status("ps_region_free", || {
        call::outside_callbacks()?;
        Region::free(region).map(drop)
    })
}
