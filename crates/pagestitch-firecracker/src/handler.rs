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
use crate::{Builder, Error, Event, OnStop, Snapshot};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use pagestitch::Process;
use pagestitch_kernel::rights;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// Listens, with nobody there yet.
    pub(crate) fn new(
        listener: UnixListener,
        path: PathBuf,
        service: Service,
        (on_stop, patience, record): (OnStop, Duration, Option<PathBuf>),
        stop: Arc<EventFd>,
    ) -> Self {
        let (clients, guests) = (vec![], vec![]);
        Self { listener: Some(listener), path, service, on_stop, patience, record, stop, clients, guests }
    }

    /// Starts to describe a handler for guests restored from a snapshot.
    pub const fn builder(snapshot: Snapshot) -> Builder {
        Builder::new(snapshot)
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
            let answer = if ready { client.read() } else { Ok(None) };
            // Also who sends a byte now and then.
            let answer = match answer {
                Ok(None) if client.until <= now => Err(client.arriving.late(self.patience)),
                answer => answer,
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
        let record = self.record.is_some() && self.guests.iter().all(|guest| !guest.is_recorded());
        match Guest::new(&self.service, record, stream, mappings, uffd) {
            Ok(guest) => {
                let meter = guest.region().meter();
                tell(&Event::Restored { owner: guest.owner(), bytes: mappings.bytes(), meter });
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
            keep_recording(&mut self.record, &guest, tell);
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
            keep_recording(&mut self.record, &guest, tell);
            let outcome = guest.leave(how, hurry);
            tell(&Event::Left { owner: &owner, outcome });
        }
    }
}

/// Writes the recording of the first guest that has touched its memory, if it is this one.
fn keep_recording(record: &mut Option<PathBuf>, guest: &Guest, tell: &mut impl FnMut(&Event<'_>)) {
    let (Some(path), Some(recording)) = (record.as_deref(), guest.region().recording()) else { return };
    // An empty recording would replace a good one.
    let written = if recording.is_empty() { Ok(()) } else { recording.write(path) };
    let outcome = written.map(|()| recording.len());
    let kept = outcome.as_ref().is_ok_and(|&pages| pages > 0);
    tell(&Event::Recorded { owner: guest.owner(), path, outcome });
    if kept {
        *record = None;
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
