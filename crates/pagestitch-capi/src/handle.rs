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
        live::remove(handle.addr(), Self::NAME)?;
        Ok(Some(taken(handle)))
    }
}

/// The value of a handle, whose memory is freed.
#[cfg(not(debug_assertions))]
fn taken<H: Handle>(handle: *mut H) -> H {
    // SAFETY: `give` has made the handle by `Box::into_raw`, and the caller passes it once.
    let value = unsafe { Box::from_raw(handle) };
    *value
}

/// The value of a handle. Its memory stays, so that no later handle has the same address: a later use of this one is
/// found.
#[cfg(debug_assertions)]
fn taken<H: Handle>(handle: *mut H) -> H {
    // SAFETY: `give` has made the handle, and `live::remove` lets it pass once.
    unsafe { handle.read() }
}

fn check<H: Handle>(handle: *const H) -> Result<(), CallError> {
    if handle.is_null() {
        return Err(CallError::argument(format_args!("the {} is a null pointer: pass a handle", H::NAME)));
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

/// As [`place`], for an answer that the caller may leave out by a null pointer.
pub(crate) fn optional_place<'call, T>(
    out: *mut T,
    what: &str,
) -> Result<Option<&'call mut MaybeUninit<T>>, CallError> {
    if out.is_null() { Ok(None) } else { place(out, what).map(Some) }
}

/// A list of C. An empty one may be a null pointer.
pub(crate) fn list<'call, T>(
    start: *const T,
    count: usize,
    what: &str,
    elements: &str,
) -> Result<&'call [T], CallError> {
    if count == 0 {
        return Ok(&[]);
    }
    aligned(start, what)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(CallError::argument(format_args!(
            "{what} has {count} {elements}, more than memory holds: pass their number"
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
    let open = unsafe { BorrowedFd::borrow_raw(fd) };
    open.try_clone_to_owned().map_err(|error| CallError::of_descriptor(fd, &error))
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
    // A struct of any version is a whole number of its largest fields, so that no field is cut.
    if size < smallest || size > size_of::<T>() || size % align_of::<T>() != 0 {
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
        return Err(CallError::argument(format_args!("{what} is a null pointer: pass its address")));
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
#[cfg(debug_assertions)]
mod live {
    use crate::call::CallError;
    use crate::status::Status;
    use std::collections::HashMap;
    use std::collections::hash_map::{Entry, OccupiedEntry};
    use std::sync::{Mutex, PoisonError};

    /// The name of a handle's type, and whether C still has the handle. Freed ones stay: their memory does, too.
    struct Known {
        name: &'static str,
        is_live: bool,
    }

    static KNOWN: Mutex<Option<HashMap<usize, Known>>> = Mutex::new(None);

    fn with<T>(act: impl FnOnce(&mut HashMap<usize, Known>) -> T) -> T {
        act(KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
    }

    pub(super) fn insert(address: usize, name: &'static str) {
        with(|known| known.insert(address, Known { name, is_live: true }));
    }

    /// Lets one call free the handle.
    pub(super) fn remove(address: usize, name: &'static str) -> Result<(), CallError> {
        with(|known| {
            found(known.entry(address), name)?.get_mut().is_live = false;
            Ok(())
        })
    }

    pub(super) fn check(address: usize, name: &'static str) -> Result<(), CallError> {
        with(|known| found(known.entry(address), name).map(drop))
    }

    fn found<'map>(
        entry: Entry<'map, usize, Known>,
        name: &'static str,
    ) -> Result<OccupiedEntry<'map, usize, Known>, CallError> {
        let wrong = |what| Err(CallError::new(Status::PsInvalidHandle, what));
        match entry {
            Entry::Vacant(_) => wrong(format!("no call has made this {name}")),
            Entry::Occupied(known) if known.get().name != name => {
                wrong(format!("the {name} is a {}", known.get().name))
            }
            Entry::Occupied(known) if !known.get().is_live => wrong(format!("the {name} was freed")),
            Entry::Occupied(known) => Ok(known),
        }
    }
}

/// A release build keeps no list.
#[cfg(not(debug_assertions))]
#[expect(clippy::unnecessary_wraps, reason = "builds with debug assertions find freed handles")]
mod live {
    use crate::call::CallError;

    pub(super) const fn insert(_address: usize, _name: &'static str) {}

    pub(super) const fn remove(_address: usize, _name: &'static str) -> Result<(), CallError> {
        Ok(())
    }

    pub(super) const fn check(_address: usize, _name: &'static str) -> Result<(), CallError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::sized;

    /// A struct that has got a field since its first version.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    #[repr(C)]
    struct Grown {
        size: usize,
        first: u64,
        later: u64,
    }

    const DEFAULT: Grown = Grown { size: 0, first: 0, later: 9 };

    fn read(size: usize) -> Option<Grown> {
        let given = Grown { size, first: 5, later: 7 };
        // SAFETY: all fields are integers.
        unsafe { sized(&raw const given, DEFAULT, 16, "ps_grown") }.ok()
    }

    #[test]
    fn a_struct_of_an_older_program_has_the_default_in_its_later_fields() {
        assert_eq!(read(16), Some(Grown { size: 16, first: 5, later: 9 }));
        assert_eq!(read(24), Some(Grown { size: 24, first: 5, later: 7 }));
    }

    #[test]
    fn a_struct_that_is_too_small_too_large_or_ends_inside_a_field_is_refused() {
        for size in [0, 8, 15, 17, 20, 23, 25, 32, usize::MAX] {
            assert_eq!(read(size), None, "{size} bytes");
        }
    }
}
