//! [`pagestitch`] in a [`tokio`] runtime.
//!
//! * An [`AsyncSource`] reads its bytes in tasks, and a [`chunk`] of it may be part of any region.
//!   Its fetches overlap up to a limit, and no thread waits for them. [`fetch`] is for a source that
//!   is cached or retried.
//! * [`serve`] is a task that serves the faults of a [`Manual`] server, on the threads of the
//!   runtime.
//! * [`populate()`] fills a range of a region, and no thread waits for it. Dropping it cancels it.
//!
//! A touch of a region blocks its thread, and the runtime does not know. Touch regions in threads
//! of your own or in `spawn_blocking`, never in a task of the runtime that fills them.
//!
//! ```
//! use bytes::Bytes;
//! use pagestitch::{Pool, Region};
//! use pagestitch_tokio::{AsyncSource, chunk};
//! use std::{io, sync::Arc, time::Duration};
//!
//! /// An object in a store, ten milliseconds away.
//! struct Far;
//!
//! impl AsyncSource for Far {
//!     fn size(&self) -> u64 {
//!         64 * 4096
//!     }
//!     async fn read(&self, _offset: u64, len: usize) -> io::Result<Bytes> {
//!         tokio::time::sleep(Duration::from_millis(10)).await;
//!         Ok(vec![7; len].into())
//!     }
//! }
//!
//! let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
//! let far = chunk(Arc::new(Far), runtime.handle(), 16);
//! let region = Region::builder().chunk(far).build(&Pool::new()?)?;
//! assert_eq!(region.as_slice()[100_000], 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod populate;

pub use populate::populate;

use bytes::Bytes;
use pagestitch::source::{Fetch, Reply};
use pagestitch::{Chunk, Manual};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// A source whose bytes a task reads. The contract is that of [`pagestitch::Source`], except that
/// `read` waits with `await`.
pub trait AsyncSource: Send + Sync {
    /// The number of bytes. Asked when a chunk is made; a later change goes unnoticed.
    fn size(&self) -> u64;

    /// Reads the `len` bytes from `offset` on. Any other length of the answer is an error.
    ///
    /// # Errors
    ///
    /// Any error of the source. A touch of the page then raises SIGBUS; `read_at` and `populate`
    /// return the error.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Bytes>> + Send;

    /// The name of the source in plans and errors. By default `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }

    /// The preferred size of a read in bytes, as [`pagestitch::Source::granularity`]. Default: 1, no
    /// preference.
    fn granularity(&self) -> u64 {
        1
    }
}

/// A chunk of all bytes of a source, which tasks of a runtime read. At most `concurrency` reads run
/// at once; the others wait in order. [`Chunk::range`] takes a part, and clones share the limit.
///
/// After the runtime has shut down, a touch of an unread page is an error.
///
/// # Panics
///
/// If `concurrency` is 0, because no read could ever run.
pub fn chunk<S: AsyncSource + 'static>(source: Arc<S>, runtime: &Handle, concurrency: usize) -> Chunk {
    Chunk::fetch(Arc::new(fetch(source, runtime, concurrency)))
}

/// A source for [`Chunk::fetch`], as [`chunk`] makes it, for the wrappers of [`pagestitch::source`].
///
/// ```
/// use bytes::Bytes;
/// use pagestitch::source::{Cached, Retrying};
/// use pagestitch::{Chunk, Pool, Region, Retry};
/// use pagestitch_tokio::{AsyncSource, fetch};
/// use std::{io, sync::Arc};
///
/// struct Object;
///
/// impl AsyncSource for Object {
///     fn size(&self) -> u64 {
///         1 << 20
///     }
///     async fn read(&self, _offset: u64, len: usize) -> io::Result<Bytes> {
///         Ok(vec![7; len].into())                                     // a GET with a Range header
///     }
///     fn granularity(&self) -> u64 {
///         64 << 10
///     }
/// }
///
/// let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
/// let object = Retrying::new(fetch(Arc::new(Object), runtime.handle(), 16), Retry::times(5));
/// let object = Arc::new(Cached::new(object, 16 << 20));               // one cache for all regions
/// let region = Region::builder().chunk(Chunk::fetch(object)).build(&Pool::new()?)?;
/// assert_eq!(region.as_slice()[500_000], 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
///
/// If `concurrency` is 0, because no read could ever run.
pub fn fetch<S: AsyncSource + 'static>(
    source: Arc<S>,
    runtime: &Handle,
    concurrency: usize,
) -> impl Fetch + use<S> {
    assert!(concurrency > 0, "concurrency is 0, so no read could ever run: allow 1 or more");
    let permits = Arc::new(Semaphore::new(concurrency.min(Semaphore::MAX_PERMITS)));
    InTasks { source, runtime: runtime.clone(), permits }
}

struct InTasks<S> {
    source: Arc<S>,
    runtime: Handle,
    permits: Arc<Semaphore>,
}

impl<S: AsyncSource + 'static> Fetch for InTasks<S> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn fetch(&self, offset: u64, reply: Reply) {
        let (source, permits) = (Arc::clone(&self.source), Arc::clone(&self.permits));
        // If the runtime drops the task, or the source panics, the dropped reply reports an error.
        self.runtime.spawn(async move {
            let _permit = permits.acquire().await;
            match source.read(offset, reply.len()).await {
                Ok(bytes) => reply.answer(&bytes),
                Err(error) => reply.fail(error),
            }
        });
    }

    fn name(&self) -> String {
        self.source.name()
    }

    fn granularity(&self) -> u64 {
        self.source.granularity()
    }
}

/// Serves the faults of a [`Manual`] in a task, a few at a time. Returns only after an error.
/// Dropping the task drops the `Manual`, so drop its regions first.
///
/// A source that blocks holds up a thread of the runtime. Use [async sources](chunk), memory, or
/// cached files.
///
/// # Errors
///
/// If the runtime cannot watch the descriptor: it has no I/O driver (`enable_io`), or the process
/// has no free descriptors.
pub async fn serve(manual: Manual) -> io::Result<Infallible> {
    // SAFETY: the only descriptor of a Manual is its own epoll, which stays open as long as the
    // Manual.
    #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
    let ready = unsafe { AsyncFd::register_with_interest(manual, Interest::READABLE) };
    let mut ready = ready?;
    loop {
        let mut guard = ready.readable_mut().await?;
        if guard.get_inner_mut().serve_ready(AT_ONCE) == 0 {
            guard.clear_ready();
        }
        // Lets other tasks run.
        tokio::task::yield_now().await;
    }
}

/// The most faults that are served before other tasks run.
const AT_ONCE: usize = 32;
