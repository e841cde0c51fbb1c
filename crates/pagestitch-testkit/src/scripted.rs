//! Sources that count, fail, panic or hold their reads, for tests without sleeps.

use pagestitch::Source;
use parking_lot::{Condvar, Mutex};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A source of known bytes that follows a script.
///
/// ```
/// use pagestitch::Source;
/// use pagestitch_testkit::scripted::Scripted;
///
/// let source = Scripted::new(10_000).failing(4096..8192);
/// assert!(source.read_at(0, &mut [0; 100]).is_ok());
/// assert!(source.read_at(4000, &mut [0; 100]).is_err());
/// assert_eq!(source.reads(), 2);
/// ```
#[derive(Debug)]
pub struct Scripted {
    size: u64,
    failing: Range<u64>,
    panicking: Range<u64>,
    holding: Range<u64>,
    reads: AtomicU64,
    repaired: AtomicBool,
    barrier: ReadBarrier,
}

impl Scripted {
    /// Makes a source of `size` bytes of [`byte_at`], which serves every read.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let barrier = ReadBarrier::default();
        Self {
            size,
            failing: 0..0,
            panicking: 0..0,
            holding: 0..0,
            reads: AtomicU64::new(0),
            repaired: AtomicBool::new(false),
            barrier,
        }
    }

    /// Fails each read that overlaps these bytes with [`io::ErrorKind::ConnectionReset`].
    #[must_use]
    pub fn failing(self, bytes: Range<u64>) -> Self {
        Self { failing: bytes, ..self }
    }

    /// Panics in each read that overlaps these bytes.
    #[must_use]
    pub fn panicking(self, bytes: Range<u64>) -> Self {
        Self { panicking: bytes, ..self }
    }

    /// Holds each read that overlaps these bytes until [`release`](Self::release).
    #[must_use]
    pub fn holding(self, bytes: Range<u64>) -> Self {
        Self { holding: bytes, ..self }
    }

    /// Ends the failures: reads succeed from now on.
    pub fn repair(&self) {
        self.repaired.store(true, Ordering::SeqCst);
    }

    /// The number of reads so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    /// Waits until `n` reads are held.
    pub fn wait_until_held(&self, n: usize) {
        let mut state = self.barrier.state.lock();
        while state.held < n {
            self.barrier.changed.wait(&mut state);
        }
    }

    /// Releases held reads, and holds no more.
    pub fn release(&self) {
        self.barrier.state.lock().open = true;
        self.barrier.changed.notify_all();
    }
}

impl Source for Scripted {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let end = offset + into.len() as u64;
        let meets = |range: &Range<u64>| offset < range.end && range.start < end;
        if meets(&self.holding) {
            self.barrier.pass();
        }
        assert!(!meets(&self.panicking), "scripted to panic");
        if meets(&self.failing) && !self.repaired.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::ConnectionReset, "scripted to fail"));
        }
        fill(offset, into);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("scripted")
    }
}

/// The byte at an offset of a [`Scripted`] source. It is never 0, so that a test notices zeros.
#[must_use]
pub const fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
}

/// Fills `into` with the bytes from an offset of a [`Scripted`] source on.
///
/// ```
/// use pagestitch_testkit::scripted::{byte_at, fill, is_filled};
///
/// let mut bytes = [0; 100];
/// fill(4000, &mut bytes);
/// assert_eq!(bytes[99], byte_at(4099));
/// assert!(is_filled(4000, &bytes));
/// bytes[99] = 0;
/// assert!(!is_filled(4000, &bytes));
/// ```
pub fn fill(offset: u64, into: &mut [u8]) {
    into.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = byte_at(at));
}

/// True if these are the bytes from an offset of a [`Scripted`] source on.
#[must_use]
pub fn is_filled(offset: u64, bytes: &[u8]) -> bool {
    bytes.iter().zip(offset..).all(|(&byte, at)| byte == byte_at(at))
}

#[derive(Debug, Default)]
struct ReadBarrier {
    state: Mutex<BarrierState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct BarrierState {
    open: bool,
    held: usize,
}

impl ReadBarrier {
    fn pass(&self) {
        let mut state = self.state.lock();
        state.held += 1;
        self.changed.notify_all();
        while !state.open {
            self.changed.wait(&mut state);
        }
        state.held -= 1;
    }
}
