//! Calls of the library without the interpreter, and the exceptions that sources raise meanwhile.
//!
//! A source in Python runs in the thread that has released the interpreter, because any other thread
//! may be one that the touching thread waits for. Its exception stays in the thread until the call
//! returns: in an error that the region keeps, it would keep its frames, and they the region.

use crate::error::exception;
use crate::names::in_python;
use crate::raised::Raised;
use pyo3::exceptions::{PyException, PyOSError, PyRecursionError};
use pyo3::prelude::*;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

thread_local! {
    /// The innermost call of this thread that has released the interpreter.
    static CALL: RefCell<Option<Call>> = const { RefCell::new(None) };
}

/// A call, from the release of the interpreter to its return.
struct Call {
    number: u64,
    /// The number of calls around it, from sources that it reads.
    depth: usize,
    /// The exception of the last read that has failed.
    raised: Option<PyErr>,
    /// True if that exception ends the program, as `KeyboardInterrupt` does: no source is read again.
    interrupted: bool,
}

/// Runs `act` without the interpreter. Sources in Python can be read meanwhile, in this thread.
///
/// The exception of a source is the cause of this call's exception. An `OSError`, and an exception that
/// ends the program, are raised themselves.
pub(crate) fn without_interpreter<T: Send>(
    py: Python<'_>,
    act: impl FnOnce() -> Result<T, pagestitch::Error> + Send,
) -> PyResult<T> {
    let depth = CALL.with_borrow(|call| call.as_ref().map_or(0, |call| call.depth + 1));
    if depth > DEPTH_MAX {
        return Err(PyRecursionError::new_err(format!(
            "{DEPTH_MAX} sources in Python read each other's regions: read the bytes of the innermost one directly"
        )));
    }
    let (answer, call) = py.detach(|| {
        let entered = Entered::new(depth);
        let answer = act();
        (answer, entered.leave())
    });
    let Call { number, raised, interrupted, depth: _ } = call;
    if let Some(raised) = raised.as_ref().filter(|_| interrupted) {
        return Err(raised.clone_ref(py));
    }
    answer.map_err(|error| {
        let is_of_call = Raised::inside(&error).is_some_and(|inside| inside.call() == Some(number));
        match raised.filter(|_| is_of_call) {
            Some(raised) => raised_by_source(py, raised, &error),
            None => exception(&error),
        }
    })
}

fn raised_by_source(py: Python<'_>, raised: PyErr, error: &pagestitch::Error) -> PyErr {
    if raised.is_instance_of::<PyOSError>(py) {
        let _ = raised.value(py).call_method1("add_note", (in_python(&error.to_string()),));
        return raised;
    }
    let exception = exception(error);
    exception.set_cause(py, Some(raised));
    exception
}

/// True if a source was read in this call and has raised the exception of an error.
pub(crate) fn is_of_this_call(error: &pagestitch::Error) -> bool {
    let number = CALL.with_borrow(|call| call.as_ref().map(|call| call.number));
    Raised::inside(error).is_some_and(|inside| inside.call().is_some() && inside.call() == number)
}

/// Runs Python code of a source, if this thread has released the interpreter.
pub(crate) fn of_this_call(act: impl FnOnce(Python<'_>) -> PyResult<()>) -> Result<(), Raised> {
    let (number, interrupted) = CALL
        .with_borrow(|call| call.as_ref().map(|call| (call.number, call.interrupted)))
        .ok_or_else(|| Raised::text(BEHIND_A_FAULT))?;
    if interrupted {
        return Err(Raised::text("the call was interrupted"));
    }
    let attached = Python::try_attach(|py| act(py).map_err(|error| keep(py, error, number)));
    attached.unwrap_or_else(|| Err(Raised::text("the interpreter has ended")))
}

/// Keeps an exception until the call returns, and gives its text.
fn keep(py: Python<'_>, error: PyErr, number: u64) -> Raised {
    let text = Raised::of(&error, number, py);
    let interrupted = !error.is_instance_of::<PyException>(py);
    // The exception before it is dropped after the borrow: that may run Python code.
    let _before = CALL.with_borrow_mut(|call| {
        let call = call.as_mut()?;
        call.interrupted = interrupted;
        call.raised.replace(error)
    });
    text
}

/// The presence of a thread in a call.
struct Entered {
    /// The call around it: a source has called this one, of another region.
    around: Option<Call>,
}

impl Entered {
    fn new(depth: usize) -> Self {
        let number = CALLS.fetch_add(1, Ordering::Relaxed);
        let around = CALL.replace(Some(Call { number, depth, raised: None, interrupted: false }));
        Self { around }
    }

    fn leave(mut self) -> Call {
        CALL.replace(self.around.take()).expect("a thread leaves the call that it has entered")
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if thread::panicking() {
            CALL.set(self.around.take());
        }
    }
}

/// The number of calls so far.
static CALLS: AtomicU64 = AtomicU64::new(0);

const BEHIND_A_FAULT: &str = "a source in Python cannot be read behind a page fault, because the touching thread may hold the \
                              interpreter's lock: call populate() first";

/// The most calls inside each other. The stack of a thread has room for many more.
const DEPTH_MAX: usize = 20;
