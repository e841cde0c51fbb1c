//! The thread that frees released sources. A worker never waits for the allocator: a thread that holds
//! its lock may touch a page meanwhile, and to free gigabytes takes a tenth of a second.

use crate::guard::discard;
use crate::signals::NoSignals;
use bytes::Bytes;
use crossbeam_channel::{Sender, bounded};
use std::{io, thread};

/// Passes sources to the thread that frees them. The thread ends after the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct FreeThread(Sender<Bytes>);

impl FreeThread {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// That of the start of a thread.
    pub(crate) fn start() -> io::Result<Self> {
        let (sender, sources) = bounded(WAITING);
        let quiet = NoSignals::until_dropped();
        let named = thread::Builder::new().name(String::from("pagestitch/free"));
        named.spawn(move || sources.into_iter().for_each(discard::<Bytes>))?;
        drop(quiet);
        Ok(Self(sender))
    }

    /// Frees a source later; in this thread, if too many wait. Allocates nothing.
    pub(crate) fn free(&self, source: Bytes) {
        if let Err(full) = self.0.try_send(source) {
            discard(full.into_inner());
        }
    }
}

/// The most sources that wait.
const WAITING: usize = 1024;
