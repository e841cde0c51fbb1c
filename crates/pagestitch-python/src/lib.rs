//! [`pagestitch`] for Python. `pagestitch.pyi` describes the module for its users.
//!
//! The global interpreter lock decides the design: a thread that touches an absent page holds it, and
//! so the page must come without it. Therefore workers never wait for the interpreter: buffers that a
//! worker gives up are released later (`lent`), and a source that is written in Python fills pages
//! in `populate` and `read_at` only, in the calling thread (`call`, `source`).
#![expect(unsafe_code, reason = "the buffer protocol hands out pointers")]

mod call;
mod chunks;
mod error;
mod held;
mod lent;
mod names;
mod numbers;
mod raised;
mod region;
mod server;
mod source;

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Scattered memory and files as one buffer, filled on first touch.
#[pymodule]
#[pyo3(name = "pagestitch")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // Before the types are made: their objects would belong to the subinterpreter, which ends.
    refuse_subinterpreter(module.py())?;
    module.add_class::<chunks::File>()?;
    module.add_class::<chunks::Hole>()?;
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add_class::<region::Region>()?;
    module.add_class::<server::Pool>()
}

/// A region attaches its thread to the main interpreter, which waits for ever while a subinterpreter has
/// the lock. Python 3.12 and newer refuse the import in subinterpreters with a lock of their own.
fn refuse_subinterpreter(_attached: Python<'_>) -> PyResult<()> {
    // SAFETY: the thread is attached to an interpreter, which is the current one.
    let interpreter = unsafe { ffi::PyInterpreterState_Get() };
    // SAFETY: the interpreter lives while the thread is attached to it.
    let number = unsafe { ffi::PyInterpreterState_GetID(interpreter) };
    if number == MAIN_INTERPRETER {
        return Ok(());
    }
    Err(PyImportError::new_err(
        "pagestitch works in the main interpreter only, and this is a subinterpreter: import it in the main one, \
         or start a process (multiprocessing)",
    ))
}

/// The number of the interpreter with which Python starts.
const MAIN_INTERPRETER: i64 = 0;
