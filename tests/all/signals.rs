//! Signals beside regions: handlers that touch regions, and other handlers of SIGBUS.

use crate::machine::rounds;
use crate::storm::{self, in_a_storm};
use crate::{
    PAGE, SIGBUS, discard, end_if_hung, handle, handle_bus_errors, handle_user_signal, pattern, reason,
    touch, until,
};
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, Signal, raise};
use pagestitch::source::FailureReason;
use pagestitch::{Budget, Chunk, Error, Inline, Pool, Readahead, Region, Server, Source};
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

/// The address that the SIGUSR1 handler reads, and the counts of its right and its wrong bytes.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static READ: AtomicUsize = AtomicUsize::new(0);
static WRONG: AtomicUsize = AtomicUsize::new(0);

extern "C" fn read_a_byte(_signal: c_int) {
    match ADDRESS.load(Ordering::SeqCst) {
        0 => {}
        address if touch(address) == 0 => drop(WRONG.fetch_add(1, Ordering::SeqCst)),
        _ => drop(READ.fetch_add(1, Ordering::SeqCst)),
    }
    storm::ended();
}

/// A source that raises SIGUSR1 in the thread that populates.
struct Raises(Vec<u8>);

impl Source for Raises {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if thread::current().name().is_some_and(|name| name.starts_with("populates")) {
            raise(Signal::SIGUSR1).unwrap();
        }
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

fn raising_region(bytes: &[u8]) -> Region {
    let builder = Region::builder().chunk(Chunk::source(Arc::new(Raises(bytes.to_vec()))));
    builder.readahead(Readahead::None).build(&Pool::builder().workers(1).start().unwrap()).unwrap()
}

fn populating(body: impl FnOnce() + Send) {
    scope(|scope| {
        thread::Builder::new()
            .name(String::from("populates"))
            .spawn_scoped(scope, body)
            .unwrap()
            .join()
            .unwrap();
    });
}

#[test]
fn a_signal_handler_reads_a_page_that_its_thread_populates() {
    let end = child::run(this_test!(), || {
        end_if_hung();
        handle_user_signal(read_a_byte);
        let bytes = pattern(1, 8 * PAGE);
        let region = raising_region(&bytes);
        ADDRESS.store(region.as_ptr().addr().get() + 3 * PAGE, Ordering::SeqCst);
        populating(|| region.populate(2 * PAGE as u64..5 * PAGE as u64).unwrap());
        assert!(READ.load(Ordering::SeqCst) > 0 && WRONG.load(Ordering::SeqCst) == 0);
        assert!(region.as_slice() == bytes);
    });
    end.expect_pass();
}

static REGION: OnceLock<Region> = OnceLock::new();
static ERROR: AtomicPtr<Error> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn populate_all(_signal: c_int) {
    // A handler should not allocate. Here the interrupted thread does not hold the allocator's
    // lock.
    let region = REGION.get().expect("a region");
    if let Err(error) = region.populate(..) {
        ERROR.store(Box::into_raw(Box::new(error)), Ordering::SeqCst);
    }
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "the handler allocates, which is reported")]
#[expect(unsafe_code, reason = "takes the error from the handler's pointer")]
fn populate_in_a_signal_handler_of_a_thread_that_populates_is_an_error() {
    let test = this_test!();
    let end = child::run(test, || {
        end_if_hung();
        handle_user_signal(populate_all);
        let bytes = pattern(2, 8 * PAGE);
        REGION.set(raising_region(&bytes)).unwrap();
        populating(|| REGION.get().unwrap().populate(..).unwrap());
        let error = ERROR.load(Ordering::SeqCst);
        assert!(!error.is_null(), "the call in the handler has returned without an error");
        // SAFETY: the handler has put the box there and has returned.
        let error = unsafe { Box::from_raw(error) };
        assert_eq!(reason(&error), FailureReason::Nested, "{error}");
        assert!(REGION.get().unwrap().as_slice() == bytes);
    });
    end.expect_pass();
}

/// Reads pages of a region of [`LONG`] pages, others at each signal.
extern "C" fn read_some_pages(_signal: c_int) {
    let start = ADDRESS.load(Ordering::SeqCst);
    for _ in 0..if start == 0 { 0 } else { 16 } {
        let at = READ.fetch_add(1, Ordering::SeqCst) * 97 % LONG;
        if touch(start + at * PAGE) == 0 {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
    }
    storm::ended();
}

/// Pages of a region that is four times as long as its budget.
const LONG: usize = 6 * 1024;

#[test]
fn a_signal_handler_touches_pages_while_its_thread_evicts_pages() {
    let end = child::run(this_test!(), || {
        touch_while_evicting(&Pool::builder().workers(1).start().unwrap());
    });
    end.expect_pass();
}

/// The handler evicts pages itself, wherever it interrupts its thread.
#[test]
#[cfg_attr(sanitized = "thread", ignore = "handlers run with all signals blocked, SIGBUS too")]
fn a_signal_handler_evicts_pages_while_its_thread_evicts_pages() {
    let end = child::run(this_test!(), || touch_while_evicting(Inline));
    end.expect_pass();
}

fn touch_while_evicting(server: impl Into<Server>) {
    end_if_hung();
    handle_user_signal(read_some_pages);
    let budget = Budget::bytes((LONG * PAGE / 4) as u64).unwrap();
    let builder = Region::builder().budget(&budget);
    let region = builder.chunk(vec![7; LONG * PAGE]).build(server).unwrap();
    ADDRESS.store(region.as_ptr().addr().get(), Ordering::SeqCst);
    in_a_storm(|| {
        let parts = (0..LONG as u64 * PAGE as u64).step_by(PART as usize).cycle();
        parts
            .take_while(|_| {
                READ.load(Ordering::SeqCst) < rounds(1_500) as usize || budget.evictions() < rounds(2_000)
            })
            .for_each(|at| region.populate(at..at + PART).unwrap());
        ADDRESS.store(0, Ordering::SeqCst);
    });
    assert_eq!(WRONG.load(Ordering::SeqCst), 0);
}

/// The bytes that are populated at once, fewer than the budget.
const PART: u64 = 1 << 20;

/// An inline region of chunks that meet in pages.
fn inline_region(bytes: &[u8]) -> Region {
    Region::builder().chunks(bytes.chunks(1500).map(<[u8]>::to_vec)).build(Inline).unwrap()
}

/// As [`inline_region`], with the second half in a file.
fn inline_region_with_file(bytes: &[u8]) -> Region {
    let (memory, file) = bytes.split_at(bytes.len() / 2);
    let file = crate::inline_files::file_of(file);
    let chunks = memory.chunks(1500).map(<[u8]>::to_vec);
    Region::builder().chunks(chunks).chunk(file).build(Inline).unwrap()
}

/// Runs rounds of `step` under signals, until the handler has read a hundred bytes.
fn read_in_a_storm(step: impl Fn(usize)) {
    let enough = rounds(100) as usize;
    end_if_hung();
    handle_user_signal(read_a_byte);
    in_a_storm(|| {
        (0..).take_while(|_| READ.load(Ordering::SeqCst) < enough).for_each(step);
        ADDRESS.store(0, Ordering::SeqCst);
    });
    let (read, wrong) = (READ.load(Ordering::SeqCst), WRONG.load(Ordering::SeqCst));
    assert!(read >= enough && wrong == 0, "{read} right, {wrong} wrong");
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "handlers run with all signals blocked, SIGBUS too")]
fn a_signal_handler_touches_absent_pages_over_the_sigbus_handler() {
    let end = child::run(this_test!(), || {
        let region = inline_region_with_file(&pattern(3, 64 * PAGE));
        let start = region.as_ptr().addr().get();
        read_in_a_storm(|round| {
            for page in 0..64 {
                ADDRESS.store(start + page * PAGE, Ordering::SeqCst);
                assert_ne!(touch(start + page * PAGE), 0);
                // Discards another page, so that the handler finds absent pages.
                discard(start + (page + round) % 64 * PAGE, PAGE);
            }
        });
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "handlers run with all signals blocked, SIGBUS too")]
fn a_signal_handler_touches_inline_pages_that_its_thread_populates() {
    let end = child::run(this_test!(), || {
        let region = inline_region_with_file(&pattern(4, 64 * PAGE));
        let start = region.as_ptr().addr().get();
        read_in_a_storm(|round| {
            ADDRESS.store(start + round % 64 * PAGE, Ordering::SeqCst);
            region.populate(..).unwrap();
            discard(start, 64 * PAGE);
        });
    });
    end.expect_pass();
}

/// Memory of a file that is truncated later, as a source of an inline region.
struct CutShort(usize, usize);

impl AsRef<[u8]> for CutShort {
    #[expect(unsafe_code, reason = "memory that faults is part of the test")]
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping lives forever. The truncated file is part of the test.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.0), self.1) }
    }
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "handlers run with all signals blocked, SIGBUS too")]
#[expect(unsafe_code, reason = "maps a file that is truncated")]
fn a_fault_inside_the_sigbus_handler_ends_the_process_with_a_line() {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap};
    let end = child::run(this_test!(), || {
        end_if_hung();
        let memfd = pagestitch::source::UnsealedMemfd::create("short", PAGE as u64).unwrap();
        let length = std::num::NonZeroUsize::new(PAGE).unwrap();
        // SAFETY: a new mapping where the kernel chooses.
        let start =
            unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memfd.file(), 0) };
        let memory = CutShort(start.unwrap().as_ptr().expose_provenance(), PAGE);
        let builder = Region::builder().chunk(vec![1u8; 100]).chunk(pagestitch::source::Memory::new(memory));
        let region = builder.build(Inline).unwrap();
        memfd.file().set_len(0).unwrap();
        // The alternate stack has room for two signal frames. That of a thread may have none.
        with_alternate_stack(64 << 10, || {
            println!("read {}", touch(region.as_ptr().addr().get() + 200));
        });
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    let lines = end.output().matches("the SIGBUS handler itself touches").count();
    assert_eq!(lines, 1, "{}", end.output());
}

static BEFORE: OnceLock<SigAction> = OnceLock::new();
static PASSED_ON: AtomicUsize = AtomicUsize::new(0);

extern "C" fn passes_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    PASSED_ON.fetch_add(1, Ordering::SeqCst);
    if let Some(SigHandler::SigAction(before)) = BEFORE.get().map(SigAction::handler) {
        before(signal, info, context);
    }
}

#[test]
fn a_later_sigbus_handler_that_chains_keeps_regions_served() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(5, 20 * PAGE);
        let region = inline_region(&bytes);
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        BEFORE.set(handle(Signal::SIGBUS, SigHandler::SigAction(passes_on), flags)).unwrap();
        // Another region does not replace the chaining handler.
        let other = inline_region(&bytes);
        assert!(region.as_slice() == bytes && other.as_slice() == bytes);
        assert_eq!(PASSED_ON.load(Ordering::SeqCst), 40);
    });
    end.expect_pass();
}

#[expect(unsafe_code, reason = "ends the process in a signal handler")]
extern "C" fn keeps(_signal: c_int) {
    // SAFETY: the call takes a number and ends the process.
    unsafe { libc::_exit(3) }
}

#[test]
fn a_later_sigbus_handler_that_does_not_chain_gets_the_faults_and_no_zeros_are_read() {
    let test = this_test!();
    let end = child::run(test, || {
        let region = inline_region(&pattern(6, 20 * PAGE));
        handle_bus_errors(keeps);
        println!("the byte is {}", touch(region.as_ptr().addr().get()));
    });
    assert!(end.exit_code() == Some(3) && !end.output().contains("the byte is"), "{}", end.output());
}

static SENT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_signal: c_int) {
    SENT.fetch_add(1, Ordering::SeqCst);
}

/// SIGBUS arrives all the while that the first region is built, and each one finds a handler.
#[test]
fn no_signal_is_lost_while_the_sigbus_handler_is_installed() {
    for _ in 0..if cfg!(debug_assertions) { 20 } else { 5 } {
        let end = child::run(this_test!(), || {
            handle_bus_errors(count);
            let (done, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
            scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        raise(Signal::SIGBUS).unwrap();
                        sent.fetch_add(1, Ordering::SeqCst);
                    }
                });
                until(|| SENT.load(Ordering::SeqCst) > 0);
                let region = inline_region(&pattern(7, PAGE));
                assert_ne!(region.as_slice()[0], 0);
                done.store(true, Ordering::SeqCst);
            });
            assert_eq!(SENT.load(Ordering::SeqCst), sent.load(Ordering::SeqCst));
        });
        end.expect_pass();
    }
}

/// Runs `body` on this thread with a painted alternate stack, and returns the number of used bytes
/// of the stack.
#[expect(unsafe_code, reason = "an alternate stack is part of the test")]
fn with_alternate_stack(bytes: usize, body: impl FnOnce()) -> usize {
    const PAINT: u8 = 0xa5;
    let stack = Box::leak(vec![PAINT; bytes].into_boxed_slice());
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: bytes };
    let mut old = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    let painted = stack.as_ptr();
    // SAFETY: the stack lives forever, and no other code uses it.
    assert_eq!(unsafe { libc::sigaltstack(&raw const new, &raw mut old) }, 0);
    body();
    // SAFETY: the alternate stack from before.
    assert_eq!(unsafe { libc::sigaltstack(&raw const old, std::ptr::null_mut()) }, 0);
    // SAFETY: bytes of the leaked stack, which no handler uses any more.
    let untouched = (0..bytes).take_while(|&at| unsafe { painted.wrapping_add(at).read_volatile() } == PAINT);
    let untouched = untouched.count();
    bytes - untouched
}

/// Pages leave and come back, in the order of the touches and at random.
fn touch_more_than_a_budget() {
    let (pages, budget) = (6 * 256, Budget::bytes(5 << 20).unwrap());
    let bytes = pattern(11, pages * PAGE);
    let region = Region::builder().chunks(bytes.chunks(10_000).map(<[u8]>::to_vec)).budget(&budget);
    let region = region.build(Inline).unwrap();
    for page in (0..4 * pages).map(|step| step * if step > pages { 97 } else { 1 } % pages) {
        assert_eq!(touch(region.as_ptr().addr().get() + page * PAGE), bytes[page * PAGE]);
    }
    assert!(budget.evictions() > 500, "{:?}", budget.metrics());
}

#[test]
#[cfg_attr(sanitized, ignore = "instrumented frames need more stack")]
#[expect(unsafe_code, reason = "asks for the size of the kernel's signal frame")]
fn a_fault_is_served_on_a_small_alternate_stack() {
    let end = child::run(this_test!(), || {
        let mut deepest = 0;
        scope(|scope| {
            let measure = || {
                // SAFETY: the call takes a number.
                let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
                let nothing = with_alternate_stack(64 << 10, || {
                    handle(Signal::SIGUSR2, SigHandler::Handler(count), SaFlags::SA_ONSTACK);
                    raise(Signal::SIGUSR2).unwrap();
                });
                let used = with_alternate_stack(64 << 10, || {
                    let donated = crate::donated::pages_of(&pattern(9, 2 * PAGE));
                    let builder = Region::builder().chunk(donated).chunk(Chunk::hole(2 * PAGE as u64));
                    // A chunk that fills a page by itself, and chunks that meet in pages.
                    let builder = builder.chunk(pattern(12, PAGE));
                    let builder = builder.chunks(pattern(8, 20 * PAGE).chunks(700).map(<[u8]>::to_vec));
                    let builder = builder.chunk(crate::inline_files::file_of(&pattern(10, 4 * PAGE)));
                    let region = builder.build(Inline).unwrap();
                    let read: usize = (0..29)
                        .map(|page| usize::from(touch(region.as_ptr().addr().get() + page * PAGE)))
                        .sum();
                    assert!(read > 0);
                    // A discarded page, as if another thread had been faster.
                    discard(region.as_ptr().addr().get() + 5 * PAGE, PAGE);
                    assert_ne!(touch(region.as_ptr().addr().get() + 5 * PAGE), 0);
                    touch_more_than_a_budget();
                    crate::inline_writes::write_more_than_a_budget();
                    crate::inline_writes::write_to_a_file_that_takes_no_page();
                    crate::inline_writes::write_to_more_pages_than_may_be_dirty();
                });
                println!(
                    "AT_MINSIGSTKSZ {frame}, an empty handler {nothing}, a fault {used} bytes of the stack"
                );
                used.saturating_sub(nothing)
            };
            deepest = scope.spawn(measure).join().unwrap();
        });
        assert!(deepest > 0, "the handler did not run on the alternate stack");
        assert!(deepest <= pagestitch_kernel::sigbus::STACK_BYTES, "{deepest} bytes");
    });
    end.expect_pass();
    println!("{}", end.output());
}
