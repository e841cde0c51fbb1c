//! Faults served by the thread that takes them: no event, no other thread, no wake-up.
//!
//! ```text
//!   a thread touches a missing page of a uffd with the SIGBUS feature
//!        └─▶ kernel: SIGBUS to that thread ─▶ our handler ─▶ whose range? ─▶ OnFault::serve ─▶ return: try again
//!                                                              └─ nobody's ─▶ the handler that was there before us
//! ```
//!
//! The handler is installed once a process, and passes on what is not ours. Ranges are looked up in a sorted snapshot that
//! writers replace and readers never wait for: a handler must not take a lock that the thread which it interrupted may
//! hold. Since Linux 4.14. See `userfaultfd(2)`, `UFFD_FEATURE_SIGBUS`, and `signal-safety(7)`.

use crate::fork::Maker;
use crate::lanes::Lanes;
use crate::page::AddressRange;
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use std::fmt;
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

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
        let guard = lock();
        let mut ranges = snapshot(&guard);
        let place = ranges.partition_point(|other| other.range.start() < range.start());
        ranges.insert(place, Entry { range, on_fault });
        publish(&guard, ranges);
        Ok(Self { range, maker: Maker::current() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.maker.is_current() {
            // A forked child: the range is not there, and who was at work at that moment never leaves here.
            return;
        }
        let guard = lock();
        let mut ranges = snapshot(&guard);
        ranges.retain(|entry| entry.range != self.range);
        publish(&guard, ranges);
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
    let _guard = lock();
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
    let visit = Visit::enter();
    visit.find(address).is_some_and(|entry| entry.on_fault.serve(address))
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

/// What a handler sees: the ranges at one moment, kept as long as it looks at them.
struct Visit {
    visitors: &'static AtomicUsize,
}

impl Visit {
    fn enter() -> Self {
        loop {
            let epoch = EPOCH.load(Ordering::SeqCst);
            let visitors = VISITORS[epoch % 2].here();
            visitors.fetch_add(1, Ordering::SeqCst);
            let visit = Self { visitors };
            // Seen before the epoch ends: whoever ends it waits for us.
            if EPOCH.load(Ordering::SeqCst) == epoch {
                return visit;
            }
        }
    }

    fn find(&self, address: usize) -> Option<&Entry> {
        let ranges = RANGES.load(Ordering::SeqCst);
        // SAFETY: null, or what `publish` has put there; it is freed only after this epoch's visitors have left.
        #[expect(unsafe_code, reason = "a snapshot behind a pointer")]
        let ranges = unsafe { ranges.as_ref() }?;
        let after = ranges.partition_point(|entry| entry.range.start() <= address);
        ranges.get(after.checked_sub(1)?).filter(|entry| address < entry.range.end())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.visitors.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A copy of the ranges. Writers come one at a time.
fn snapshot(_guard: &MutexGuard<'_, ()>) -> Vec<Entry> {
    let ranges = RANGES.load(Ordering::SeqCst);
    // SAFETY: null, or what `publish` has put there; only who holds the lock frees it.
    #[expect(unsafe_code, reason = "a snapshot behind a pointer")]
    unsafe { ranges.as_ref() }.cloned().unwrap_or_default()
}

/// Replaces the ranges, and waits until nobody looks at the old ones.
fn publish(_guard: &MutexGuard<'_, ()>, ranges: Vec<Entry>) {
    let old = RANGES.swap(Box::into_raw(Box::new(ranges)), Ordering::SeqCst);
    let epoch = EPOCH.fetch_add(1, Ordering::SeqCst);
    while VISITORS[epoch % 2].iter().any(|visitors| visitors.load(Ordering::SeqCst) > 0) {
        // A handler does not block: it is a matter of microseconds.
        thread::yield_now();
    }
    if !old.is_null() {
        // SAFETY: it came from Box::into_raw, and whoever came after the swap has the new one.
        #[expect(unsafe_code, reason = "frees a snapshot behind a pointer")]
        drop(unsafe { Box::from_raw(old) });
    }
}

fn lock() -> MutexGuard<'static, ()> {
    let guard = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    let process = process::id();
    if OWNER.swap(process, Ordering::SeqCst) != process {
        // A forked child: the ranges are not there, and something else may be. Whoever was at work in the parent at that
        // moment is not here either, and would be waited for for ever.
        RANGES.store(ptr::null_mut(), Ordering::SeqCst);
        VISITORS.iter().flat_map(Lanes::iter).for_each(|visitors| visitors.store(0, Ordering::SeqCst));
    }
    guard
}

static BEFORE: OnceLock<SigAction> = OnceLock::new();
static WRITER: Mutex<()> = Mutex::new(());
/// The process that the visitors are counted in.
static OWNER: AtomicU32 = AtomicU32::new(0);
static RANGES: AtomicPtr<Vec<Entry>> = AtomicPtr::new(ptr::null_mut());
static EPOCH: AtomicUsize = AtomicUsize::new(0);
/// Handlers at work, by the parity of the epoch in which they began.
static VISITORS: [Lanes<AtomicUsize>; 2] = [Lanes::zero(), Lanes::zero()];
