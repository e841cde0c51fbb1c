//! A Firecracker handler that runs in a thread of the test.

use crate::{comes_true, until};
use pagestitch_firecracker::{Builder, Handler, ShutdownHandle};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A running handler, its folder with the socket, and the events that it reported. Its drop stops
/// it.
pub(crate) struct RunningHandler {
    pub(crate) folder: TempDir,
    shutdown: ShutdownHandle,
    events: Arc<Mutex<Vec<String>>>,
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
        let (shutdown, events) = (handler.shutdown_handle(), Arc::<Mutex<Vec<String>>>::default());
        let thread = thread::spawn({
            let events = Arc::clone(&events);
            move || handler.run(|event| events.lock().unwrap().push(event.to_string())).unwrap()
        });
        Self { folder, shutdown, events, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }

    /// The number of events with this text.
    pub(crate) fn reported(&self, text: &str) -> usize {
        self.events.lock().unwrap().iter().filter(|event| event.contains(text)).count()
    }

    pub(crate) fn until_reported(&self, text: &str) {
        until(|| self.reported(text) > 0);
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

impl Drop for RunningHandler {
    fn drop(&mut self) {
        self.request_shutdown();
        if !thread::panicking() {
            self.stop();
        }
    }
}
