//! The contract of a source.

use std::io;

/// Bytes that can be read at an offset: the trait to implement for a source of your own.
///
/// # Contract
///
/// * **Threads.** Methods are called from any thread: the pool's workers, and callers of
///   [`Region::populate`](crate::Region::populate) or [`Region::read_at`](crate::Region::read_at); several at once, also
///   for the same offset.
/// * **How often.** [`read_at`](Self::read_at) is called once for each page in the ordinary case, and for several pages at once
///   when more is asked for. It is called again for a page that was let go (`MADV_DONTNEED`) and touched anew.
///   The answer must not depend on how a range is split.
/// * **Blocking.** It may block: it then occupies the worker that called it, not the region. While a region is
///   dropped, the drop waits for calls in progress.
/// * **Failing.** An error becomes the page's error: a touch of the page is SIGBUS, `read_at` and `populate` of
///   the region return it. A panic is turned into such an error, also one of [`name`](Source::name), of the error or of a destructor.
/// * **Hanging.** A call that takes 10 ms or more holds up a thread, which the pool replaces up to
///   [`max_workers`](crate::PoolBuilder::max_workers).
/// * **Never** touch a region that the same pool serves, not even another one: the worker would wait for itself.
///
/// `pagestitch-testkit` has a conformance suite that checks what can be checked of this.
///
/// # Example
///
/// ```
/// use std::io;
/// use pagestitch::Source;
///
/// /// The same byte over and over.
/// struct Pattern(u8, u64);
///
/// impl Source for Pattern {
///     fn size(&self) -> u64 {
///         self.1
///     }
///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
///         into.fill(self.0);
///         Ok(())
///     }
/// }
/// ```
pub trait Source: Send + Sync {
    /// The length in bytes. Called when a chunk is created; later changes have no effect.
    fn size(&self) -> u64;

    /// Fills all of `into` with the bytes from `offset` on.
    ///
    /// `offset + into.len()` is at most [`size`](Self::size). On entry `into` holds arbitrary
    /// bytes.
    ///
    /// # Errors
    ///
    /// The reason why not *all* of `into` could be filled.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// The name in plans and errors: a path, a key, a kind. Default: `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }
}
