//! Asynchronous sources: one thread requests the bytes and another one delivers them, for runtimes
//! and completion queues.

use super::Source;
use crate::error::{Bytes, FailureReason};
use crossbeam_channel::{Sender, bounded};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io, thread};

/// An asynchronous source. The requesting thread does not wait, so as many faults are in flight as
/// the source accepts.
///
/// Implement it for a source with its own way to wait: a runtime (`pagestitch-tokio` adapts any
/// `async` source), an io_uring, a connection with many requests in flight. [`Source`] is simpler
/// for all others.
///
/// Faults on pages that lie in one chunk are fetched asynchronously. A fault on a page that several
/// chunks share, [`populate`](crate::AnyRegion::populate) and [`read_at`](crate::Region::read_at) send
/// the request and block until the reply. Never call these, or touch the region, on a thread that
/// delivers replies.
///
/// ```
/// use pagestitch::source::{Fetch, Reply};
/// use pagestitch::{Chunk, Pool, Region};
/// use std::sync::Arc;
///
/// struct Sevens;
/// impl Fetch for Sevens {
///     fn size(&self) -> u64 {
///         1 << 20
///     }
///     fn fetch(&self, _offset: u64, reply: Reply) {
///         let sevens = vec![7; reply.len()];
///         std::thread::spawn(move || reply.answer(&sevens));       // on any thread, at any time
///     }
/// }
/// let region = Region::builder().chunk(Chunk::fetch(Arc::new(Sevens))).build(&Pool::new()?)?;
/// assert_eq!(region.as_slice()[500_000], 7);
/// # Ok::<(), pagestitch::Error>(())
/// ```
pub trait Fetch: Send + Sync {
    /// As [`Source::size`].
    fn size(&self) -> u64;

    /// Requests the [`reply.len()`](Reply::len) bytes from `offset` on, and returns without waiting
    /// for them. Any thread may call it, several at once.
    fn fetch(&self, offset: u64, reply: Reply);

    /// As [`Source::name`]. Default: `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }

    /// As [`Source::granularity`]. Default: 1, no preference.
    fn granularity(&self) -> u64 {
        1
    }
}

/// Implements [`Fetch`] for pointers to sources.
macro_rules! fetch_for_pointers {
    ($($pointer:ty),*) => {$(
        /// A pointer to a source is a source, so that wrappers take shared, boxed and unsized ones.
        impl<F: Fetch + ?Sized> Fetch for $pointer {
            forward!(self => (**self); size, name, granularity);

            fn fetch(&self, offset: u64, reply: Reply) {
                (**self).fetch(offset, reply);
            }
        }
    )*};
}

fetch_for_pointers!(Arc<F>, Box<F>, &F);

/// The destination of requested bytes. Dropping it without an answer is an error of the source, so
/// that no thread waits forever.
#[derive(Debug)]
#[must_use = "a thread waits for the answer"]
pub struct Reply {
    to: Option<To>,
    bytes: usize,
    /// The number of times that the same request has failed before.
    failures: u32,
}

#[derive(Debug)]
enum To {
    /// Pages of a region.
    Pages(Box<dyn Complete>),
    /// A thread that blocks until the reply.
    Thread(Sender<Result<Vec<u8>, NoBytes>>),
}

/// A reply without bytes, to a thread that blocks.
enum NoBytes {
    Failed(io::Error),
    /// The thread sends the request again after a pause.
    Again(Duration),
}

/// Receives the bytes that a fetch requested. The fault layer implements it, because a source knows
/// nothing of pages; so does each wrapper of an asynchronous source. One of the methods is called,
/// once, on the thread that answers.
pub(crate) trait Complete: fmt::Debug + Send + Sync {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>);

    /// As `complete` with an error; but the same request is sent again after `pause`, if it can be.
    fn retry(self: Box<Self>, pause: Duration, error: io::Error);
}

impl Reply {
    pub(crate) fn to_pages(pages: Box<dyn Complete>, bytes: usize) -> Self {
        Self { to: Some(To::Pages(pages)), bytes, failures: 0 }
    }

    /// A reply to a request that has failed so many times before.
    pub(crate) fn after(mut self, failures: u32) -> Self {
        self.failures = failures;
        self
    }

    /// The number of requested bytes.
    #[expect(clippy::len_without_is_empty, reason = "at least one byte is requested")]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// The number of times that the same request was [sent again](Self::retry_after).
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// Delivers the bytes: installs them on the calling thread and wakes the waiting threads. The
    /// request fails if `bytes` is not [`len`](Self::len) bytes long.
    pub fn answer(mut self, bytes: &[u8]) {
        let wrong = || {
            FailureReason::WrongLength.error(format!(
                "the source gave {} where {} were requested",
                Bytes(bytes.len() as u64),
                self.bytes
            ))
        };
        let answer = if bytes.len() == self.bytes { Ok(bytes) } else { Err(wrong()) };
        self.give(answer);
    }

    /// Fails the request with `error`.
    pub fn fail(mut self, error: io::Error) {
        self.give(Err(error));
    }

    /// Fails the request with `error` for now: the page waits, and the source is asked again after
    /// `pause`, with one more [failure](Self::failures). No thread waits meanwhile, except for the
    /// thread of a request that blocks. A request that was ahead of its touch just fails, because
    /// the touch asks again.
    ///
    /// ```
    /// use pagestitch::source::{Fetch, Reply};
    /// use std::io;
    /// use std::time::Duration;
    ///
    /// struct Store;
    /// impl Store {
    ///     fn is_busy(&self) -> bool {
    ///         true
    ///     }
    /// }
    /// impl Fetch for Store {
    ///     fn size(&self) -> u64 {
    ///         1 << 20
    ///     }
    ///     fn fetch(&self, _offset: u64, reply: Reply) {
    ///         if self.is_busy() && reply.failures() < 3 {
    ///             return reply.retry_after(Duration::from_millis(5), io::ErrorKind::ResourceBusy.into());
    ///         }
    ///         let sevens = vec![7; reply.len()];
    ///         reply.answer(&sevens);
    ///     }
    /// }
    /// # use pagestitch::{Chunk, Pool, Region};
    /// # let region = Region::builder().chunk(Chunk::fetch(std::sync::Arc::new(Store))).build(&Pool::new()?)?;
    /// # assert_eq!(region.as_slice()[0], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn retry_after(mut self, pause: Duration, error: io::Error) {
        match self.to.take() {
            Some(To::Pages(pages)) => pages.retry(pause, error),
            Some(To::Thread(sender)) => drop(sender.send(Err(NoBytes::Again(pause)))),
            None => {}
        }
    }

    /// Answers or fails.
    pub(super) fn complete(mut self, answer: io::Result<&[u8]>) {
        self.give(answer);
    }

    fn give(&mut self, answer: io::Result<&[u8]>) {
        match self.to.take() {
            Some(To::Pages(pages)) => pages.complete(answer),
            // A failure means that no thread waits any more.
            Some(To::Thread(sender)) => {
                drop(sender.send(answer.map(<[u8]>::to_vec).map_err(NoBytes::Failed)));
            }
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.give(Err(FailureReason::NoReply.error("the source gave no answer: it dropped the request")));
    }
}

/// An asynchronous source as a blocking one: requests the bytes and waits for the reply.
#[derive(Clone)]
pub(crate) struct Fetched {
    source: Arc<dyn Fetch>,
    /// The address of the user's source. The `Arc` above is another one for each chunk.
    address: usize,
}

impl Fetched {
    pub(crate) fn new<F: Fetch + ?Sized + 'static>(source: Arc<F>) -> Self {
        let address = Arc::as_ptr(&source).addr();
        // An unsized source cannot become a `dyn Fetch`, but the `Arc` around it can.
        Self { source: Arc::new(source), address }
    }

    pub(crate) fn fetch(&self, offset: u64, reply: Reply) {
        self.source.fetch(offset, reply);
    }

    /// The address that distinguishes the source from others.
    pub(super) const fn address(&self) -> usize {
        self.address
    }
}

impl Source for Fetched {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        for failures in 0.. {
            let (sender, answer) = bounded(1);
            self.source.fetch(offset, Reply { to: Some(To::Thread(sender)), bytes: into.len(), failures });
            match answer.recv().expect("a reply sends an answer, at the latest in its drop") {
                Ok(bytes) => {
                    into.copy_from_slice(&bytes);
                    return Ok(());
                }
                Err(NoBytes::Failed(error)) => return Err(error),
                Err(NoBytes::Again(pause)) => thread::sleep(pause),
            }
        }
        unreachable!("a source retries no request 2^32 times")
    }

    fn name(&self) -> String {
        self.source.name()
    }

    fn granularity(&self) -> u64 {
        self.source.granularity()
    }
}
