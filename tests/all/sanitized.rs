//! The build with a sanitizer (`ci/sanitize`): no thread has an alternate signal stack, because 8 KiB are too few for instrumented
//! frames of the SIGBUS handler.
//!
//! The standard library gives each thread such a stack when it finds no handler of SIGSEGV or SIGBUS at the start of the program.
//! So this program has handlers before that: they end it by the same signal, as the standard library's do.

use nix::libc::{self, c_int};

#[used]
#[unsafe(link_section = ".init_array")]
#[expect(unsafe_code, reason = "a function that runs before the standard library's start")]
static BEFORE_THE_START: extern "C" fn() = install;

extern "C" fn install() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the handler calls nothing but signal(2); no thread runs beside this one yet.
        #[expect(unsafe_code, reason = "installs a signal handler")]
        unsafe {
            libc::signal(signal, end_by as *const () as libc::sighandler_t)
        };
    }
}

/// The access is tried again, and its signal ends the process.
extern "C" fn end_by(signal: c_int) {
    // SAFETY: the default action runs no code of this program.
    #[expect(unsafe_code, reason = "takes a signal handler away")]
    unsafe {
        libc::signal(signal, libc::SIG_DFL)
    };
}
