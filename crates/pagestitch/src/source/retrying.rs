//! A source whose failed reads are repeated.

use super::immutable::no_file;
use super::{Complete, Fetch, Reply, Source};
use crate::error::FailureReason;
use crate::retry::Retry;
use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;
use std::{io, thread};

/// A wrapper that repeats failed reads of its source, with the pauses of a [`Retry`].
///
/// [`OnFailure::Retry`](crate::OnFailure::Retry) of a chunk repeats reads too. Choose by the place
/// of the retry:
///
/// * **A source that a chunk reads directly:** the chunk's `on_failure`, whose pause holds no worker.
///   A read of a [`Source`] through this wrapper sleeps on its worker. A request to a [`Fetch`]
///   through this wrapper waits in the timer queue of the pool, as with `on_failure`.
/// * **A source below another wrapper:** this wrapper. `Cached<Retrying<S>>` repeats the read of a
///   block once for all of its readers.
/// * **Several chunks or regions of one source:** this wrapper states the retries once.
///
/// A panic of a [`Source`] is not repeated. A [`Fetch`] that drops its request, by a panic or not, gives
/// no answer, which is repeated as an error is. The drop of a region waits for a read that sleeps.
///
/// ```
/// use pagestitch::source::{FileSource, Retrying};
/// use pagestitch::{Chunk, Pool, Region, Retry};
/// use std::sync::Arc;
///
/// let file = Retrying::new(FileSource::open("/proc/self/exe")?, Retry::times(3));
/// let region = Region::builder().chunk(Chunk::source(Arc::new(file))).build(&Pool::new()?)?;
/// assert_eq!(&region.as_slice()[1..4], b"ELF");
/// # Ok::<(), pagestitch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Retrying<S> {
    inner: S,
    retry: Retry,
}

impl<S> Retrying<S> {
    /// Repeats failed reads of `source` as `retry` tells.
    #[must_use]
    pub const fn new(source: S, retry: Retry) -> Self {
        Self { inner: source, retry }
    }
}

impl<S: Source> Source for Retrying<S> {
    forward!(self => self.inner; size, name, granularity);

    fn direct(&self) -> Option<&dyn Any> {
        no_file(self.inner.direct())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut failures = 0;
        loop {
            let Err(error) = self.inner.read_at(offset, into) else { return Ok(()) };
            // A wrapper inside has caught a panic.
            if FailureReason::of(&error) == FailureReason::Panicked {
                return Err(error);
            }
            failures += 1;
            match self.retry.after(failures, random()) {
                Some(pause) => thread::sleep(pause),
                None => return Err(error),
            }
        }
    }
}

impl<S: Fetch> Fetch for Retrying<S> {
    forward!(self => self.inner; size, name, granularity);

    fn fetch(&self, offset: u64, reply: Reply) {
        let (bytes, failures) = (reply.len(), reply.failures());
        let retried = Box::new(Retried { reply, retry: self.retry });
        self.inner.fetch(offset, Reply::to_pages(retried, bytes).after(failures));
    }
}

/// A reply whose failure sends the request again. The count of failures travels with the request,
/// so the wrapper keeps nothing meanwhile.
#[derive(Debug)]
struct Retried {
    reply: Reply,
    retry: Retry,
}

impl Complete for Retried {
    fn complete(self: Box<Self>, answer: io::Result<&[u8]>) {
        let Self { reply, retry } = *self;
        let error = match answer {
            Ok(bytes) => return reply.complete(Ok(bytes)),
            Err(error) => error,
        };
        match retry.after(reply.failures().saturating_add(1), random()) {
            Some(pause) => reply.retry_after(pause, error),
            None => reply.fail(error),
        }
    }

    fn retry(self: Box<Self>, pause: Duration, error: io::Error) {
        self.reply.retry_after(pause, error);
    }
}

/// A number that differs between calls, for the random part of a pause.
fn random() -> u64 {
    RandomState::new().hash_one(())
}
