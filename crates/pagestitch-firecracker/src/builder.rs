//! The options of a handler.

use crate::guest::{OnStop, Service};
use crate::handler::Settings;
use crate::shutdown::ShutdownHandle;
use crate::socket::{Socket, SocketAccess};
use crate::{Error, Handler, Snapshot};
use pagestitch::{FillRate, OnUnavailable, OwnMemory, Pool, Readahead, Recording};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

impl Handler {
    /// Describes a handler for guests that are restored from `snapshot`.
    pub const fn builder(snapshot: Snapshot) -> Builder {
        Builder::new(snapshot)
    }
}

/// The options of a handler. Made by [`Handler::builder`].
///
/// ```no_run
/// use pagestitch::{OnUnavailable, Pool, Readahead, Recording};
/// use pagestitch_firecracker::{Event, Handler, OnStop, Snapshot};
/// use std::time::Duration;
///
/// let pool = Pool::builder().workers(8).warn_after(Duration::from_secs(1)).start()?;
/// let handler = Handler::builder(Snapshot::open(["base.mem"])?)
///     .pool(&pool)
///     .socket_mode(0o660)
///     .socket_group(1000)                                     // the group of the VMMs
///     .handshake_timeout(Duration::from_secs(2))
///     .on_unavailable(OnUnavailable::Kill)                    // default: SIGBUS
///     .on_stop(OnStop::Finish)                                // the default: guests outlive the handler
///     .readahead(Readahead::None)                             // a remote disk, read page by page
///     .replay(Recording::read("touches")?)                    // or .record("touches") in the first run
///     .record_latency()
///     .bind("/run/vm/uffd.sock")?;                            // or .listen(listener), with systemd's socket
/// println!("listening at {}", handler.path().display());
/// handler.run(|event| match event {
///     Event::Restored { owner, meter, .. } => println!("{owner}: {} faults so far", meter.faults()),
///     Event::Ended { pages_lost, .. } if *pages_lost > 0 => eprintln!("the storage lost {pages_lost} pages"),
///     event => println!("{event}"),
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use]
pub struct Builder {
    snapshot: Snapshot,
    pool: Option<Pool>,
    on_unavailable: OnUnavailable,
    on_stop: OnStop,
    readahead: Readahead,
    handshake_timeout: Duration,
    record: Option<PathBuf>,
    replay: Option<Recording>,
    background: Option<FillRate>,
    record_latency: bool,
    own: Option<OwnMemory>,
    access: SocketAccess,
}

impl Builder {
    const fn new(snapshot: Snapshot) -> Self {
        Self {
            snapshot,
            pool: None,
            on_unavailable: OnUnavailable::Poison,
            on_stop: OnStop::Finish,
            readahead: Readahead::Adaptive,
            handshake_timeout: Duration::from_secs(5),
            record: None,
            replay: None,
            background: None,
            record_latency: false,
            own: None,
            access: SocketAccess { mode: None, group: None },
        }
    }

    /// Serves faults from this pool. By default the handler starts a pool of its own.
    pub fn pool(mut self, pool: &Pool) -> Self {
        self.pool = Some(pool.clone());
        self
    }

    /// Sets the consequence for a guest if bytes of its memory are unavailable. By default the
    /// thread that touches them gets SIGBUS.
    pub const fn on_unavailable(mut self, on_unavailable: OnUnavailable) -> Self {
        self.on_unavailable = on_unavailable;
        self
    }

    /// Sets the consequence of a shutdown for the guests. By default the handler fills their
    /// memory.
    pub const fn on_stop(mut self, on_stop: OnStop) -> Self {
        self.on_stop = on_stop;
        self
    }

    /// Sets how far ahead of a sequential reader pages are filled. By default
    /// [`Readahead::Adaptive`].
    pub const fn readahead(mut self, readahead: Readahead) -> Self {
        self.readahead = readahead;
        self
    }

    /// Measures the parts of each fault: see [`Meter::latency`](pagestitch::Meter::latency).
    pub const fn record_latency(mut self) -> Self {
        self.record_latency = true;
        self
    }

    /// Also serves guests in *this* process, whose memory the promise covers: in a test, for
    /// example. By default the handler refuses them.
    ///
    /// ```no_run
    /// # fn promise() -> pagestitch::OwnMemory { unimplemented!() }
    /// use pagestitch_firecracker::{Handler, Snapshot};
    ///
    /// let promise = promise();                                        // of the unsafe OwnMemory::promise()
    /// let snapshot = Snapshot::open(["base.mem"])?;
    /// let handler = Handler::builder(snapshot).own_memory(promise).bind("handler.socket")?;
    /// # let _ = handler;
    /// # Ok::<(), pagestitch_firecracker::Error>(())
    /// ```
    pub const fn own_memory(mut self, promise: OwnMemory) -> Self {
        self.own = Some(promise);
        self
    }

    /// Limits the time in which a client must send its handshake. By default 5 seconds.
    pub const fn handshake_timeout(mut self, handshake_timeout: Duration) -> Self {
        self.handshake_timeout = handshake_timeout;
        self
    }

    /// Writes the order of a guest's first touches to a file, when the guest ends or is detached.
    /// The first guest with a touch is recorded; a guest without one leaves the file as it is. The
    /// handler neither prefetches nor replays for the recorded guest.
    pub fn record(mut self, path: impl Into<PathBuf>) -> Self {
        self.record = Some(path.into());
        self
    }

    /// Fills the recorded pages of each guest as soon as it connects. A guest whose page size
    /// differs from that of the recording is served without it.
    pub fn replay(mut self, recording: Recording) -> Self {
        self.replay = Some(recording);
        self
    }

    /// Fills the memory of each guest while no fault waits, in the order of the addresses and after a
    /// replayed recording. A guest with all of its memory is detached as by
    /// [`OnStop::Finish`]: it needs no handler any more. A guest with pages that cannot be read stays
    /// served. By default only touched pages and readahead are filled. The recorded guest is not filled,
    /// because a page that is filled ahead has no first touch.
    ///
    /// ```no_run
    /// use pagestitch::FillRate;
    /// use pagestitch_firecracker::{Event, Handler, Snapshot};
    /// use std::num::NonZeroU64;
    ///
    /// let rate = FillRate::BytesPerSecond(NonZeroU64::new(256 << 20).expect("not zero"));
    /// let handler = Handler::builder(Snapshot::open(["base.mem"])?).background(rate).bind("/run/vm/uffd.sock")?;
    /// handler.run(|event| match event {
    ///     Event::Filled { owner, pages_missing: 0, .. } => println!("{owner} needs no handler any more"),
    ///     event => println!("{event}"),
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn background(mut self, rate: FillRate) -> Self {
        self.background = Some(rate);
        self
    }

    /// Sets the permission bits of the socket file, such as `0o660`, before the first connection. A
    /// process needs write permission to connect. By default the umask decides.
    pub const fn socket_mode(mut self, mode: u32) -> Self {
        self.access.mode = Some(mode);
        self
    }

    /// Sets the group of the socket file, by its id, before the first connection. By default the
    /// group of this process.
    pub const fn socket_group(mut self, group: u32) -> Self {
        self.access.group = Some(group);
        self
    }

    /// Listens at a path. A socket at which no process listens any more is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another handler listens there; [`Error::NotASocket`] if another file is
    /// there; [`Error::SocketAccess`] if this process may not set the mode or the group;
    /// [`Error::Listen`]; [`Error::Memory`] if no pool can start, or a recording could not
    /// be written; [`Error::RecordingMismatch`] if the recording to replay is of other memory.
    pub fn bind(self, path: impl Into<PathBuf>) -> Result<Handler, Error> {
        let (path, access) = (path.into(), self.access);
        self.start(|| Socket::bind(path, access))
    }

    /// Listens at a socket that a service manager has made, as systemd does (`sd_listen_fds(3)`).
    /// The manager keeps the socket and its file: connections that arrive after a shutdown wait for
    /// the next handler. [`socket_mode`](Self::socket_mode) and
    /// [`socket_group`](Self::socket_group) have no effect.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind), without those of its path.
    pub fn listen(self, listener: UnixListener) -> Result<Handler, Error> {
        self.start(|| Socket::inherit(listener))
    }

    /// Opens the socket last, because clients may connect at once.
    fn start(self, open: impl FnOnce() -> Result<Socket, Error>) -> Result<Handler, Error> {
        check_recordings(&self.snapshot, self.replay.as_ref(), self.record.as_deref())?;
        let pool = self.pool.map_or_else(Pool::new, Ok)?;
        let shutdown = ShutdownHandle::new().map_err(Error::Poll)?;
        let socket = open()?;
        let Self {
            snapshot,
            on_unavailable,
            on_stop,
            readahead,
            handshake_timeout,
            record,
            replay,
            background,
            record_latency,
            own,
            ..
        } = self;
        let service =
            Service { snapshot, pool, on_unavailable, readahead, replay, background, record_latency, own };
        let settings = Settings { on_stop, handshake_timeout, record };
        Handler::new(socket, service, settings, shutdown).map_err(Error::Poll)
    }
}

/// Checks both recordings before the first guest connects, because later their failure would lose
/// data.
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
