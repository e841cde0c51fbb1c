//! Sources that Python implements.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::cell::Cell;
use std::io;

thread_local! {
    /// True in a thread that has released the interpreter for a region, so that its sources may take it.
    static MAY_ATTACH: Cell<bool> = const { Cell::new(false) };
}

/// Runs `act` without the interpreter. Sources in Python can be read meanwhile, in this thread.
pub(crate) fn without_interpreter<T: Send>(py: Python<'_>, act: impl FnOnce() -> T + Send) -> T {
    py.detach(|| {
        // A source may have called this, for another region.
        let before = MAY_ATTACH.replace(true);
        let answer = act();
        MAY_ATTACH.set(before);
        answer
    })
}

/// An object with `size` and `read_at(offset, length)`.
#[derive(Debug)]
pub(crate) struct PythonSource {
    object: Py<PyAny>,
    bytes: u64,
    name: String,
}

impl PythonSource {
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let bytes = object.getattr("size")?.extract()?;
        let name = object.get_type().name()?.to_string();
        Ok(Self { object: object.clone().unbind(), bytes, name })
    }

    fn read(&self, py: Python<'_>, offset: u64, into: &mut [u8]) -> PyResult<()> {
        let answer = self.object.bind(py).call_method1("read_at", (offset, into.len()))?;
        let bytes = answer.cast::<PyBytes>()?.as_bytes();
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

impl pagestitch::Source for PythonSource {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if !MAY_ATTACH.get() {
            return Err(io::Error::other(
                "a source in Python cannot be read behind a page fault, because the touching thread may hold the \
                 interpreter's lock: call populate() first",
            ));
        }
        let answer = Python::try_attach(|py| {
            self.read(py, offset, into).map_err(|error| {
                match error.value(py).getattr("errno").and_then(|errno| errno.extract()) {
                    Ok(errno) => io::Error::from_raw_os_error(errno),
                    Err(_) => io::Error::other(error.to_string()),
                }
            })
        });
        answer.unwrap_or_else(|| Err(io::Error::other("the interpreter has ended")))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
