//! Memory of Python objects, lent to regions by the buffer protocol.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// The bytes of an object that exports a read-only buffer.
#[derive(Debug)]
pub(crate) struct Lent {
    start: NonNull<u8>,
    bytes: usize,
    /// Present until the drop. It keeps the object, and the bytes at their address.
    buffer: Option<PyUntypedBuffer>,
}

/// Buffers that regions have given up. Their release needs the interpreter, and a worker that waited
/// for it could wait for a thread that waits for the worker.
static GIVEN_UP: Mutex<Vec<PyUntypedBuffer>> = Mutex::new(Vec::new());

/// Releases the buffers that regions have given up. Building and closing a region does it.
pub(crate) fn release_given_up(py: Python<'_>) {
    // A worker may hold the lock for a moment, and in a forked child it holds it forever.
    let Ok(mut locked) = GIVEN_UP.try_lock() else { return };
    let given_up = std::mem::take(&mut *locked);
    drop(locked);
    given_up.into_iter().for_each(|buffer| buffer.release(py));
}

impl Lent {
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err(
                "its bytes do not lie end to end: pass a contiguous copy, as numpy.ascontiguousarray(x)",
            ));
        }
        if !buffer.readonly() {
            return Err(PyBufferError::new_err(
                "its bytes can be written, and a page of the region is a copy of its first touch: pass memoryview(x).toreadonly() \
                 and leave the bytes alone, or bytes(x)",
            ));
        }
        let (start, bytes) =
            (NonNull::new(buffer.buf_ptr().cast()).unwrap_or(NonNull::dangling()), buffer.len_bytes());
        Ok(Self { start, bytes, buffer: Some(buffer) })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the exporter keeps the bytes at their address until the buffer is released, which
        // is after this borrow. It has said that they are read-only.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner).extend(self.buffer.take());
    }
}

// SAFETY: threads only read the bytes, and the buffer itself is Send.
unsafe impl Send for Lent {}
