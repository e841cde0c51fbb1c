//! Messages between the processes of this test, for which one of them waits.

use pagestitch_testkit::wait;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Receives messages at a path. Its drop ends each [`wait_for_drop`].
pub(crate) struct Receiver {
    listener: UnixListener,
    path: PathBuf,
}

impl Receiver {
    pub(crate) fn bind(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    /// Waits for a message. None after the time limit.
    pub(crate) fn receive(&self, limit: Duration) -> Option<String> {
        if !wait::readable(&self.listener, limit) {
            return None;
        }
        let (mut message, (mut stream, _)) = (String::new(), self.listener.accept().unwrap());
        stream.read_to_string(&mut message).ok().map(|_| message)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Sends a message.
pub(crate) fn send(path: &Path, message: &str) {
    UnixStream::connect(path).unwrap().write_all(message.as_bytes()).unwrap();
}

/// Waits until the receiver is dropped or its process has ended, at most for the time limit.
pub(crate) fn wait_for_drop(path: &Path, limit: Duration) {
    if let Ok(mut stream) = UnixStream::connect(path) {
        let _ = stream.set_read_timeout(Some(limit));
        let _ = stream.read(&mut [0]);
    }
}
