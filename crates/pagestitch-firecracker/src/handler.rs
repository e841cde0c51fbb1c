//! The handler: one thread that listens, takes guests in, and sees them end. Their faults are the pool's.
//!
//! ```text
//!               ┌─ stop ──────── drain: fill what is missing of each guest, and let it go
//!   poll(2) ────┼─ socket ────── accept: a handshake begins
//!               ├─ handshakes ── read what has come; complete: a guest; never complete: refused after a time
//!               └─ guests ────── its process has ended: forget it
//! ```

use crate::client::{Arrived, Client, Seen, Terms};
use crate::errands::Errands;
use crate::guest::{Guest, Service};
use crate::handshake::{Handed, HandshakeError, MOST_CLIENTS};
use crate::socket::Socket;
use crate::{Builder, Error, Event, OnStop, Snapshot};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Serves any number of guests that are restored from one snapshot.
#[derive(Debug)]
pub struct Handler {
    /// None while it drains.
    socket: Option<Socket>,
    path: PathBuf,
    service: Service,
    on_stop: OnStop,
    patience: Duration,
    record: Option<PathBuf>,
    stop: Arc<EventFd>,
    /// In the order in which they came.
    clients: Vec<Client>,
    errands: Errands<Seen>,
    /// Clients that an errand has, and has not told of.
    away: usize,
    guests: Vec<Guest>,
    /// Where there was no descriptor for another client: when that is tried again.
    full_until: Option<Instant>,
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
    /// Listens, with no guest yet.
    pub(crate) fn new(
        socket: Socket,
        service: Service,
        (on_stop, patience, record): (OnStop, Duration, Option<PathBuf>),
        stop: Arc<EventFd>,
    ) -> io::Result<Self> {
        let (clients, guests, path) = (vec![], vec![], socket.path().to_owned());
        let (errands, socket) = (Errands::new()?, Some(socket));
        Ok(Self {
            socket,
            path,
            service,
            on_stop,
            patience,
            record,
            stop,
            clients,
            errands,
            away: 0,
            guests,
            full_until: None,
        })
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

    /// Waits for something to do, and does some of it: no peer can keep it in one turn. False when it is told to stop.
    fn turn(&mut self, tell: &mut impl FnMut(&Event<'_>)) -> Result<bool, Error> {
        let Ready { stop, connection, ended } = self.wait(None)?;
        if stop {
            let _ = self.stop.read();
            return Ok(false);
        }
        self.see_ended(&ended, tell);
        self.see_clients(tell);
        if connection {
            self.accept();
        }
        Ok(true)
    }

    /// Waits, not past a moment, and takes note of which clients have sent something.
    fn wait(&mut self, until: Option<Instant>) -> Result<Ready, Error> {
        let wait = self.time_to_wait(until);
        let socket = self.socket.as_ref().filter(|_| self.takes_clients());
        let waiting: Vec<usize> =
            (0..self.clients.len()).filter(|&client| !self.clients[client].is_ready()).collect();
        let mut fds = vec![readable(self.stop.as_fd()), readable(self.errands.as_fd())];
        fds.extend(socket.map(|socket| readable(socket.as_fd())));
        fds.extend(waiting.iter().map(|&client| readable(self.clients[client].as_fd())));
        fds.extend(self.guests.iter().map(|guest| readable(guest.owner().as_fd())));
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Wait(errno.into())),
        }
        let listens = usize::from(socket.is_some());
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let (clients, ended) = ready[2 + listens..].split_at(waiting.len());
        for (&client, _) in waiting.iter().zip(clients).filter(|(_, ready)| **ready) {
            self.clients[client].has_sent();
        }
        Ok(Ready { stop: ready[0], connection: listens == 1 && ready[2], ended: ended.to_vec() })
    }

    fn time_to_wait(&self, until: Option<Instant>) -> PollTimeout {
        let now = Instant::now();
        // A client for which there is no thread is tried again.
        let again = self.clients.iter().any(Client::is_ready).then(|| now + SHORTLY);
        let deadlines = self.clients.iter().filter_map(Client::deadline);
        let next = deadlines.chain(again).chain(self.full_until).chain(until).min();
        let wait = next.map(|next| next.saturating_duration_since(now));
        // Rounded up: not to look a moment too early again and again.
        let wait = wait.map(|wait| wait.saturating_add(Duration::from_millis(1)));
        wait.map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX))
    }

    /// Whether another client can be taken in now.
    fn takes_clients(&self) -> bool {
        self.full_until.is_none_or(|until| until <= Instant::now()) && self.clients.len() < 2 * MOST_CLIENTS
    }

    /// Takes a few of those that have connected.
    fn accept(&mut self) {
        let room = self.room();
        for _ in 0..room {
            let Some(socket) = &self.socket else { return };
            match socket.accept() {
                Ok(stream) => self.clients.push(Client::new(stream, self.patience)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.wait_for_descriptors(&error),
            }
            self.crowd_out();
        }
        if room == 0 {
            self.wait_for_descriptors(&Errno::EMFILE.into());
        }
    }

    /// A guest whose descriptor cannot be taken would wait for ever: it waits in the backlog until others end.
    fn wait_for_descriptors(&mut self, error: &io::Error) {
        // Once, and not each time it is tried.
        if self.full_until.is_none() {
            tracing::warn!(%error, "no descriptor left for another guest: it waits until one ends; raise the limit (ulimit -n)");
        }
        self.full_until = Some(Instant::now() + SHORTLY);
    }

    /// For how many more clients descriptors can be had, up to as many as are taken in a turn.
    fn room(&mut self) -> usize {
        let others = self.clients.len() + self.errands.running();
        let wanted = (others + AT_ONCE) * DESCRIPTORS;
        let clone = |_| self.stop.as_fd().try_clone_to_owned().ok();
        let had = (0..wanted).map_while(clone).collect::<Vec<OwnedFd>>().len();
        let room = (had / DESCRIPTORS).saturating_sub(others);
        if room > 0 {
            self.full_until = None;
        }
        room
    }

    /// Where there are too many clients: the user that has the most of them loses the oldest.
    fn crowd_out(&mut self) {
        let waiting = || self.clients.iter().filter(|client| !client.is_refused());
        if waiting().count() <= MOST_CLIENTS {
            return;
        }
        let mut users: HashMap<u32, usize> = HashMap::new();
        waiting().for_each(|client| *users.entry(client.user()).or_default() += 1);
        let most = users.into_iter().max_by_key(|&(_, count)| count).map(|(user, _)| user);
        let mut clients = self.clients.iter_mut().filter(|client| !client.is_refused());
        if let Some(oldest) = clients.find(|client| Some(client.user()) == most) {
            oldest.refuse(HandshakeError::Crowded);
        }
    }

    /// Has clients seen to for which there is something to do, and takes in what was found out.
    fn see_clients(&mut self, tell: &mut impl FnMut(&Event<'_>)) {
        let seen = self.errands.results();
        self.away -= seen.len();
        for seen in seen {
            match seen {
                Seen::Waiting(client) => self.clients.push(client),
                Seen::Complete(arrived) => self.begin(*arrived, tell),
                Seen::Refused { owner, why } => tell(&Event::Refused { owner, why: &why }),
            }
        }
        let (now, terms) = (Instant::now(), self.terms());
        for mut client in std::mem::take(&mut self.clients) {
            client.expire(now, self.patience);
            if !client.is_ready() {
                self.clients.push(client);
                continue;
            }
            match self.errands.start(client.user(), (client, terms), Client::see_to) {
                Ok(()) => self.away += 1,
                Err((client, _)) => self.clients.push(client),
            }
        }
    }

    const fn terms(&self) -> Terms {
        Terms { loss: self.service.loss, bytes: self.service.snapshot.bytes() }
    }

    fn begin(&mut self, arrived: Arrived, tell: &mut impl FnMut(&Event<'_>)) {
        let Arrived { client, owner, mappings, uffd } = arrived;
        let record = self.record.is_some() && self.guests.iter().all(|guest| !guest.is_recorded());
        // Where it is refused after all, its memory is to be settled by a userfaultfd.
        let kept = uffd.try_clone();
        match self.service.serve(record, &owner, &mappings, uffd) {
            Ok(region) => {
                let guest = Guest::new(region, owner, record, client.into_stream());
                let meter = guest.region().meter();
                tell(&Event::Restored { owner: guest.owner(), bytes: mappings.bytes(), meter });
                self.guests.push(guest);
            }
            Err(why) => match kept {
                Ok(uffd) => self.clients.push(client.refused(Handed { mappings, uffd }, why)),
                Err(error) => {
                    tracing::error!(guest = %owner, %error, "refused without a descriptor to settle its memory by: ended");
                    let _ = owner.kill();
                    tell(&Event::Refused { owner: None, why: &why });
                }
            },
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
        self.close_socket();
        self.finish_handshakes(tell);
        let (how, stop) = (self.on_stop, Arc::clone(&self.stop));
        for guest in self.guests.drain(..) {
            // Told again: whatever is left of the event's count.
            let hurry = || is_told(&stop);
            let owner = Arc::clone(guest.owner());
            keep_recording(&mut self.record, &guest, tell);
            let outcome = guest.leave(how, hurry);
            tell(&Event::Left { owner: &owner, outcome });
        }
    }

    /// Takes those that have connected, and no more.
    fn close_socket(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        socket.close();
        loop {
            match socket.accept() {
                Ok(stream) => self.clients.push(Client::new(stream, self.patience)),
                Err(error)
                    if matches!(error.raw_os_error(), Some(nix::libc::EINTR | nix::libc::ECONNABORTED)) => {}
                Err(_) => break,
            }
        }
        // Where descriptors are short, connections are left, which the kernel closes: that may wait.
        thread::spawn(move || drop(socket));
    }

    /// Serves guests whose handshakes are complete, and refuses the others: those would wait for ever.
    fn finish_handshakes(&mut self, tell: &mut impl FnMut(&Event<'_>)) {
        let started = Instant::now();
        for (until, last) in [(self.patience.min(LAST), false), (LAST, true)] {
            let until = started + until;
            if last {
                self.clients.iter_mut().for_each(|client| client.refuse(HandshakeError::Stopping));
            }
            self.see_clients(tell);
            while (!self.clients.is_empty() || self.away > 0)
                && Instant::now() < until
                && !is_told(&self.stop)
            {
                let Ok(Ready { ended, .. }) = self.wait(Some(until)) else { break };
                self.see_ended(&ended, tell);
                self.see_clients(tell);
            }
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // To close what peers have sent may wait.
        let seen = self.errands.end();
        let (clients, socket) = (std::mem::take(&mut self.clients), self.socket.take());
        if !seen.is_empty() || !clients.is_empty() || socket.is_some() {
            let _ = thread::Builder::new().spawn(move || drop((seen, clients, socket)));
        }
    }
}

/// What there is to do.
struct Ready {
    stop: bool,
    connection: bool,
    /// Which guests have ended.
    ended: Vec<bool>,
}

fn is_told(stop: &EventFd) -> bool {
    poll(&mut [readable(stop.as_fd())], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
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

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// What a guest takes: its connection, its userfaultfd, its process, and one that is soon given back.
const DESCRIPTORS: usize = 4;
/// Before it is looked again whether there are descriptors, or a thread.
const SHORTLY: Duration = Duration::from_millis(50);
/// Clients that are taken in before it is looked what else there is to do.
const AT_ONCE: usize = 16;
/// How long handshakes that have begun may take when the handler is told to stop.
const LAST: Duration = Duration::from_secs(1);
