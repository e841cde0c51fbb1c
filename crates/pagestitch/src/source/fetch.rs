//! Asynchronous sources: one thread requests the bytes and another one delivers them, for runtimes
//! and completion queues.

use super::Source;
use crossbeam_channel::{Sender, bounded};
use std::sync::Arc;
use std::{fmt, io};

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
}

/// The destination of requested bytes. Dropping it without an answer is an error of the source, so
/// that no thread waits forever.
#[derive(Debug)]
#[must_use = "a thread waits for the answer"]
pub struct Reply {
    to: Option<To>,
    bytes: usize,
}

#[derive(Debug)]
enum To {
    /// Pages of a region.
    Pages(Box<dyn Complete>),
    /// A thread that blocks until the reply.
    Thread(Sender<io::Result<Vec<u8>>>),
}

/// Receives the bytes that a fetch requested. The fault layer implements it, because a source knows
/// nothing of pages.
pub(crate) trait Complete: fmt::Debug + Send + Sync {
    /// Called once, on the thread that answers.
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>);
}

impl Reply {
    pub(crate) fn to_pages(pages: Box<dyn Complete>, bytes: usize) -> Self {
        Self { to: Some(To::Pages(pages)), bytes }
    }

    /// The number of requested bytes.
    #[expect(clippy::len_without_is_empty, reason = "at least one byte is requested")]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Delivers the bytes: installs them on the calling thread and wakes the waiting threads. The
    /// request fails if `bytes` is not [`len`](Self::len) bytes long.
    pub fn answer(mut self, bytes: &[u8]) {
        let wrong = || {
            io::Error::other(format!(
                "the source gave {} bytes where {} were requested",
                bytes.len(),
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

    fn give(&mut self, answer: io::Result<&[u8]>) {
        match self.to.take() {
            Some(To::Pages(pages)) => pages.complete(answer),
            // A failure means that no thread waits any more.
            Some(To::Thread(sender)) => drop(sender.send(answer.map(<[u8]>::to_vec))),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.give(Err(io::Error::other("the source gave no answer: it dropped the request")));
    }
}

/// An asynchronous source as a blocking one: requests the bytes and waits for the reply.
#[derive(Clone)]
pub(crate) struct Fetched(pub(crate) Arc<dyn Fetch>);

impl Source for Fetched {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let (sender, answer) = bounded(1);
        self.0.fetch(offset, Reply { to: Some(To::Thread(sender)), bytes: into.len() });
        into.copy_from_slice(&answer.recv().expect("a reply sends an answer, at the latest in its drop")?);
        Ok(())
    }

    fn name(&self) -> String {
        self.0.name()
    }
}
