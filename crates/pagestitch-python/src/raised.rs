//! The exceptions of sources, as errors that a region can keep.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::{error, fmt, io};

/// The text of an exception, as the error of a source.
#[derive(Debug)]
pub(crate) struct Raised {
    text: String,
    errno: Option<i32>,
    /// The number of the call in which it was raised.
    call: Option<u64>,
}

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl error::Error for Raised {}

impl Raised {
    pub(crate) fn text(text: &str) -> Self {
        Self { text: text.to_owned(), errno: None, call: None }
    }

    pub(crate) fn of(error: &PyErr, call: u64, py: Python<'_>) -> Self {
        let errno = error.value(py).getattr("errno").and_then(|errno| errno.extract()).ok();
        let errno = errno.filter(|errno| *errno > 0 && error.is_instance_of::<PyOSError>(py));
        Self { text: error.to_string(), errno, call: Some(call) }
    }

    /// The exception that an error of the library is about.
    pub(crate) fn inside(error: &pagestitch::Error) -> Option<&Self> {
        error.io_error()?.get_ref()?.downcast_ref()
    }

    /// The number of the call in which it was raised, if it was.
    pub(crate) const fn call(&self) -> Option<u64> {
        self.call
    }

    pub(crate) const fn errno(&self) -> Option<i32> {
        self.errno
    }

    pub(crate) fn into_io_error(self) -> io::Error {
        let kind =
            self.errno.map_or(io::ErrorKind::Other, |errno| io::Error::from_raw_os_error(errno).kind());
        io::Error::new(kind, self)
    }
}
