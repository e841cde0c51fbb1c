//! A kernel that gives rare answers: for tests, behind the feature `inject`.
//!
//! [`around`] stands between the crate and each operation that fills pages. From time to time it
//! lets the operation do less, nothing, or come too late, and returns the kernel's answer for that
//! case. A kernel can do all of this, so the caller must end well: the page is filled or poisoned,
//! and no thread waits forever. Not for pages of hugetlbfs.
//!
//! The kernel's messages can be [pretended](pretend) too.

mod pretend;

pub use pretend::pretend;

use super::abi::Waiters;
use super::outcome::{Operation, Outcome};
use crate::page::{AddressRange, PageSize};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// An injected answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// `EAGAIN` without progress: the map is changing.
    Again,
    /// Some pages of several are filled, then `EAGAIN`.
    Partial,
    /// `EEXIST`: another thread has filled the page first, and has woken no waiter.
    Exists,
    /// `EBUSY`, to a move: a page is pinned.
    Busy,
    /// `ENOMEM`, to an operation that fills a page.
    NoMemory,
    /// `ENOMEM`, to a poison marker. Not for foreign memory, whose owner would be ended for it.
    NoMarker,
    /// `ESRCH`: the process that owned the memory has gone. Not for foreign memory, because the
    /// caller would believe it.
    ProcessGone,
}

impl Injected {
    const ALL: [Self; 7] = [
        Self::Again,
        Self::Partial,
        Self::Exists,
        Self::Busy,
        Self::NoMemory,
        Self::NoMarker,
        Self::ProcessGone,
    ];

    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// True if the kernel can give this answer to the operation on these pages.
    fn suits(self, operation: Operation, range: AddressRange, own: bool) -> bool {
        match self {
            Self::Again => true,
            Self::Partial => range.bytes() > PageSize::system().bytes(),
            // The source page has not moved, so no other thread can have filled the target with it.
            Self::Exists => operation != Operation::Move,
            Self::Busy => operation == Operation::Move,
            Self::NoMemory => operation != Operation::Poison,
            Self::NoMarker => own && operation == Operation::Poison,
            Self::ProcessGone => own && operation != Operation::Poison,
        }
    }
}

/// Injects one of `one_of` answers from now on, in the whole process: one of `kinds`, as `seed`
/// decides. With 0, none. The first operation that a kind suits gets it, because a test may have
/// a single one.
pub fn inject(one_of: u32, kinds: &[Injected], seed: u64) {
    let mask = if one_of == 0 { 0 } else { kinds.iter().fold(0, |mask, &kind| mask | kind.bit()) };
    KINDS.store(mask, Ordering::SeqCst);
    OWED.store(mask, Ordering::SeqCst);
    RANDOM.store(seed, Ordering::SeqCst);
    ONE_OF.store(one_of, Ordering::SeqCst);
}

/// The number of injected answers of each kind so far.
#[must_use]
pub fn injected() -> [(Injected, u64); 7] {
    Injected::ALL.map(|kind| (kind, COUNTS[kind as usize].load(Ordering::Relaxed)))
}

/// Runs an operation, or injects an answer.
pub(super) fn around(
    operation: Operation,
    range: AddressRange,
    own: bool,
    ask: impl Fn(AddressRange, Waiters) -> Outcome,
) -> Outcome {
    let suits = |kind: &Injected| kind.suits(operation, range, own);
    let Some(kind) = owed(suits).or_else(|| fate().filter(suits)) else {
        return ask(range, Waiters::Woken);
    };
    COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed);
    match kind {
        Injected::Again => Outcome::Changing,
        Injected::Busy => Outcome::Busy,
        Injected::NoMemory | Injected::NoMarker => Outcome::NoMemory,
        Injected::ProcessGone => Outcome::ProcessGone,
        Injected::Partial => match ask(half(range), Waiters::Woken) {
            Outcome::Done => Outcome::Partial { bytes: half(range).bytes() },
            outcome => outcome,
        },
        Injected::Exists => {
            let _ = ask(first(range, 1), Waiters::LeftAsleep);
            ask(range, Waiters::Woken)
        }
    }
}

/// A kind that suits and has not been answered since the injection began.
fn owed(suits: impl Fn(&Injected) -> bool) -> Option<Injected> {
    let owed = OWED.load(Ordering::Relaxed);
    let kind = Injected::ALL.into_iter().filter(|kind| owed & kind.bit() != 0).find(suits)?;
    let before = OWED.fetch_and(!kind.bit(), Ordering::Relaxed);
    (before & kind.bit() != 0).then_some(kind)
}

fn fate() -> Option<Injected> {
    let one_of = ONE_OF.load(Ordering::Relaxed);
    if one_of == 0 {
        return None;
    }
    let random = random();
    let mask = KINDS.load(Ordering::Relaxed);
    let mut wanted = Injected::ALL.into_iter().filter(|kind| mask & kind.bit() != 0);
    let kind = wanted.nth((random >> 32) as usize % (mask.count_ones().max(1) as usize));
    kind.filter(|_| (random as u32) % one_of == 0)
}

/// The next number of a sequence that all threads share (splitmix64).
fn random() -> u64 {
    let mut z = RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn half(range: AddressRange) -> AddressRange {
    first(range, (range.bytes() / PageSize::system().bytes() / 2).max(1))
}

fn first(range: AddressRange, pages: usize) -> AddressRange {
    let page = PageSize::system();
    AddressRange::new(range.start(), pages * page.bytes(), page).expect("whole pages of a range of such")
}

static ONE_OF: AtomicU32 = AtomicU32::new(0);
static KINDS: AtomicU32 = AtomicU32::new(0);
static OWED: AtomicU32 = AtomicU32::new(0);
static RANDOM: AtomicU64 = AtomicU64::new(0);
static COUNTS: [AtomicU64; 7] = [const { AtomicU64::new(0) }; 7];
