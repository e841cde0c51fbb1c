//! The border of a call: no panic crosses it, and its error stays for `ps_last_error()`.

use crate::names::in_c;
use crate::status::Status;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The error of a call.
#[derive(Debug)]
pub(crate) struct CallError {
    status: Status,
    message: String,
    errno: i32,
}

impl CallError {
    pub(crate) fn new(status: Status, message: impl fmt::Display) -> Self {
        Self { status, message: message.to_string(), errno: 0 }
    }

    /// The kernel refuses to duplicate a descriptor that the program has passed.
    pub(crate) fn of_descriptor(fd: c_int, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        let (status, remedy) = match errno {
            EMFILE => (Status::PsLimitReached, "raise the limit (ulimit -n)"),
            _ => (Status::PsIo, "pass an open one"),
        };
        Self { status, message: format!("descriptor {fd}: {error}: {remedy}"), errno }
    }

    /// Names the element of a list that the error is about.
    pub(crate) fn of_element(mut self, noun: &str, number: usize) -> Self {
        self.message = format!("{noun} {number}: {}", self.message);
        self
    }

    pub(crate) fn argument(message: impl fmt::Display) -> Self {
        Self::new(Status::PsInvalidArgument, message)
    }
}

impl<E: Into<pagestitch::Error>> From<E> for CallError {
    fn from(error: E) -> Self {
        let error = error.into();
        let errno = error.raw_os_error().or_else(|| error.io_error()?.raw_os_error());
        Self { status: Status::of(&error), message: in_c(&error.to_string()), errno: errno.unwrap_or(0) }
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
    static ERRNO: Cell<i32> = const { Cell::new(0) };
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Runs a function of the program that must not free what calls it: see [`outside_callbacks`].
pub(crate) fn callback<T>(run: impl FnOnce() -> T) -> T {
    let outer = IN_CALLBACK.replace(true);
    let answer = run();
    IN_CALLBACK.set(outer);
    answer
}

/// Refuses a call of a callback that would end, or wait for, the work that waits for the callback.
pub(crate) fn outside_callbacks() -> Result<(), CallError> {
    if IN_CALLBACK.get() {
        let what = "a callback of the program is running in this thread: let it return first (one that has left by longjmp(3) \
                    keeps its region and server for good)";
        return Err(CallError::new(Status::PsInUse, what));
    }
    Ok(())
}

/// Runs the body of the call `name`, and answers with its status.
pub(crate) fn status(name: &str, body: impl FnOnce() -> Result<(), CallError>) -> c_int {
    match caught(name, body) {
        Ok(()) => Status::PsOk as c_int,
        Err(status) => status as c_int,
    }
}

/// As [`status`], for a call that returns a value, and `otherwise` after an error.
pub(crate) fn value<T>(name: &str, otherwise: T, body: impl FnOnce() -> Result<T, CallError>) -> T {
    caught(name, body).unwrap_or(otherwise)
}

fn caught<T>(name: &str, body: impl FnOnce() -> Result<T, CallError>) -> Result<T, Status> {
    // A panic leaves locks usable, because those of the handles are not poisoned.
    let answer = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<String>().map(String::as_str);
        let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(CallError::new(Status::PsPanic, format_args!("the library has panicked: {what}")))
    });
    answer.map_err(|error| {
        keep(name, &error);
        error.status
    })
}

/// The message of a thread whose own was dropped at its end: for destructors of pthread_key_create(3) and
/// functions of atexit(3), which run later.
const AT_THREAD_END: &CStr =
    c"the thread ends, and has no text of errors any more: the status of the call tells its reason";

fn keep(name: &str, error: &CallError) {
    let message = format!("{name}: {}", error.message).replace('\0', "?");
    let message = CString::new(message).unwrap_or_default();
    // At the end of its thread, the message is gone: `ps_last_error()` says so.
    let _ = MESSAGE.try_with(|place| place.replace(message));
    ERRNO.set(error.errno);
}

/// One line about the last call of this thread that failed: the call, the thing and the remedy. Empty if none
/// has failed. Never NULL. Valid until the next failure in this thread, or its end.
#[unsafe(no_mangle)]
pub extern "C" fn ps_last_error() -> *const c_char {
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(AT_THREAD_END.as_ptr())
}

/// The errno of the last call of this thread that failed: that of a refused system call, or that a source's `read_at`
/// has returned. 0: neither is the reason.
#[unsafe(no_mangle)]
pub extern "C" fn ps_last_errno() -> c_int {
    ERRNO.get()
}

/// The process has no descriptor left: the same number on all architectures.
const EMFILE: i32 = 24;

#[cfg(test)]
mod tests {
    use super::{CallError, ps_last_errno, ps_last_error, status};
    use crate::status::Status;
    use std::ffi::{CStr, c_int};

    fn last_error() -> String {
        let text = ps_last_error();
        // SAFETY: the text ends in a zero byte, and no call of this thread fails before its copy.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_is_a_status_with_its_message() {
        let texts = [
            (status("ps_some_call", || panic!("block {} is gone", 5)), "block 5 is gone"),
            (status("ps_some_call", || panic!("a constant text")), "a constant text"),
            (status("ps_some_call", || std::panic::panic_any(7)), "no message"),
        ];
        assert!(texts.iter().all(|&(status, _)| status == Status::PsPanic as c_int));
        assert_eq!(last_error(), "ps_some_call: the library has panicked: no message");
        let _ = status("ps_some_call", || panic!("block {} is gone", 5));
        assert_eq!(last_error(), format!("ps_some_call: the library has panicked: {}", texts[0].1));
    }

    #[test]
    fn each_thread_has_its_own_last_error() {
        let refused = |message| status("ps_some_call", || Err(CallError::argument(message)));
        assert_eq!(refused("of the first thread"), Status::PsInvalidArgument as c_int);
        std::thread::spawn(move || {
            assert_eq!((last_error(), ps_last_errno()), (String::new(), 0));
            let error = std::io::Error::from_raw_os_error(5);
            let status = status("ps_some_call", || Err(CallError::of_descriptor(9, &error)));
            assert_eq!((status, ps_last_errno()), (Status::PsIo as c_int, 5));
        })
        .join()
        .unwrap();
        assert_eq!((last_error(), ps_last_errno()), ("ps_some_call: of the first thread".into(), 0));
    }
}
