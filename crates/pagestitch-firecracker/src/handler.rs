//! The handler: one thread that listens, takes guests in, and sees them end. Their faults are the pool's.
//!
//! ```text
//!               ┌─ stop ──────── drain: fill what is missing of each guest, and let it go
//!   poll(2) ────┼─ socket ────── accept: a handshake begins
//!               ├─ handshakes ── read what has come; complete: a guest; never complete: refused after a time
//!               └─ guests ────── its process has ended: forget it
//! ```

use crate::guest::{Guest, Service};
use crate::handshake::{Arriving, HandshakeError, Mappings};
use crate::{Error, Snapshot};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pagestitch::{Loss, Meter, Metrics, Pool, Process, Readahead, Recording};
use pagestitch_kernel::rights;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What becomes of guests when their handler is told to stop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnStop {
    /// What is missing of their memory is filled; they go on without a handler.
    #[default]
    Finish,
    /// What is missing is lost: see [`Loss`].
    Abandon,
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
    patience: Duration,
    record: Option<PathBuf>,
    replay: Option<Recording>,
    timed: bool,
}

impl Builder {
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

    /// Takes the time of the parts of each fault: see [`Meter::latency`].
    pub const fn timed(mut self) -> Self {
        self.timed = true;
        self
    }

    /// How long a client may take to send its handshake. By default 5 seconds.
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Writes in which order the first guest touches its memory to a file, when it ends or is left to itself. For that guest nothing
    /// is filled ahead.
    pub fn record(mut self, path: impl Into<PathBuf>) -> Self {
        self.record = Some(path.into());
        self
    }

    /// Fills the pages of a recording of an earlier guest, for each guest, as soon as it is there.
    pub fn replay(mut self, recording: Recording) -> Self {
        self.replay = Some(recording);
        self
    }

    /// Listens at a path. A socket that nobody listens at any more is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another handler listens there; [`Error::NoSocket`] if something else is there;
    /// [`Error::Listen`]; [`Error::Memory`] if a pool cannot be had.
    pub fn bind(self, path: impl Into<PathBuf>) -> Result<Handler, Error> {
        let path = path.into();
        let failed = |source| Error::Listen { path: path.clone(), source };
        let pool = self.pool.map_or_else(Pool::new, Ok)?;
        let stop =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE);
        let stop = Arc::new(stop.map_err(|errno| Error::Wait(errno.into()))?);
        make_room(&path)?;
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let Self { snapshot, loss, on_stop, readahead, patience, record, replay, timed, .. } = self;
        let service = Service { snapshot, pool, loss, readahead, record: record.is_some(), replay, timed };
        Ok(Handler {
            listener: Some(listener),
            path,
            service,
            on_stop,
            patience,
            record,
            stop,
            clients: vec![],
            guests: vec![],
        })
    }
}

/// Removes a socket that was left behind.
fn make_room(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Listen { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(there) if !there.file_type().is_socket() => return Err(Error::NoSocket(path.into())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(Error::InUse(path.into())),
    }
}

/// Serves any number of guests that are restored from one snapshot.
#[derive(Debug)]
pub struct Handler {
    /// None while it drains.
    listener: Option<UnixListener>,
    path: PathBuf,
    service: Service,
    on_stop: OnStop,
    patience: Duration,
    record: Option<PathBuf>,
    stop: Arc<EventFd>,
    clients: Vec<Client>,
    guests: Vec<Guest>,
}

/// Somebody who has connected, and has not sent all.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    arriving: Arriving,
    until: Instant,
}

/// What has happened. `Display` is a line for a person.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A guest is served.
    Restored {
        /// Its VMM.
        owner: &'a Process,
        /// How much memory it has.
        bytes: u64,
        /// What happens in it.
        meter: Meter,
    },
    /// A client is not served.
    Refused {
        /// Its process, if it can be told.
        owner: Option<i32>,
        /// Why not.
        why: &'a HandshakeError,
    },
    /// A guest's VMM has ended.
    Ended {
        /// It.
        owner: &'a Process,
        /// What was done for it.
        metrics: Metrics,
        /// Pages whose bytes could not be had.
        lost: usize,
    },
    /// The first touches of a guest were written to a file.
    Recorded {
        /// Its VMM.
        owner: &'a Process,
        /// The file.
        path: &'a Path,
        /// How many pages, or why it could not be written.
        outcome: Result<usize, pagestitch::Error>,
    },
    /// A guest was left to itself, with all of its memory or, if it is an error, without.
    Left {
        /// Its VMM.
        owner: &'a Process,
        /// What was done for it.
        outcome: Result<Metrics, pagestitch::Error>,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restored { owner, bytes, .. } => write!(f, "{owner}: serving {} MiB", bytes >> 20),
            Self::Refused { owner: Some(pid), why } => write!(f, "process {pid}: refused: it {why}"),
            Self::Refused { owner: None, why } => write!(f, "a client: refused: it {why}"),
            Self::Ended { owner, metrics, lost: 0 } => {
                write!(
                    f,
                    "{owner}: ended after {} faults, {} pages",
                    metrics.faults,
                    metrics.pages_installed()
                )
            }
            Self::Ended { owner, lost, .. } => {
                write!(f, "{owner}: ended; {lost} pages of it could not be had")
            }
            Self::Recorded { owner, path, outcome: Ok(pages) } => {
                write!(f, "{owner}: {pages} first touches recorded in {}", path.display())
            }
            Self::Recorded { owner, outcome: Err(error), .. } => {
                write!(f, "{owner}: its first touches are lost: {error}")
            }
            Self::Left { owner, outcome: Ok(metrics) } => {
                write!(f, "{owner}: left to itself, {} pages filled", metrics.pages_installed())
            }
            Self::Left { owner, outcome: Err(error) } => write!(f, "{owner}: left incomplete: {error}"),
        }
    }
}

/// Tells a handler to stop: from a signal handler or another thread. A second time: not to wait for what is missing.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Tells it. Async-signal-safe.
    pub fn stop(&self) {
        let _ = self.0.write(1);
    }
}

impl Handler {
    /// Starts to describe a handler for guests restored from a snapshot.
    pub const fn builder(snapshot: Snapshot) -> Builder {
        Builder {
            snapshot,
            pool: None,
            loss: Loss::Poison,
            record: None,
            timed: false,
            replay: None,
            on_stop: OnStop::Finish,
            readahead: Readahead::Adaptive,
            patience: Duration::from_secs(5),
        }
    }

    /// What to stop it by.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.stop))
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until it is told to stop, and tells what happens. Then leaves each guest [as declared](Builder::on_stop).
    ///
    /// # Errors
    ///
    /// [`Error::Wait`] if the kernel refuses to wait for its descriptors.
    pub fn run(mut self, mut tell: impl FnMut(&Event<'_>)) -> Result<(), Error> {
        let end = loop {
            match self.turn(&mut tell) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // Whatever the reason: guests hang if nobody leaves them.
        self.drain(&mut tell);
        end
    }

    /// Waits for something to do, and does it. False when it is told to stop.
    fn turn(&mut self, tell: &mut impl FnMut(&Event<'_>)) -> Result<bool, Error> {
        let Some(listener) = &self.listener else { return Ok(false) };
        let mut fds = vec![readable(self.stop.as_fd()), readable(listener.as_fd())];
        fds.extend(self.clients.iter().map(|client| readable(client.stream.as_fd())));
        fds.extend(self.guests.iter().map(|guest| readable(guest.owner().as_fd())));
        let now = Instant::now();
        let next = self.clients.iter().map(|client| client.until.saturating_duration_since(now)).min();
        // Rounded up: not to look a moment too early again and again.
        let wait = next.map_or(PollTimeout::NONE, |next| {
            PollTimeout::try_from(next + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Wait(errno.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready[0] {
            let _ = self.stop.read();
            return Ok(false);
        }
        let (clients, guests) = ready[2..].split_at(self.clients.len());
        self.see_ended(guests, tell);
        self.read_handshakes(clients, tell);
        if ready[1] {
            self.accept();
        }
        Ok(true)
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        loop {
            if !self.has_room() {
                // A guest whose descriptor cannot be taken would wait for ever: it waits in the backlog until others end.
                tracing::warn!("no descriptor left for another guest (ulimit -n): it waits until one ends");
                std::thread::sleep(SHORTLY);
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(true).is_ok() {
                        let until = Instant::now() + self.patience;
                        self.clients.push(Client { stream, arriving: Arriving::default(), until });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // No descriptor left: who is refused now waits in the backlog until one is.
                    tracing::error!(%error, "cannot accept a client: raise the limit on open files (ulimit -n)");
                    std::thread::sleep(SHORTLY);
                    return;
                }
            }
        }
    }

    /// Whether descriptors can be had for those who have connected, and one more.
    fn has_room(&self) -> bool {
        let needed = (self.clients.len() + 1) * DESCRIPTORS;
        let tried: Result<Vec<_>, _> = (0..needed).map(|_| self.stop.as_fd().try_clone_to_owned()).collect();
        tried.is_ok()
    }

    fn read_handshakes(&mut self, ready: &[bool], tell: &mut impl FnMut(&Event<'_>)) {
        let now = Instant::now();
        let clients = std::mem::take(&mut self.clients);
        for (mut client, &ready) in clients.into_iter().zip(ready) {
            let answer = match ready {
                true => client.read(),
                false if client.until <= now => Err(client.arriving.late(self.patience)),
                false => Ok(None),
            };
            match answer {
                Ok(None) => self.clients.push(client),
                Ok(Some((mappings, uffd))) => self.begin(client.stream, &mappings, uffd, tell),
                Err(why) => refuse(&client.stream, &why, tell),
            }
        }
    }

    fn begin(
        &mut self,
        stream: UnixStream,
        mappings: &Mappings,
        uffd: OwnedFd,
        tell: &mut impl FnMut(&Event<'_>),
    ) {
        let owner = Process::peer(&stream).ok().map(|owner| owner.pid().as_raw());
        match Guest::new(&self.service, stream, mappings, uffd) {
            Ok(guest) => {
                let meter = guest.region().meter();
                tell(&Event::Restored { owner: guest.owner(), bytes: mappings.bytes(), meter });
                // One is enough.
                self.service.record = false;
                self.guests.push(guest);
            }
            Err(why) => tell(&Event::Refused { owner, why: &why }),
        }
    }

    fn see_ended(&mut self, ended: &[bool], tell: &mut impl FnMut(&Event<'_>)) {
        let guests = std::mem::take(&mut self.guests);
        for (guest, &ended) in guests.into_iter().zip(ended) {
            if !ended {
                self.guests.push(guest);
                continue;
            }
            let lost = guest.region().failures().len();
            let owner = Arc::clone(guest.owner());
            keep_recording(self.record.as_deref(), &guest, tell);
            let metrics = guest.close();
            tell(&Event::Ended { owner: &owner, metrics, lost });
        }
    }

    fn drain(&mut self, tell: &mut impl FnMut(&Event<'_>)) {
        self.listener = None;
        let _ = fs::remove_file(&self.path);
        self.clients.clear();
        let (how, stop) = (self.on_stop, Arc::clone(&self.stop));
        for guest in self.guests.drain(..) {
            // Told again: whatever is left of the event's count.
            let hurry =
                || poll(&mut [readable(stop.as_fd())], PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
            let owner = Arc::clone(guest.owner());
            keep_recording(self.record.as_deref(), &guest, tell);
            let outcome = guest.leave(how, hurry);
            tell(&Event::Left { owner: &owner, outcome });
        }
    }
}

fn keep_recording(path: Option<&Path>, guest: &Guest, tell: &mut impl FnMut(&Event<'_>)) {
    if let (Some(path), Some(recording)) = (path, guest.region().recording()) {
        let outcome = recording.write(path).map(|()| recording.len());
        tell(&Event::Recorded { owner: guest.owner(), path, outcome });
    }
}

impl Client {
    /// Reads what has come.
    fn read(&mut self) -> Result<Option<(Mappings, OwnedFd)>, HandshakeError> {
        let mut buffer = [0; 16 << 10];
        match rights::receive(&self.stream, &mut buffer) {
            Ok((bytes, fds)) => self.arriving.take(&buffer[..bytes], fds),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn refuse(stream: &UnixStream, why: &HandshakeError, tell: &mut impl FnMut(&Event<'_>)) {
    let owner = Process::peer(stream).ok().map(|owner| owner.pid().as_raw());
    tell(&Event::Refused { owner, why });
}

fn readable(fd: std::os::fd::BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// What a guest takes: its connection, its userfaultfd, its process, and one that is soon given back.
const DESCRIPTORS: usize = 4;
/// Before it is looked again whether there are descriptors.
const SHORTLY: Duration = Duration::from_millis(50);
