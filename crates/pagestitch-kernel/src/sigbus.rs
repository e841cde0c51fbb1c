//! Faults served by the thread that takes them: no event, no other thread, no wake-up.
//!
//! ```text
//!   a thread touches a missing page of a uffd with the SIGBUS feature
//!        └─▶ kernel: SIGBUS to that thread ─▶ our handler ─▶ whose range? ─▶ OnFault::serve ─▶ return: try again
//!                                                              └─ nobody's ─▶ the handler that was there before us
//! ```
//!
//! The handler is installed once a process, and passes on what is not ours. Ranges are looked up in a sorted list that
//! is [published](crate::published), so that readers wait for nobody: a handler must not take a lock that the thread which it interrupted may
//! hold. Since Linux 4.14. See `userfaultfd(2)`, `UFFD_FEATURE_SIGBUS`, and `signal-safety(7)`.

use crate::fork::Maker;
use crate::page::AddressRange;
use crate::published::{Published, Writer};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Who fills a missing page in the thread that has touched it.
pub trait OnFault: Send + Sync {
    /// Fills the page of `address`, so that the access succeeds when it is tried again; or says that it cannot.
    ///
    /// It runs inside a signal handler, as if the access had called it: in the middle of whatever the program was doing. So
    /// it takes no lock, allocates nothing, panics never, and touches no memory that could fault in this way.
    fn serve(&self, address: usize) -> bool;
}

/// A range whose faults are served. They are not any more when it is dropped, and nobody is at it then.
pub struct Registration {
    range: AddressRange,
    maker: Maker,
}

impl Registration {
    /// Has faults in `range` served by `on_fault`: those of a uffd that was opened with the `SIGBUS` feature.
    ///
    /// A SIGBUS handler that is there already is called for everything else. One that is installed later has to pass on
    /// what is not its own.
    ///
    /// # Errors
    ///
    /// The errno of `sigaction(2)`; none is known to occur.
    pub fn new(range: AddressRange, on_fault: Arc<dyn OnFault>) -> Result<Self, Errno> {
        install()?;
        change(|ranges| {
            let place = ranges.partition_point(|other| other.range.start() < range.start());
            ranges.insert(place, Entry { range, on_fault });
        });
        Ok(Self { range, maker: Maker::current() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.maker.is_current() {
            // A forked child: the range is not there, and who was at work at that moment never leaves here.
            return;
        }
        change(|ranges| ranges.retain(|entry| entry.range != self.range));
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("range", &self.range).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Entry {
    range: AddressRange,
    on_fault: Arc<dyn OnFault>,
}

/// Installs the handler, once.
fn install() -> Result<(), Errno> {
    let _alone = write();
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // Not on the alternate stack: what there is of one is made for a stack overflow, and may be too small.
    let ours = SigAction::new(SigHandler::SigAction(on_sigbus), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler makes system calls and reads atomics and what is immutable; it takes no lock.
    #[expect(unsafe_code, reason = "installs a signal handler")]
    let before = unsafe { sigaction(Signal::SIGBUS, &ours) }?;
    BEFORE.set(before).expect("set under the lock, once");
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = Errno::last_raw();
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo.
    #[expect(unsafe_code, reason = "reads what the kernel has handed over")]
    let about = unsafe { &*info };
    let code = about.si_code;
    // A missing page is an address error; a poisoned one is not, and neither is a signal that somebody sent.
    let served = code == libc::BUS_ADRERR && {
        // SAFETY: a SIGBUS with this code is about an address.
        #[expect(unsafe_code, reason = "reads a field of a union")]
        let address = unsafe { about.si_addr() };
        serve(address.addr())
    };
    Errno::set_raw(errno);
    if !served {
        pass_on(signal, code, info, context);
    }
}

fn serve(address: usize) -> bool {
    let seen = RANGES.see();
    seen.value().and_then(|ranges| find(ranges, address)).is_some_and(|entry| entry.on_fault.serve(address))
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, context: *mut c_void) {
    match BEFORE.get().map_or(SigHandler::SigDfl, SigAction::handler) {
        SigHandler::SigAction(before) => before(signal, info, context),
        SigHandler::Handler(before) => before(signal),
        // The kernel does not let a fault be ignored.
        SigHandler::SigIgn if code <= 0 => {}
        SigHandler::SigIgn | SigHandler::SigDfl => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // SAFETY: the default action runs no code of ours. The access is tried again, and ends the process.
            #[expect(unsafe_code, reason = "takes a signal handler away")]
            let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
            if code <= 0 {
                // It was sent, and would not come again by itself.
                let _ = raise(Signal::SIGBUS);
            }
        }
    }
}

/// Whoever's range holds an address.
fn find(ranges: &[Entry], address: usize) -> Option<&Entry> {
    let after = ranges.partition_point(|entry| entry.range.start() <= address);
    ranges.get(after.checked_sub(1)?).filter(|entry| address < entry.range.end())
}

/// Changes the ranges.
fn change(change: impl FnOnce(&mut Vec<Entry>)) {
    let mut writer = write();
    let mut ranges = writer.now().cloned().unwrap_or_default();
    change(&mut ranges);
    writer.publish(ranges);
}

fn write() -> Writer<'static, Vec<Entry>> {
    let mut writer = RANGES.write();
    let process = Maker::current().number();
    if OWNER.swap(process, Ordering::SeqCst) != process {
        // A forked child: the ranges are not there, and something else may be.
        // SAFETY: its only thread is here, and not in the handler, which does not fork and changes no ranges; or this is the first
        // time, and there is no range that a handler could look for.
        #[expect(unsafe_code, reason = "nobody is looking")]
        unsafe {
            writer.forget();
        }
    }
    writer
}

static BEFORE: OnceLock<SigAction> = OnceLock::new();
/// The process that the ranges are of.
static OWNER: AtomicU64 = AtomicU64::new(0);
static RANGES: Published<Vec<Entry>> = Published::nothing();
