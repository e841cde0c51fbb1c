//! [`pagestitch`] in a [`tokio`] runtime.
//!
//! * An [`AsyncSource`] gets its bytes in tasks: as many fetches overlap as it may have under way, and no thread waits for them. It is a
//!   chunk of any region, whoever serves that: see [`chunk`].
//! * [`serve`] is a task that answers the faults of a [`Manual`] server: no thread but the runtime's.
//!
//! What touches a region waits for its pages as any memory does, without the runtime knowing: touch regions in threads of your own,
//! or in `spawn_blocking`, never in a task of the runtime that is to fill them.
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

/// Bytes that are read by a task. The contract is that of [`pagestitch::Source`], but for waiting: do it with `await`.
pub trait AsyncSource: Send + Sync {
    /// How many bytes there are. Asked when a chunk is made; a later change is not noticed.
    fn size(&self) -> u64;

    /// Gets the `len` bytes from `offset` on. Fewer, or more, are an error.
    ///
    /// # Errors
    ///
    /// Whatever kept it from that: whoever touches the page gets SIGBUS, `read_at` and `populate` return it.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Bytes>> + Send;

    /// What to call it in plans and errors. By default `"source"`.
    fn name(&self) -> String {
        String::from("source")
    }
}

/// All bytes of a source, read by tasks of a runtime, of which at most `concurrency` are under way at once; the others wait in
/// order. [`Chunk::range`] takes a part, and clones have the same limit.
///
/// When the runtime is shut down, what was not read is an error where it is touched.
///
/// # Panics
///
/// If `concurrency` is 0: nothing would ever be read.
pub fn chunk<S: AsyncSource + 'static>(source: Arc<S>, runtime: &Handle, concurrency: usize) -> Chunk {
    assert!(concurrency > 0, "nothing would ever be read: allow 1 or more at once");
    let permits = Arc::new(Semaphore::new(concurrency.min(Semaphore::MAX_PERMITS)));
    Chunk::fetch(Arc::new(InTasks { source, runtime: runtime.clone(), permits }))
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
        // Where the runtime drops the task, or the source panics, the reply is dropped, and says so.
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
}

/// Serves the faults of a [`Manual`] in a task, a few at a time, and never returns but for an error. Dropping the task drops the
/// `Manual`: drop its regions first.
///
/// Sources that block hold up the runtime's thread: give it [async ones](chunk), memory, or files that are in memory.
///
/// # Errors
///
/// If the runtime cannot watch its descriptor: it has no I/O driver (`enable_io`), or the process no descriptors.
pub async fn serve(manual: Manual) -> io::Result<Infallible> {
    // SAFETY: a Manual has one descriptor, an epoll of its own that stays open as long as it lives.
    #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
    let ready = unsafe { AsyncFd::register_with_interest(manual, Interest::READABLE) };
    let mut ready = ready?;
    loop {
        let mut guard = ready.readable_mut().await?;
        if guard.get_inner_mut().serve_ready(AT_ONCE) == 0 {
            guard.clear_ready();
        }
        // Others have their turn, too.
        tokio::task::yield_now().await;
    }
}

/// Faults served before others have their turn.
const AT_ONCE: usize = 32;
