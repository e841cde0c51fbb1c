//! Errors as exceptions.

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
    let message = error.to_string();
    let errno = error.raw_os_error().or_else(|| error.io_error()?.raw_os_error());
    match errno {
        Some(errno) => PyOSError::new_err((errno, message)),
        None if error.kind() == pagestitch::ErrorKind::OutOfRange => PyIndexError::new_err(message),
        None => Error::new_err(message),
    }
}

/// The error of opening a piece, in the words of the library.
pub(crate) fn of(error: impl Into<pagestitch::Error>) -> PyErr {
    exception(&error.into())
}
