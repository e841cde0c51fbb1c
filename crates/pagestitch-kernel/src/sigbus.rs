//! Faults that the faulting thread serves itself: no event, no other thread, no wake-up.
//!
//! ```text
//!   a thread touches a missing page of a uffd with the SIGBUS feature
//!        └─▶ kernel: SIGBUS to that thread ─▶ our handler ─▶ in a range? ─▶ FaultHandler::serve ─▶ return: try again
//!                                                              └─ in none ─▶ the handler that was installed before
//! ```
//!
//! The signal handler is installed once a process, and passes on every signal that is not a fault
//! in a registered range. The ranges are a sorted list in an [`Rcu`] cell, which is read without a
//! lock, because the interrupted thread may hold any lock. Since Linux 4.14. See `userfaultfd(2)`,
//! `UFFD_FEATURE_SIGBUS`, and `signal-safety(7)`.
//!
//! All signals are blocked while the signal handler runs, so no other one interrupts it. Memory
//! that it touches itself must not fault in this way: such a fault cannot be served, and ends the
//! process with a line that says so.
//!
//! The signal handler runs on the thread's alternate stack if there is one (`SA_ONSTACK`), because
//! runtimes with small stacks rely on that. It takes less than [`STACK_BYTES`] there. If the
//! previous handler was installed without that flag, it relies on the thread's own stack, and so
//! ours runs there too.

use crate::errno::Errno;
use crate::event::Touch;
use crate::fork::ForkGeneration;
use crate::page::AddressRange;
use crate::rcu::{Rcu, ReadGuard, Writer};
use crate::striped::{STRIPES, Striped};
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SigSet, Signal, raise};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, mem, ptr, thread};

/// Fills missing pages in the thread that has touched them.
///
/// # Safety
///
/// [`serve`](Self::serve) is async-signal-safe, because it interrupts the thread anywhere, also in
/// the allocator:
///
/// - it takes no lock, including the locks of `tracing`, of standard output and of a panic (a
///   `try_lock` that gives up is allowed);
/// - it neither allocates nor frees;
/// - it uses no thread-local storage with a lazy initialiser;
/// - it neither panics nor unwinds, and touches no memory whose pages are filled in this way.
#[expect(unsafe_code, reason = "declares an obligation")]
pub unsafe trait FaultHandler: Send + Sync {
    /// Fills the page of `address`, or lets it be written, so that the retried access succeeds. False if it
    /// cannot. A page that was absent may be write-protected by now.
    fn serve(&self, address: usize, touch: Touch) -> bool;

    /// True if [`serve`](Self::serve) may wait, as a read of a file waits for its disk. Then only the
    /// drop of its own [`Registration`] waits for it. Asked once, by [`Registration::new`].
    fn may_wait(&self) -> bool {
        false
    }
}

/// A range whose faults are served. After its drop they are not, and no fault handler of it runs.
pub struct Registration {
    entry: Entry,
    generation: ForkGeneration,
}

impl Registration {
    /// Serves faults in `range` with `fault_handler`. The uffd of the range was opened with the
    /// `SIGBUS` feature.
    ///
    /// The SIGBUS handler that is installed already gets all other signals. A handler that is
    /// installed later must pass on the signals that are not its own.
    ///
    /// # Errors
    ///
    /// The errno of `sigaction(2)`; none is known to occur.
    pub fn new(range: AddressRange, fault_handler: Arc<dyn FaultHandler>) -> Result<Self, Errno> {
        install()?;
        let inside = fault_handler.may_wait().then(|| Arc::new(Striped::new(STRIPES)));
        let entry = Entry { range, fault_handler, inside };
        change(|ranges| {
            let place = ranges.partition_point(|other| other.range.start() < range.start());
            ranges.insert(place, entry.clone());
        });
        Ok(Self { entry, generation: ForkGeneration::current() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.generation.is_current() {
            // A forked child: the range is not mapped here, and a reader whose thread is in the
            // parent never leaves.
            return;
        }
        change(|ranges| ranges.retain(|entry| entry.range != self.entry.range));
        let Some(inside) = &self.entry.inside else { return };
        while inside.iter().any(|threads| threads.load(Ordering::SeqCst) > 0) {
            thread::sleep(MOMENT);
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("range", &self.entry.range).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Entry {
    range: AddressRange,
    fault_handler: Arc<dyn FaultHandler>,
    /// The threads inside a fault handler that may wait.
    inside: Option<Arc<Striped<AtomicUsize>>>,
}

/// Installs the signal handler, once.
fn install() -> Result<(), Errno> {
    let _alone = write();
    if INSTALLED.load(Ordering::SeqCst) {
        return Ok(());
    }
    // Stored before ours is installed, because a signal may come at once.
    let before = BEFORE.get_or_init(|| Before::new(current()));
    let mut ours = current();
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // With SA_NODEFER, a fault inside the handler comes here too, and can be reported. Without it,
    // the kernel ends the process without a message.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | before.stack_flag();
    ours.sa_mask = every_signal();
    let replaced = change_action(Some(&ours))?;
    // Another thread may have installed a handler since `current` was read.
    before.set(replaced);
    INSTALLED.store(true, Ordering::SeqCst);
    Ok(())
}

/// The action for SIGBUS before ours.
struct Before {
    /// Replaced as a whole and never freed, because a handler may be reading it.
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
        // SAFETY: the pointer came from Box::into_raw, and the value is never freed.
        #[expect(unsafe_code, reason = "a value behind a pointer")]
        unsafe {
            &*self.action.load(Ordering::SeqCst)
        }
    }

    /// If the previous handler was installed for the thread's own stack, ours runs there too.
    fn stack_flag(&self) -> c_int {
        let action = self.get();
        let handles = ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction);
        if handles && action.sa_flags & libc::SA_ONSTACK == 0 { 0 } else { libc::SA_ONSTACK }
    }
}

fn current() -> libc::sigaction {
    change_action(None).expect("SIGBUS is a signal")
}

/// Sets the action for SIGBUS, and returns the previous one.
fn change_action(to: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    let to = to.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the kernel reads an action that lives through the call, and writes the previous one
    // to `before`. Our handler takes no lock and allocates nothing.
    #[expect(unsafe_code, reason = "installs a signal handler")]
    Errno::result(unsafe { libc::sigaction(libc::SIGBUS, to, before.as_mut_ptr()) })?;
    // SAFETY: the kernel has filled it, and all zeros are a valid action too.
    #[expect(unsafe_code, reason = "filled by the kernel")]
    Ok(unsafe { before.assume_init() })
}

/// Every signal, also the two that the C library keeps to itself. No program can block these, so a
/// mask that has them shows that a handler like ours was interrupted. SIGBUS is not blocked, so
/// that a second fault can be reported.
const fn every_signal() -> libc::sigset_t {
    signals(u64::MAX ^ bit(libc::SIGBUS))
}

/// A set of signals from its bits. The functions of the C library leave two signals out.
const fn signals(bits: u64) -> libc::sigset_t {
    const WORDS: usize = size_of::<libc::sigset_t>() / size_of::<u64>();
    let mut words = [0u64; WORDS];
    words[0] = bits;
    // SAFETY: a signal set is an array of words, of the same size, and each bit pattern is valid.
    #[expect(unsafe_code, reason = "a set from its bits")]
    unsafe {
        mem::transmute::<[u64; WORDS], libc::sigset_t>(words)
    }
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = nix::errno::Errno::last_raw();
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    #[expect(unsafe_code, reason = "reads what the kernel has handed over")]
    let about = unsafe { &*info };
    // SAFETY: the kernel passes the state of the interrupted thread to such a handler.
    #[expect(unsafe_code, reason = "reads what the kernel has handed over")]
    let interrupted = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let code = about.si_code;
    // A missing page is an address error. A poisoned page is not, and neither is a signal that a
    // process has sent.
    let served = code == libc::BUS_ADRERR && {
        if blocked_before(interrupted) & bit(KEPT_BY_C) != 0 {
            end_nested();
            return;
        }
        // SAFETY: a SIGBUS with this code has an address.
        #[expect(unsafe_code, reason = "reads a field of a union")]
        let address = unsafe { about.si_addr() };
        serve(address.addr(), touch(interrupted))
    };
    nix::errno::Errno::set_raw(errno);
    if !served {
        pass_on(signal, code, info, interrupted);
    }
}

/// The interrupted access.
#[cfg(target_arch = "x86_64")]
const fn touch(interrupted: &libc::ucontext_t) -> Touch {
    /// Bits of the processor's error code of a page fault: the page is present, and the access is a write.
    const PRESENT: i64 = 1 << 0;
    const WRITE: i64 = 1 << 1;
    let code = interrupted.uc_mcontext.gregs[libc::REG_ERR as usize];
    match (code & WRITE != 0, code & PRESENT != 0) {
        (false, _) => Touch::Read,
        (true, false) => Touch::Write,
        (true, true) => Touch::Denied,
    }
}

#[cfg(not(target_arch = "x86_64"))]
const fn touch(_: &libc::ucontext_t) -> Touch {
    Touch::Write
}

/// The signals that were blocked in the interrupted thread.
fn blocked_before(interrupted: &libc::ucontext_t) -> u64 {
    let mask = (&raw const interrupted.uc_sigmask).cast::<u64>();
    // SAFETY: a signal set is an array of words, and the kernel knows the 64 signals of the first.
    #[expect(unsafe_code, reason = "the bits of a signal set")]
    unsafe {
        mask.read()
    }
}

/// Reports a fault in the handler itself, or in another handler that blocks all signals: the thread
/// cannot fill the page and would come here forever.
fn end_nested() {
    const LINE: &str = "pagestitch: a page is missing that the SIGBUS handler itself touches: the memory of a source is served inline, \
                        or a handler that blocks all signals touches a region\n";
    // SAFETY: the kernel reads bytes that live forever. The line is lost if standard error is
    // closed.
    #[expect(unsafe_code, reason = "write(2), which a signal handler may call")]
    let _ = unsafe { libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len()) };
    end_by_default();
}

/// Lets the retried access end the process.
fn end_by_default() {
    // A direct call, because it takes little stack: two signals may have used up most of a small
    // one.
    // SAFETY: the default action runs no code of this process.
    #[expect(unsafe_code, reason = "takes a signal handler away")]
    let _ = unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

fn serve(address: usize, touch: Touch) -> bool {
    // By reference, because the stack may be small.
    let Some(ref inside) = enter(address) else { return false };
    // SAFETY: the registration keeps the handler while this thread is inside.
    #[expect(unsafe_code, reason = "a handler that another thread keeps")]
    unsafe { &*inside.fault_handler }.serve(address, touch)
}

/// A thread inside a fault handler, which its registration keeps meanwhile.
struct Inside {
    fault_handler: *const dyn FaultHandler,
    /// Changes of the list wait for its readers. `None` if the handler may wait: it is counted instead.
    _seen: Option<ReadGuard<'static, Vec<Entry>>>,
    threads: *const AtomicUsize,
}

/// Not part of its caller, because the fault handler needs the stack.
#[inline(never)]
fn enter(address: usize) -> Option<Inside> {
    let seen = RANGES.read();
    let entry = find(seen.value()?, address)?;
    let fault_handler = Arc::as_ptr(&entry.fault_handler);
    let Some(inside) = &entry.inside else {
        return Some(Inside { fault_handler, _seen: Some(seen), threads: ptr::null() });
    };
    // Counted before the list is left, because the drop of the registration takes the entry off the
    // list first, and looks at the count then.
    let threads = inside.local();
    threads.fetch_add(1, Ordering::SeqCst);
    Some(Inside { fault_handler, _seen: None, threads })
}

impl Drop for Inside {
    fn drop(&mut self) {
        // SAFETY: null, or a count that the registration keeps until no thread is counted.
        #[expect(unsafe_code, reason = "a count that another thread keeps")]
        let threads = unsafe { self.threads.as_ref() };
        if let Some(threads) = threads {
            threads.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Does with a foreign signal what the process would do without our handler.
fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, interrupted: &mut libc::ucontext_t) {
    let Some(before) = BEFORE.get().map(Before::get) else { return end_by_default() };
    match before.sa_sigaction {
        // The kernel does not let a process ignore a fault.
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_IGN | libc::SIG_DFL => {
            end_by_default();
            if code <= 0 {
                // The signal was sent, so no retried access raises it again.
                let _ = raise(Signal::SIGBUS);
            }
        }
        handler => {
            let _ = blocked_for(before, interrupted).thread_set_mask();
            let context = ptr::from_mut(interrupted).cast();
            call(handler, before.sa_flags & libc::SA_SIGINFO != 0, (signal, info, context));
        }
    }
}

/// The signals to block while a previous handler runs: those that were blocked, those that it asks
/// for, and SIGBUS.
fn blocked_for(handler: &libc::sigaction, interrupted: &libc::ucontext_t) -> SigSet {
    let mask = (&raw const handler.sa_mask).cast::<u64>();
    // SAFETY: a signal set is an array of words, and the kernel knows the 64 signals of the first.
    #[expect(unsafe_code, reason = "the bits of a signal set")]
    let mut blocked = unsafe { mask.read() } | blocked_before(interrupted);
    if handler.sa_flags & libc::SA_NODEFER == 0 {
        blocked |= bit(libc::SIGBUS);
    }
    // SAFETY: the set is initialised.
    #[expect(unsafe_code, reason = "a signal set of the C library")]
    unsafe {
        SigSet::from_sigset_t_unchecked(signals(blocked))
    }
}

/// Calls the handler that was installed before ours.
fn call(handler: usize, with_info: bool, (signal, info, context): (c_int, *mut siginfo_t, *mut c_void)) {
    let handler = ptr::with_exposed_provenance::<()>(handler);
    if with_info {
        // SAFETY: the function was installed with SA_SIGINFO, so it has this signature.
        #[expect(unsafe_code, reason = "a function behind an address")]
        let handler = unsafe {
            mem::transmute::<*const (), extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(handler)
        };
        handler(signal, info, context);
    } else {
        // SAFETY: the function was installed without SA_SIGINFO, so it has this signature.
        #[expect(unsafe_code, reason = "a function behind an address")]
        let handler = unsafe { mem::transmute::<*const (), extern "C" fn(c_int)>(handler) };
        handler(signal);
    }
}

/// The entry whose range holds an address.
fn find(ranges: &[Entry], address: usize) -> Option<&Entry> {
    let after = ranges.partition_point(|entry| entry.range.start() <= address);
    ranges.get(after.checked_sub(1)?).filter(|entry| address < entry.range.end())
}

/// Changes the list of ranges.
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
        // A forked child: the ranges are not mapped here, and other memory may be at their
        // addresses.
        // SAFETY: no thread of this process reads the list. Either this is the only thread of a
        // child, and it is not in the signal handler, which neither forks nor changes the list; or
        // the list was never written.
        #[expect(unsafe_code, reason = "no reader is left")]
        unsafe {
            writer.reset_in_child();
        }
    }
    writer
}

/// The most stack that the signal handler takes, beside the kernel's frame (`AT_MINSIGSTKSZ`), with
/// and without optimization. An alternate stack of `SIGSTKSZ` (8 KiB) has more left beside
/// `MINSIGSTKSZ` (2 KiB).
pub const STACK_BYTES: usize = 4096;

/// A signal that glibc and musl keep to themselves, and let no program block.
const KEPT_BY_C: c_int = 33;
/// The pause between looks at the threads that may wait for a disk.
const MOMENT: Duration = Duration::from_micros(100);

static INSTALLED: AtomicBool = AtomicBool::new(false);
static BEFORE: OnceLock<Before> = OnceLock::new();
/// The process of the ranges, by its fork generation.
static OWNER: AtomicU64 = AtomicU64::new(0);
static RANGES: Rcu<Vec<Entry>> = Rcu::empty();

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::page::PageSize;
    use std::sync::mpsc;

    /// Waits, as a read of a file does whose disk does not answer.
    struct Hanging {
        begun: mpsc::SyncSender<()>,
        is_over: AtomicBool,
    }

    // SAFETY: the test calls it, and no signal handler.
    #[expect(unsafe_code, reason = "a fault handler of a test")]
    unsafe impl FaultHandler for Hanging {
        fn serve(&self, _: usize, _: Touch) -> bool {
            self.begun.send(()).unwrap();
            while !self.is_over.load(Ordering::SeqCst) {
                thread::sleep(MOMENT);
            }
            true
        }

        fn may_wait(&self) -> bool {
            true
        }
    }

    fn range(number: usize) -> AddressRange {
        // Addresses that no mapping of a process has.
        AddressRange::new(4096 * number, 4096, PageSize::new(4096).unwrap()).unwrap()
    }

    #[test]
    fn a_handler_that_hangs_delays_the_drop_of_its_own_registration_alone() {
        let (begun, has_begun) = mpsc::sync_channel(1);
        let hanging = Arc::new(Hanging { begun, is_over: AtomicBool::new(false) });
        let registration =
            Registration::new(range(2), Arc::clone(&hanging) as Arc<dyn FaultHandler>).unwrap();
        let serves = thread::spawn(|| serve(range(2).start(), Touch::Read));
        has_begun.recv().unwrap();
        let (done, is_done) = mpsc::channel();
        let others = done.clone();
        let other = Arc::clone(&hanging);
        thread::spawn(move || {
            drop(Registration::new(range(4), other).unwrap());
            others.send("others").unwrap();
        });
        let ended = is_done.recv_timeout(Duration::from_secs(20));
        thread::spawn(move || {
            drop(registration);
            done.send("its own").unwrap();
        });
        assert!(is_done.recv_timeout(Duration::from_millis(20)).is_err());
        hanging.is_over.store(true, Ordering::SeqCst);
        assert_eq!(is_done.recv_timeout(Duration::from_secs(20)), Ok("its own"));
        assert_eq!((ended, serves.join().unwrap()), (Ok("others"), true));
    }
}
