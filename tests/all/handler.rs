//! A Firecracker handler that runs in a thread of the test.

use crate::{comes_true, until};
use pagestitch_firecracker::{Builder, Event, Handler, HandshakeError, ShutdownHandle};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A running handler, its folder with the socket, and the events that it reported. Its drop stops
/// it, and prints the events of a test that failed.
pub(crate) struct RunningHandler {
    pub(crate) folder: TempDir,
    shutdown: ShutdownHandle,
    events: Arc<Mutex<Vec<Reported>>>,
    thread: Option<JoinHandle<()>>,
}

impl RunningHandler {
    /// Binds a handler to `socket` in the folder and runs it.
    pub(crate) fn start(folder: TempDir, builder: Builder) -> Self {
        let handler = builder.bind(folder.path().join("socket")).unwrap();
        Self::run(folder, handler)
    }

    /// Runs a handler that is bound to `socket` in the folder.
    pub(crate) fn run(folder: TempDir, handler: Handler) -> Self {
        let (shutdown, events) = (handler.shutdown_handle(), Arc::<Mutex<Vec<Reported>>>::default());
        let thread = thread::spawn({
            let events = Arc::clone(&events);
            move || handler.run(|event| events.lock().unwrap().push(Reported::of(event))).unwrap()
        });
        Self { folder, shutdown, events, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn events(&self) -> Vec<Reported> {
        self.events.lock().unwrap().clone()
    }

    /// The number of events that `is` accepts.
    pub(crate) fn reported(&self, is: impl Fn(&Seen) -> bool) -> usize {
        self.events.lock().unwrap().iter().filter(|event| is(&event.seen)).count()
    }

    pub(crate) fn until_reported(&self, is: impl Fn(&Seen) -> bool) {
        until(|| self.reported(&is) > 0);
    }

    /// Waits until a client is refused for a reason that `is` accepts.
    pub(crate) fn until_refused(&self, is: impl Fn(&Refusal) -> bool) {
        self.until_reported(|seen| matches!(seen, Seen::Refused { reason, .. } if is(reason)));
    }

    /// Tells the handler to stop, and returns at once.
    pub(crate) fn request_shutdown(&self) {
        self.shutdown.shutdown();
    }

    /// Stops the handler, which must not hang.
    pub(crate) fn stop(&mut self) {
        self.try_stop().expect("the handler stops");
    }

    /// The time that the handler takes to stop. `None` if it hangs.
    pub(crate) fn try_stop(&mut self) -> Option<Duration> {
        let began = Instant::now();
        self.request_shutdown();
        if let Some(thread) = self.thread.take_if(|thread| comes_true(|| thread.is_finished())) {
            thread.join().unwrap();
        }
        self.thread.is_none().then(|| began.elapsed())
    }
}

/// An event, and its line for a person.
#[derive(Debug, Clone)]
pub(crate) struct Reported {
    pub(crate) seen: Seen,
    pub(crate) line: String,
}

/// The content of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    Restored { bytes: u64 },
    Refused { pid: Option<u32>, reason: Refusal },
    Ended { pages_lost: usize },
    Recorded { pages: Option<usize> },
    Filled { pages: u64, pages_missing: u64 },
    Detached,
}

/// The reason why a client is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    Garbage,
    TooLong,
    Closed { bytes: usize, fds: usize },
    TimedOut { after: Duration, bytes: usize, fds: usize },
    Descriptors(usize),
    NotUserfaultfd(String),
    Size { guest: u64, file: u64 },
    Other(String),
}

pub(crate) const fn is_restored(seen: &Seen) -> bool {
    matches!(seen, Seen::Restored { .. })
}

pub(crate) const fn has_ended(seen: &Seen) -> bool {
    matches!(seen, Seen::Ended { .. })
}

/// True for the end of a guest that has lost no page.
pub(crate) const fn has_ended_whole(seen: &Seen) -> bool {
    matches!(seen, Seen::Ended { pages_lost: 0 })
}

impl Reported {
    fn of(event: &Event<'_>) -> Self {
        let seen = match event {
            Event::Restored { bytes, .. } => Seen::Restored { bytes: *bytes },
            Event::Refused { owner, reason } => Seen::Refused { pid: *owner, reason: Refusal::of(reason) },
            Event::Ended { pages_lost, .. } => Seen::Ended { pages_lost: *pages_lost },
            Event::Recorded { outcome, .. } => Seen::Recorded { pages: outcome.as_ref().ok().copied() },
            &Event::Filled { pages, pages_missing, .. } => Seen::Filled { pages, pages_missing },
            Event::Detached { .. } => Seen::Detached,
            other => panic!("an event without a test: {other:?}"),
        };
        Self { seen, line: event.to_string() }
    }
}

impl Refusal {
    fn of(error: &HandshakeError) -> Self {
        match error {
            HandshakeError::Garbage(_) => Self::Garbage,
            HandshakeError::TooLong => Self::TooLong,
            &HandshakeError::Closed { bytes, fds } => Self::Closed { bytes, fds },
            &HandshakeError::TimedOut(after, bytes, fds) => Self::TimedOut { after, bytes, fds },
            HandshakeError::Descriptors(count) => Self::Descriptors(*count),
            HandshakeError::NotUserfaultfd(kind) => Self::NotUserfaultfd(kind.clone()),
            &HandshakeError::Size { guest, file } => Self::Size { guest, file },
            other => Self::Other(other.to_string()),
        }
    }
}

impl Drop for RunningHandler {
    fn drop(&mut self) {
        self.request_shutdown();
        if thread::panicking() {
            self.events().iter().for_each(|event| eprintln!("{}", event.line));
        } else {
            self.stop();
        }
    }
}
