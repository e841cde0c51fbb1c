//! The pointers that come in: handles, texts, buffers, lists, structs.

use crate::call::CallError;
use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

/// A type whose values C holds by pointer.
pub(crate) trait Handle: Sized {
    /// Its name in errors, in C.
    const NAME: &'static str;

    /// Gives a value to C: it is freed by [`Handle::free`].
    fn give(self, out: *mut *mut Self) -> Result<(), CallError> {
        let out = place(out, "the place for the new handle")?;
        let handle = Box::into_raw(Box::new(self));
        live::insert(handle.addr(), Self::NAME);
        out.write(handle);
        Ok(())
    }

    /// The value behind a handle, for the length of a call.
    fn borrow<'call>(handle: *const Self) -> Result<&'call Self, CallError> {
        check(handle)?;
        // SAFETY: the caller passes a handle that `give` has made and that no thread frees during
        // this call. Only shared references to it exist, because each call borrows it.
        let value = unsafe { &*handle };
        Ok(value)
    }

    /// Takes the value back. A null pointer is none, as for free(3).
    fn free(handle: *mut Self) -> Result<Option<Self>, CallError> {
        if handle.is_null() {
            return Ok(None);
        }
        check(handle)?;
        live::remove(handle.addr());
        // SAFETY: `give` has made the handle by `Box::into_raw`, and the caller passes it once.
        let value = unsafe { Box::from_raw(handle) };
        Ok(Some(*value))
    }
}

fn check<H: Handle>(handle: *const H) -> Result<(), CallError> {
    if handle.is_null() {
        return Err(CallError::argument(format_args!("the {} is a null pointer", H::NAME)));
    }
    live::check(handle.addr(), H::NAME)
}

/// The place for an answer. It may be uninitialised.
pub(crate) fn place<'call, T>(out: *mut T, what: &str) -> Result<&'call mut MaybeUninit<T>, CallError> {
    aligned(out, what)?;
    // SAFETY: the caller passes the address of a variable of this type that no other thread uses.
    let place = unsafe { &mut *out.cast::<MaybeUninit<T>>() };
    Ok(place)
}

/// A list of C. An empty one may be a null pointer.
pub(crate) fn list<'call, T>(start: *const T, count: usize, what: &str) -> Result<&'call [T], CallError> {
    if count == 0 {
        return Ok(&[]);
    }
    aligned(start, what)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(CallError::argument(format_args!(
            "{what} has {count} elements, more than memory holds: pass their number"
        )));
    }
    // SAFETY: the caller passes as many initialised elements, which do not change during this call.
    let list = unsafe { std::slice::from_raw_parts(start, count) };
    Ok(list)
}

/// A buffer of C that a call fills. Its bytes are initialised first, because it may be fresh.
pub(crate) fn buffer<'call>(start: *mut u8, bytes: usize, what: &str) -> Result<&'call mut [u8], CallError> {
    if bytes == 0 {
        return Ok(&mut []);
    }
    aligned(start, what)?;
    if isize::try_from(bytes).is_err() {
        return Err(CallError::argument(format_args!(
            "{what} has {bytes} bytes, more than memory holds: pass its size"
        )));
    }
    // SAFETY: the caller passes a writable buffer of so many bytes, which no other thread uses.
    unsafe { start.write_bytes(0, bytes) };
    // SAFETY: as above; and all its bytes are initialised.
    let buffer = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
    Ok(buffer)
}

/// A text of C.
pub(crate) fn text<'call>(start: *const c_char, what: &str) -> Result<&'call CStr, CallError> {
    aligned(start, what)?;
    // SAFETY: the caller passes a text that ends in a zero byte and does not change during this
    // call.
    let text = unsafe { CStr::from_ptr(start) };
    Ok(text)
}

/// A path of C, in the bytes of the file system.
pub(crate) fn path<'call>(start: *const c_char) -> Result<&'call Path, CallError> {
    use std::os::unix::ffi::OsStrExt;
    Ok(Path::new(std::ffi::OsStr::from_bytes(text(start, "the path")?.to_bytes())))
}

/// A descriptor of its own for an open file of C.
pub(crate) fn duplicate(fd: c_int) -> Result<OwnedFd, CallError> {
    if fd < 0 {
        return Err(CallError::argument(format_args!("the descriptor is {fd}: pass an open one")));
    }
    // SAFETY: the caller passes a descriptor that stays open during this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fd.try_clone_to_owned().map_err(|error| CallError::io("the descriptor cannot be duplicated", &error))
}

/// A struct that begins with its size. A program that was built for a smaller one passes fewer
/// fields: the others have their defaults.
///
/// # Safety
///
/// - All bytes of a `T` that are zero or of `default` form a valid value: it has integers, pointers
///   and optional functions only.
pub(crate) unsafe fn sized<T: Copy>(
    start: *const T,
    default: T,
    smallest: usize,
    what: &str,
) -> Result<T, CallError> {
    aligned(start, what)?;
    // SAFETY: each of these structs begins with a `size_t`.
    let size = unsafe { start.cast::<usize>().read() };
    if size < smallest || size > size_of::<T>() {
        let (name, largest) = (what, size_of::<T>());
        return Err(CallError::argument(format_args!(
            "the field `size` of {name} is {size}, and this library knows {smallest} to {largest}: set it to sizeof"
        )));
    }
    let mut value = default;
    // SAFETY: the caller passes a struct of `size` bytes, which fits into `value`, and by the
    // promise of this function any of its bytes form a value.
    unsafe { std::ptr::copy_nonoverlapping(start.cast::<u8>(), (&raw mut value).cast::<u8>(), size) };
    Ok(value)
}

fn aligned<T>(start: *const T, what: &str) -> Result<(), CallError> {
    if start.is_null() {
        return Err(CallError::argument(format_args!("{what} is a null pointer")));
    }
    if !start.is_aligned() {
        return Err(CallError::argument(format_args!(
            "{what} is at an odd address: it has to be aligned to {}",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// The handles that C holds: builds with debug assertions find freed and foreign ones.
mod live {
    use crate::call::CallError;
    #[cfg(debug_assertions)]
    use {
        crate::status::Status,
        std::collections::HashMap,
        std::sync::{Mutex, PoisonError},
    };

    #[cfg(debug_assertions)]
    static LIVE: Mutex<Option<HashMap<usize, &'static str>>> = Mutex::new(None);

    #[cfg(debug_assertions)]
    fn with<T>(act: impl FnOnce(&mut HashMap<usize, &'static str>) -> T) -> T {
        act(LIVE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
    }

    #[cfg_attr(not(debug_assertions), expect(unused_variables, reason = "a release build keeps no list"))]
    pub(super) fn insert(address: usize, name: &'static str) {
        #[cfg(debug_assertions)]
        with(|live| live.insert(address, name));
    }

    #[cfg_attr(not(debug_assertions), expect(unused_variables, reason = "a release build keeps no list"))]
    pub(super) fn remove(address: usize) {
        #[cfg(debug_assertions)]
        with(|live| live.remove(&address));
    }

    #[cfg_attr(
        not(debug_assertions),
        expect(unused_variables, clippy::unnecessary_wraps, reason = "a release build keeps no list")
    )]
    pub(super) fn check(address: usize, name: &'static str) -> Result<(), CallError> {
        #[cfg(debug_assertions)]
        match with(|live| live.get(&address).copied()) {
            Some(other) if other == name => {}
            Some(other) => {
                return Err(CallError::new(Status::PsInvalidHandle, format_args!("the {name} is a {other}")));
            }
            None => {
                return Err(CallError::new(
                    Status::PsInvalidHandle,
                    format_args!("the {name} was freed, or no call has made it"),
                ));
            }
        }
        Ok(())
    }
}
