//! Memory of Python objects, lent to regions by the buffer protocol.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The bytes of an object that exports a read-only buffer.
#[derive(Debug)]
pub(crate) struct Lent {
    start: NonNull<u8>,
    bytes: usize,
    export: Arc<Export>,
}

/// The export of a buffer. It keeps the exporting object, and the bytes at their address.
#[derive(Debug)]
pub(crate) struct Export {
    /// None once the region has given it up.
    buffer: Mutex<Option<PyUntypedBuffer>>,
    /// The buffer's own reference to its object, for the garbage collector. It is no second one.
    object: Option<ManuallyDrop<Py<PyAny>>>,
}

/// Buffers that regions have given up. Their release needs the interpreter, and a worker that waited
/// for it could wait for a thread that waits for the worker.
static GIVEN_UP: GivenUp = GivenUp { first: AtomicPtr::new(ptr::null_mut()) };

/// A list without a lock, because a forked child would have the lock of a thread that it lacks.
struct GivenUp {
    first: AtomicPtr<Node>,
}

struct Node {
    buffer: PyUntypedBuffer,
    next: *mut Self,
}

impl GivenUp {
    fn push(&self, buffer: PyUntypedBuffer) {
        let mut next = self.first.load(Ordering::Relaxed);
        let node = Box::into_raw(Box::new(Node { buffer, next }));
        while let Err(now) =
            self.first.compare_exchange_weak(next, node, Ordering::Release, Ordering::Relaxed)
        {
            next = now;
            // SAFETY: no other thread knows the node yet.
            unsafe { (*node).next = next };
        }
    }

    /// Takes the whole list. Nodes are taken in no other way, so a pushed one has no old successor.
    fn take(&self) -> impl Iterator<Item = PyUntypedBuffer> {
        let mut first = self.first.swap(ptr::null_mut(), Ordering::Acquire);
        std::iter::from_fn(move || {
            if first.is_null() {
                return None;
            }
            // SAFETY: `push` has made the node of a box, and only this thread has the list now.
            let node = unsafe { Box::from_raw(first) };
            first = node.next;
            Some(node.buffer)
        })
    }
}

/// Releases the buffers that regions have given up. Building and closing a region does it.
pub(crate) fn release_given_up(py: Python<'_>) {
    GIVEN_UP.take().for_each(|buffer| buffer.release(py));
}

impl Lent {
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object).map_err(|error| without_shape(object, error))?;
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
        let export = Arc::new(Export::of(object.py(), buffer));
        Ok(Self { start, bytes, export })
    }

    pub(crate) const fn export(&self) -> &Arc<Export> {
        &self.export
    }
}

/// The error of an object whose buffer lacks what the protocol tells of it.
fn without_shape(object: &Bound<'_, PyAny>, error: PyErr) -> PyErr {
    let text = error.value(object.py()).to_string();
    match (text.as_str(), object.get_type().name()) {
        ("shape is null" | "strides is null", Ok(kind)) => PyBufferError::new_err(format!(
            "an object of the type {kind} exports no array of bytes: pass bytes(x)"
        )),
        _ => error,
    }
}

impl Export {
    fn of(py: Python<'_>, buffer: PyUntypedBuffer) -> Self {
        let object = buffer.obj(py).map(|object| {
            // SAFETY: the buffer has a reference to the object, of which this is the only copy, and which
            // is never dropped.
            ManuallyDrop::new(unsafe { Bound::from_owned_ptr(py, object.as_ptr()) }.unbind())
        });
        Self { buffer: Mutex::new(Some(buffer)), object }
    }

    fn locked(&self) -> MutexGuard<'_, Option<PyUntypedBuffer>> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exporting object, as long as the buffer keeps it.
    pub(crate) fn object(&self) -> Option<&Py<PyAny>> {
        let is_kept = self.locked().is_some();
        self.object.as_deref().filter(|_| is_kept)
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
        let buffer = self.export.locked().take();
        buffer.into_iter().for_each(|buffer| GIVEN_UP.push(buffer));
    }
}

// SAFETY: threads only read the bytes, and the buffer itself is Send.
unsafe impl Send for Lent {}
