//! The bare SIGBUS handler, in which the touching thread fills its page.

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pagestitch::{Inline, Region};
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// Memory whose pages a signal handler fills.
pub(super) trait Fills: Sync {
    /// The addresses of the memory. Where it has several parts, from the first one to the end of the last one: no other
    /// thread touches a region in between.
    fn addresses(&self) -> Range<usize>;

    /// Fills the page at an address. False if the address is not in this memory.
    fn fill_at(&self, address: usize) -> bool;
}

/// Runs `work` while its threads fill the pages that they touch, with some signals masked meanwhile. One
/// memory has the handler at a time. Other threads may use regions that are served inline: their faults are passed on.
pub(super) fn serve<T>(memory: &dyn Fills, masked: SigSet, work: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Range { start, end } = memory.addresses();
    MEMORY.store(ptr::from_ref(&memory).cast_mut().cast(), Ordering::Release);
    END.store(end, Ordering::Release);
    START.store(start, Ordering::Release);
    install_that_of_regions();
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER;
    let _installed = Installed::new(&SigAction::new(SigHandler::SigAction(on_bus), flags, masked));
    work()
}

/// Has the library install its handler, which stays. Else it could do so above the one of [`serve`], whose end would take
/// both away.
fn install_that_of_regions() {
    static ONCE: Once = Once::new();
    // Without a region there is no such handler.
    ONCE.call_once(|| drop(Region::builder().chunk(vec![0u8]).build(Inline)));
}

/// The handler, until it is dropped.
struct Installed {
    /// Never freed, because the handler of another thread may be reading it.
    before: &'static SigAction,
}

impl Installed {
    fn new(action: &SigAction) -> Self {
        // SAFETY: the handler calls no function that a signal may not interrupt.
        #[expect(unsafe_code, reason = "a signal handler")]
        let before = unsafe { sigaction(Signal::SIGBUS, action) };
        let before = Box::leak(Box::new(before.expect("SIGBUS has an action")));
        BEFORE.store(before, Ordering::Release);
        Self { before }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // SAFETY: the handler was installed before, so it may be installed.
        #[expect(unsafe_code, reason = "a signal handler")]
        let _ = unsafe { sigaction(Signal::SIGBUS, self.before) };
        END.store(0, Ordering::Release);
        MEMORY.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Fills the page of the address. The interrupted code is a load, so it has no errno to keep.
extern "C" fn on_bus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the information of this signal.
    #[expect(unsafe_code, reason = "the information of a signal")]
    let about = unsafe { &*info };
    // SAFETY: a SIGBUS of the kernel has an address.
    #[expect(unsafe_code, reason = "the address of a fault")]
    let address = unsafe { about.si_addr() }.addr();
    if (START.load(Ordering::Acquire)..END.load(Ordering::Acquire)).contains(&address) {
        // SAFETY: the thread touches this memory, and the threads that do end before `serve` returns, which borrows it.
        #[expect(unsafe_code, reason = "the memory of a signal handler")]
        let memory = unsafe { MEMORY.load(Ordering::Acquire).as_ref() };
        if memory.is_some_and(|memory| memory.fill_at(address)) {
            return;
        }
    }
    // SAFETY: actions are leaked.
    #[expect(unsafe_code, reason = "the action before a signal handler")]
    let before = unsafe { BEFORE.load(Ordering::Acquire).as_ref() };
    let handler = before.map(|before| (before.handler(), before.mask()));
    if let Some((SigHandler::SigAction(handler), mask)) = handler {
        // Until the return from the signal, as if the kernel had called it.
        let _ = mask.thread_block();
        handler(signal, info, context);
    } else {
        // The retried access ends the process.
        // SAFETY: the default action runs no code of this process.
        #[expect(unsafe_code, reason = "takes a signal handler away")]
        let _ = unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

static BEFORE: AtomicPtr<SigAction> = AtomicPtr::new(ptr::null_mut());
/// The addresses of the memory; empty without one.
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
static MEMORY: AtomicPtr<&dyn Fills> = AtomicPtr::new(ptr::null_mut());
