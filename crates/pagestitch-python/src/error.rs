//! Errors as exceptions.

use crate::names::in_python;
use crate::raised::Raised;
use pagestitch::ErrorKind;
use pyo3::PyErr;
use pyo3::exceptions::{PyException, PyIndexError, PyOSError};

pyo3::create_exception!(
    pagestitch,
    Error,
    PyException,
    "A region cannot do what was asked; the text names the remedy."
);

/// An error of the library as an exception: `OSError` where the kernel has refused a step, with its number.
pub(crate) fn exception(error: &pagestitch::Error) -> PyErr {
    with_message(error, error.to_string())
}

/// The error of opening a file, in the words of the library.
pub(crate) fn of(error: impl Into<pagestitch::Error>) -> PyErr {
    exception(&error.into())
}

/// The error of a descriptor, in the words of the library.
pub(crate) fn of_descriptor(number: i32, error: impl Into<pagestitch::Error>) -> PyErr {
    let error = error.into();
    let remedy = match error.raw_os_error() {
        Some(EMFILE) => ": raise the limit on open files (ulimit -n, or resource.setrlimit)",
        _ => "",
    };
    with_message(&error, format!("descriptor {number}: {error}{remedy}"))
}

/// The errno of a process at its limit on descriptors.
const EMFILE: i32 = 24;

fn with_message(error: &pagestitch::Error, message: String) -> PyErr {
    let message = in_python(&message);
    let of_kernel = || error.raw_os_error().or_else(|| error.io_error()?.raw_os_error());
    match Raised::inside(error).map_or_else(of_kernel, Raised::errno) {
        Some(errno) => PyOSError::new_err((errno, message)),
        None if error.kind() == ErrorKind::OutOfRange => PyIndexError::new_err(message),
        None => Error::new_err(message),
    }
}
