//! Sources that Python implements.

use crate::call::of_this_call;
use crate::numbers::number;
use crate::raised::Raised;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3::{ffi, intern};
use std::sync::Arc;
use std::{io, mem, ptr, thread};

/// An object with `size` and `read_at(offset, length)`.
#[derive(Debug)]
pub(crate) struct PythonSource {
    /// One reference for the source and its region, which tells the garbage collector of it.
    object: Arc<Py<PyAny>>,
    bytes: u64,
    name: String,
}

impl PythonSource {
    pub(crate) fn new(object: &Bound<'_, PyAny>, size: &Bound<'_, PyAny>) -> PyResult<Self> {
        let bytes = number("size", size)?;
        let name = object.get_type().name()?.to_string();
        Ok(Self { object: Arc::new(object.clone().unbind()), bytes, name })
    }

    pub(crate) const fn object(&self) -> &Arc<Py<PyAny>> {
        &self.object
    }

    fn read(&self, py: Python<'_>, offset: u64, into: &mut [u8]) -> PyResult<()> {
        let answer = call_read_at(self.object.bind(py), offset, into.len())?;
        let Ok(bytes) = answer.cast::<PyBytes>() else {
            let kind = answer.get_type().name()?;
            return Err(PyTypeError::new_err(format!(
                "read_at returned an object of the type {kind}: return bytes"
            )));
        };
        let bytes = bytes.as_bytes();
        if bytes.len() != into.len() {
            let (is, asked) = (bytes.len(), into.len());
            return Err(PyValueError::new_err(format!(
                "read_at returned {is} bytes, and {asked} were asked for"
            )));
        }
        into.copy_from_slice(bytes);
        Ok(())
    }
}

fn call_read_at<'py>(source: &Bound<'py, PyAny>, offset: u64, length: usize) -> PyResult<Bound<'py, PyAny>> {
    let py = source.py();
    let name = intern!(py, "read_at").as_ptr();
    let (offset, length) = (offset.into_pyobject(py)?, length.into_pyobject(py)?);
    let end = EndOfThread;
    // SAFETY: the arguments are objects that live during the call, with a null pointer behind the last one.
    let answer = unsafe {
        PyObject_CallMethodObjArgs(
            source.as_ptr(),
            name,
            offset.as_ptr(),
            length.as_ptr(),
            ptr::null_mut::<ffi::PyObject>(),
        )
    };
    mem::forget(end);
    // SAFETY: the answer is a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, answer) }
}

// As `ffi` declares it, but the end of a thread unwinds through it.
unsafe extern "C-unwind" {
    fn PyObject_CallMethodObjArgs(
        object: *mut ffi::PyObject,
        name: *mut ffi::PyObject,
        ...
    ) -> *mut ffi::PyObject;
}

/// Stops the end of a thread that the interpreter ends, because it ends itself. Before Python 3.14, that is
/// a `pthread_exit` which unwinds the stack, and each frame would use the interpreter. So no frame with a
/// Python object lies between this one and the call. The process ends soon.
struct EndOfThread;

impl Drop for EndOfThread {
    fn drop(&mut self) {
        loop {
            thread::park();
        }
    }
}

impl pagestitch::Source for PythonSource {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        of_this_call(|py| self.read(py, offset, into)).map_err(Raised::into_io_error)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
