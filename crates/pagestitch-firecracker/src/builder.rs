//! Describing a handler, and having it listen.

use crate::guest::{OnStop, Service};
use crate::handler::Settings;
use crate::shutdown::ShutdownHandle;
use crate::socket::Socket;
use crate::{Error, Handler, Snapshot};
use pagestitch::{Loss, OwnMemory, Pool, Readahead, Recording};
use std::path::{Path, PathBuf};
use std::time::Duration;

impl Handler {
    /// Describes a handler for guests that are restored from `snapshot`.
    pub const fn builder(snapshot: Snapshot) -> Builder {
        Builder::new(snapshot)
    }
}

/// Describes a handler. Made by [`Handler::builder`].
#[derive(Debug)]
#[must_use]
pub struct Builder {
    snapshot: Snapshot,
    pool: Option<Pool>,
    loss: Loss,
    on_stop: OnStop,
    readahead: Readahead,
    handshake_timeout: Duration,
    record: Option<PathBuf>,
    replay: Option<Recording>,
    timed: bool,
    own: Option<OwnMemory>,
}

impl Builder {
    const fn new(snapshot: Snapshot) -> Self {
        Self {
            snapshot,
            pool: None,
            loss: Loss::Poison,
            on_stop: OnStop::Finish,
            readahead: Readahead::Adaptive,
            handshake_timeout: Duration::from_secs(5),
            record: None,
            replay: None,
            timed: false,
            own: None,
        }
    }

    /// Who answers faults: by default a pool of its own.
    pub fn pool(mut self, pool: &Pool) -> Self {
        self.pool = Some(pool.clone());
        self
    }

    /// What becomes of a guest when bytes of its memory cannot be had. By default whoever touches them gets SIGBUS.
    pub const fn on_loss(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }

    /// What becomes of guests when the handler is told to stop. By default their memory is filled.
    pub const fn on_stop(mut self, on_stop: OnStop) -> Self {
        self.on_stop = on_stop;
        self
    }

    /// How far ahead of a sequential reader pages are filled. By default [`Readahead::Adaptive`].
    pub const fn readahead(mut self, readahead: Readahead) -> Self {
        self.readahead = readahead;
        self
    }

    /// Takes the time of the parts of each fault: see [`Meter::latency`](pagestitch::Meter::latency).
    pub const fn timed(mut self) -> Self {
        self.timed = true;
        self
    }

    /// Serves guests in *this* process, too, whose memory is promised for: in a test, say. By default they are refused.
    pub const fn own_memory(mut self, promise: OwnMemory) -> Self {
        self.own = Some(promise);
        self
    }

    /// How long a client may take to send its handshake. By default 5 seconds.
    pub const fn handshake_timeout(mut self, handshake_timeout: Duration) -> Self {
        self.handshake_timeout = handshake_timeout;
        self
    }

    /// Writes in which order the first guest touches its memory to a file, when it ends or is left to itself. For that guest nothing
    /// is filled ahead or replayed. A guest that touches nothing leaves the recording to the next one, and the file as it is.
    pub fn record(mut self, path: impl Into<PathBuf>) -> Self {
        self.record = Some(path.into());
        self
    }

    /// Fills the pages of a recording of an earlier guest, for each guest, as soon as it is there. A guest with pages of another size
    /// than the recorded ones is served without.
    pub fn replay(mut self, recording: Recording) -> Self {
        self.replay = Some(recording);
        self
    }

    /// Listens at a path. A socket that nobody listens at any more is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another handler listens there; [`Error::NotASocket`] if something else is there;
    /// [`Error::Listen`]; [`Error::Memory`] if a pool cannot be had, or a recording could not be written;
    /// [`Error::RecordingMismatch`] if the one to replay is of other memory.
    pub fn bind(self, path: impl Into<PathBuf>) -> Result<Handler, Error> {
        let path = path.into();
        check_recordings(&self.snapshot, self.replay.as_ref(), self.record.as_deref())?;
        let pool = self.pool.map_or_else(Pool::new, Ok)?;
        let shutdown = ShutdownHandle::new().map_err(Error::Poll)?;
        let socket = Socket::bind(path)?;
        let Self {
            snapshot, loss, on_stop, readahead, handshake_timeout, record, replay, timed, own, ..
        } = self;
        let service = Service { snapshot, pool, loss, readahead, replay, timed, own };
        let settings = Settings { on_stop, handshake_timeout, record };
        Handler::new(socket, service, settings, shutdown).map_err(Error::Poll)
    }
}

/// Fails now, and not when guests are there.
fn check_recordings(
    snapshot: &Snapshot,
    replay: Option<&Recording>,
    record: Option<&Path>,
) -> Result<(), Error> {
    let bytes = snapshot.bytes();
    let recorded = replay.map(Recording::region_bytes);
    if let Some(recorded) = recorded.filter(|&recorded| recorded != bytes) {
        return Err(Error::RecordingMismatch { recorded, bytes });
    }
    record.map_or(Ok(()), |path| Ok(Recording::can_write(path)?))
}
