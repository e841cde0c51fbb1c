//! Faults served by the thread that takes them: no event, no other thread, no wake-up.
//!
//! ```text
//!   a thread touches a missing page of a uffd with the SIGBUS feature
//!        └─▶ kernel: SIGBUS to that thread ─▶ our handler ─▶ whose range? ─▶ FaultHandler::serve ─▶ return: try again
//!                                                              └─ nobody's ─▶ the handler that was there before us
//! ```
//!
//! The handler is installed once a process, and passes on what is not ours. Ranges are looked up in a sorted list in an
//! [`Rcu`] cell, so that readers wait for nobody: a handler must not take a lock that the thread which it interrupted may
//! hold. Since Linux 4.14. See `userfaultfd(2)`, `UFFD_FEATURE_SIGBUS`, and `signal-safety(7)`.
//!
//! All signals are blocked while it runs, so that no other handler interrupts it. What it touches itself must not fault in this way: a
//! fault inside it cannot be served, and ends the process with a line that says so.
//!
//! It runs on the thread's alternate stack where there is one (`SA_ONSTACK`), as runtimes with small stacks need it, and takes less than
//! [`STACK_BYTES`] there; except where the handler that it passes on to was installed without that flag, and counts on the stack of the
//! thread.

use crate::fork::ForkGeneration;
use crate::page::AddressRange;
use crate::rcu::{Rcu, Writer};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SigSet, Signal, raise};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::{fmt, mem, ptr};

/// Fills missing pages in the thread that has touched them.
///
/// # Safety
///
/// [`serve`](Self::serve) is async-signal-safe, as it interrupts the thread in the middle of whatever that does, the allocator included:
///
/// - it takes no lock, also none of those of `tracing`, of standard output or of a panic; a try that gives up is none;
/// - it allocates nothing and frees nothing;
/// - it uses no thread-local storage that is initialised on first use;
/// - it neither panics nor unwinds, and touches no memory whose pages are filled in this way.
#[expect(unsafe_code, reason = "declares an obligation")]
pub unsafe trait FaultHandler: Send + Sync {
    /// Fills the page of `address`, so that the access succeeds when it is tried again; or says that it cannot.
    fn serve(&self, address: usize) -> bool;
}

/// A range whose faults are served. They are not any more when it is dropped, and nobody is at it then.
pub struct Registration {
    range: AddressRange,
    generation: ForkGeneration,
}

impl Registration {
    /// Has faults in `range` served by `fault_handler`: those of a uffd that was opened with the `SIGBUS` feature.
    ///
    /// A SIGBUS handler that is there already is called for everything else. One that is installed later has to pass on
    /// what is not its own.
    ///
    /// # Errors
    ///
    /// The errno of `sigaction(2)`; none is known to occur.
    pub fn new(range: AddressRange, fault_handler: Arc<dyn FaultHandler>) -> Result<Self, Errno> {
        install()?;
        change(|ranges| {
            let place = ranges.partition_point(|other| other.range.start() < range.start());
            ranges.insert(place, Entry { range, fault_handler });
        });
        Ok(Self { range, generation: ForkGeneration::current() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.generation.is_current() {
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
    fault_handler: Arc<dyn FaultHandler>,
}

/// Installs the handler, once.
fn install() -> Result<(), Errno> {
    let _alone = write();
    if INSTALLED.load(Ordering::SeqCst) {
        return Ok(());
    }
    // Remembered before ours is there: a signal may come in that very moment.
    let before = BEFORE.get_or_init(|| Before::new(current()));
    let mut ours = current();
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // A fault inside it comes here, too, to be told apart: without SA_NODEFER the kernel ends the process without a word.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | before.stack_flag();
    ours.sa_mask = every_signal();
    let replaced = change_action(Some(&ours))?;
    // Another thread may have installed one since it was looked at.
    before.set(replaced);
    INSTALLED.store(true, Ordering::SeqCst);
    Ok(())
}

/// What was done about SIGBUS before us.
struct Before {
    /// Replaced as a whole, and never freed: a handler may be reading it.
    action: AtomicPtr<libc::sigaction>,
}

impl Before {
    fn new(action: libc::sigaction) -> Self {
        Self { action: AtomicPtr::new(Box::into_raw(Box::new(action))) }
    }

    fn set(&self, action: libc::sigaction) {
        let same = |now: &libc::sigaction| {
            now.sa_sigaction == action.sa_sigaction && now.sa_flags == action.sa_flags
        };
        if !same(self.get()) {
            self.action.store(Box::into_raw(Box::new(action)), Ordering::SeqCst);
        }
    }

    fn get(&self) -> &libc::sigaction {
        // SAFETY: it came from Box::into_raw, and is never freed.
        #[expect(unsafe_code, reason = "a value behind a pointer")]
        unsafe {
            &*self.action.load(Ordering::SeqCst)
        }
    }

    /// A handler that was installed for the thread's own stack is passed on to there.
    fn stack_flag(&self) -> c_int {
        let action = self.get();
        let handles = ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction);
        if handles && action.sa_flags & libc::SA_ONSTACK == 0 { 0 } else { libc::SA_ONSTACK }
    }
}

fn current() -> libc::sigaction {
    change_action(None).expect("SIGBUS is a signal")
}

/// Has something else done about SIGBUS; says what was before.
fn change_action(to: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    let to = to.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both are null, or an action that lives through the call; ours is a handler that takes no lock and allocates nothing.
    #[expect(unsafe_code, reason = "installs a signal handler")]
    Errno::result(unsafe { libc::sigaction(libc::SIGBUS, to, before.as_mut_ptr()) })?;
    // SAFETY: the call has filled it; all zeros are one, too.
    #[expect(unsafe_code, reason = "filled by the kernel")]
    Ok(unsafe { before.assume_init() })
}

/// Every signal, also the two that the C library keeps to itself: these it lets no program block, so that a mask with them tells of
/// a handler like ours. SIGBUS is not blocked: a second one is told apart then.
const fn every_signal() -> libc::sigset_t {
    signals(u64::MAX ^ bit(libc::SIGBUS))
}

/// A set of signals, by their bits. Its own functions leave two of them out.
const fn signals(bits: u64) -> libc::sigset_t {
    const WORDS: usize = size_of::<libc::sigset_t>() / size_of::<u64>();
    let mut words = [0u64; WORDS];
    words[0] = bits;
    // SAFETY: a signal set is words of bits, of the same size and without invalid values.
    #[expect(unsafe_code, reason = "a set from its bits")]
    unsafe {
        mem::transmute::<[u64; WORDS], libc::sigset_t>(words)
    }
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = Errno::last_raw();
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo.
    #[expect(unsafe_code, reason = "reads what the kernel has handed over")]
    let about = unsafe { &*info };
    let code = about.si_code;
    // A missing page is an address error; a poisoned one is not, and neither is a signal that somebody sent.
    let served = code == libc::BUS_ADRERR && {
        if blocked_before(context) & bit(KEPT_BY_C) != 0 {
            end_nested();
            return;
        }
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

/// The signals that were blocked in what a handler has interrupted.
fn blocked_before(context: *mut c_void) -> u64 {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid context.
    #[expect(unsafe_code, reason = "reads what the kernel has handed over")]
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let mask = (&raw const context.uc_sigmask).cast::<u64>();
    // SAFETY: a signal set is words of bits, of which the kernel knows 64.
    #[expect(unsafe_code, reason = "the bits of a signal set")]
    unsafe {
        mask.read()
    }
}

/// A fault in the handler itself, or in one that runs as ours does: the thread cannot fill the page, and would come here for ever.
fn end_nested() {
    const LINE: &str = "pagestitch: a page is missing that the SIGBUS handler itself touches: the memory of a source is served inline, \
                        or a handler that blocks all signals touches a region\n";
    // SAFETY: writes bytes that live for ever. Where standard error is closed, nothing is told.
    #[expect(unsafe_code, reason = "write(2), which a signal handler may call")]
    let _ = unsafe { libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len()) };
    end_by_default();
}

/// The access is tried again, and ends the process.
fn end_by_default() {
    // With next to no stack: of a small one, two signals may have taken most.
    // SAFETY: the default action runs no code of ours.
    #[expect(unsafe_code, reason = "takes a signal handler away")]
    let _ = unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

fn serve(address: usize) -> bool {
    let seen = RANGES.read();
    seen.value()
        .and_then(|ranges| find(ranges, address))
        .is_some_and(|entry| entry.fault_handler.serve(address))
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(before) = BEFORE.get().map(Before::get) else { return end_by_default() };
    match before.sa_sigaction {
        // The kernel does not let a fault be ignored.
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_IGN | libc::SIG_DFL => {
            end_by_default();
            if code <= 0 {
                // It was sent, and would not come again by itself.
                let _ = raise(Signal::SIGBUS);
            }
        }
        handler => {
            let blocked = blocked_for(before, context);
            let _ = blocked.thread_set_mask();
            call(handler, before.sa_flags & libc::SA_SIGINFO != 0, (signal, info, context));
        }
    }
}

/// What is blocked while a handler runs: what was, what it asks for, and its own signal.
fn blocked_for(handler: &libc::sigaction, context: *mut c_void) -> SigSet {
    let mask = (&raw const handler.sa_mask).cast::<u64>();
    // SAFETY: a signal set is words of bits, of which the kernel knows 64.
    #[expect(unsafe_code, reason = "the bits of a signal set")]
    let mut blocked = unsafe { mask.read() } | blocked_before(context);
    if handler.sa_flags & libc::SA_NODEFER == 0 {
        blocked |= bit(libc::SIGBUS);
    }
    // SAFETY: a set that is initialised.
    #[expect(unsafe_code, reason = "a set of the C library's")]
    unsafe {
        SigSet::from_sigset_t_unchecked(signals(blocked))
    }
}

/// Calls a handler that was installed before ours.
fn call(handler: usize, with_info: bool, (signal, info, context): (c_int, *mut siginfo_t, *mut c_void)) {
    let handler = ptr::with_exposed_provenance::<()>(handler);
    if with_info {
        // SAFETY: installed with SA_SIGINFO, so that is what it is.
        #[expect(unsafe_code, reason = "a function behind an address")]
        let handler = unsafe {
            mem::transmute::<*const (), extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(handler)
        };
        handler(signal, info, context);
    } else {
        // SAFETY: installed without SA_SIGINFO, so that is what it is.
        #[expect(unsafe_code, reason = "a function behind an address")]
        let handler = unsafe { mem::transmute::<*const (), extern "C" fn(c_int)>(handler) };
        handler(signal);
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
    let mut ranges = writer.current().cloned().unwrap_or_default();
    change(&mut ranges);
    writer.publish(ranges);
}

fn write() -> Writer<'static, Vec<Entry>> {
    let mut writer = RANGES.write();
    let process = ForkGeneration::current().number();
    if OWNER.swap(process, Ordering::SeqCst) != process {
        // A forked child: the ranges are not there, and something else may be.
        // SAFETY: its only thread is here, and not in the handler, which does not fork and changes no ranges; or this is the first
        // time, and there is no range that a handler could look for.
        #[expect(unsafe_code, reason = "nobody is looking")]
        unsafe {
            writer.reset_in_child();
        }
    }
    writer
}

/// What the handler takes of a stack at most, beside what the kernel puts there (`AT_MINSIGSTKSZ`), in a build with optimization or
/// without: less than the smallest alternate stack (`MINSIGSTKSZ` is 2 KiB, `SIGSTKSZ` 8 KiB) has to spare.
pub const STACK_BYTES: usize = 4096;

/// A signal that glibc and musl keep to themselves, and let no program block.
const KEPT_BY_C: c_int = 33;

static INSTALLED: AtomicBool = AtomicBool::new(false);
static BEFORE: OnceLock<Before> = OnceLock::new();
/// The process that the ranges are of.
static OWNER: AtomicU64 = AtomicU64::new(0);
static RANGES: Rcu<Vec<Entry>> = Rcu::empty();
