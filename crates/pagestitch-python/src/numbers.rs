//! Numbers that are arguments: an error names the argument and its range.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;

/// The number that an object is.
pub(crate) fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    value.extract().map_err(|error: PyErr| match error.is_instance_of::<PyOverflowError>(value.py()) {
        true => {
            PyOverflowError::new_err(format!("{name} is {}: pass a number from 0 to 2**64 - 1", shown(value)))
        }
        false => match value.get_type().name() {
            Ok(kind) => PyTypeError::new_err(format!("{name} is of the type {kind}: pass an integer")),
            Err(error) => error,
        },
    })
}

/// The digits of a number, which Python does not print if they are thousands.
pub(crate) fn shown(number: &Bound<'_, PyAny>) -> String {
    number.str().map_or_else(|_| String::from("a number of thousands of digits"), |digits| digits.to_string())
}

/// The number that an object is, or none.
fn optional(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if value.is_none() { Ok(None) } else { number(name, value).map(Some) }
}

pub(crate) fn offset(value: &Bound<'_, PyAny>) -> PyResult<u64> {
    number("offset", value)
}

pub(crate) fn length(value: &Bound<'_, PyAny>) -> PyResult<u64> {
    number("length", value)
}

pub(crate) fn optional_length(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    optional("length", value)
}

pub(crate) fn optional_budget(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    optional("budget", value)
}

pub(crate) fn optional_workers(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    optional("workers", value)
}
