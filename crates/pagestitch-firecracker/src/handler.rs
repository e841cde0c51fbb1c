//! The handler: one thread that listens, takes guests in, and sees them end. Their faults are the pool's.
//!
//! ```text
//!               ┌─ stop ──────── drain: fill what is missing of each guest, and let it go
//!   poll(2) ────┼─ socket ────── accept: a handshake begins
//!               ├─ handshakes ── read what has come; complete: a guest; never complete: refused after a time
//!               └─ guests ────── its process has ended: forget it
//! ```

use crate::client::{Client, ClientOutcome, ReadyGuest, Requirements};
use crate::guest::OnStop;
use crate::guest::{ServedGuest, Service};
use crate::handshake::{Handshake, HandshakeError, MAX_CLIENTS};
use crate::peer_threads::PeerThreads;
use crate::shutdown::ShutdownHandle;
use crate::socket::Socket;
use crate::{Error, Event};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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
    settings: Settings,
    shutdown: ShutdownHandle,
    /// In the order in which they came.
    clients: Vec<Client>,
    peer_threads: PeerThreads<ClientOutcome>,
    /// Clients that an errand has, and has not told of.
    in_progress: usize,
    guests: Vec<ServedGuest>,
    /// Where there was no descriptor for another client: when that is tried again.
    accept_paused_until: Option<Instant>,
}

/// The settings of a handler that do not concern how memory is served.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) on_stop: OnStop,
    pub(crate) handshake_timeout: Duration,
    /// The file for the first touches of the next guest.
    pub(crate) record: Option<PathBuf>,
}

impl Handler {
    /// Listens, with no guest yet.
    pub(crate) fn new(
        socket: Socket,
        service: Service,
        settings: Settings,
        shutdown: ShutdownHandle,
    ) -> io::Result<Self> {
        let (clients, guests, path) = (vec![], vec![], socket.path().to_owned());
        let (peer_threads, socket) = (PeerThreads::new()?, Some(socket));
        Ok(Self {
            socket,
            path,
            service,
            settings,
            shutdown,
            clients,
            peer_threads,
            in_progress: 0,
            guests,
            accept_paused_until: None,
        })
    }

    /// What to stop it by.
    #[must_use]
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
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
    /// [`Error::Poll`] if the kernel refuses to wait for its descriptors.
    pub fn run(mut self, mut on_event: impl FnMut(&Event<'_>)) -> Result<(), Error> {
        let end = loop {
            match self.run_once(&mut on_event) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // Whatever the reason: guests hang if nobody leaves them.
        self.drain(&mut on_event);
        end
    }

    /// Waits for something to do, and does some of it: no peer can keep it in one turn. False when it is told to stop.
    fn run_once(&mut self, on_event: &mut impl FnMut(&Event<'_>)) -> Result<bool, Error> {
        let Ready { stop, connection, ended } = self.wait(None)?;
        if stop {
            self.shutdown.take();
            return Ok(false);
        }
        self.reap_guests(&ended, on_event);
        self.advance_clients(on_event);
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
        let mut fds = vec![readable(self.shutdown.as_fd()), readable(self.peer_threads.as_fd())];
        fds.extend(socket.map(|socket| readable(socket.as_fd())));
        fds.extend(waiting.iter().map(|&client| readable(self.clients[client].as_fd())));
        fds.extend(self.guests.iter().map(|guest| readable(guest.owner().as_fd())));
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Poll(errno.into())),
        }
        let listens = usize::from(socket.is_some());
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let (clients, ended) = ready[2 + listens..].split_at(waiting.len());
        for (&client, _) in waiting.iter().zip(clients).filter(|(_, ready)| **ready) {
            self.clients[client].set_readable();
        }
        Ok(Ready { stop: ready[0], connection: listens == 1 && ready[2], ended: ended.to_vec() })
    }

    fn time_to_wait(&self, until: Option<Instant>) -> PollTimeout {
        let now = Instant::now();
        // A client for which there is no thread is tried again.
        let again = self.clients.iter().any(Client::is_ready).then(|| now + RETRY_INTERVAL);
        let deadlines = self.clients.iter().filter_map(Client::deadline);
        let next = deadlines.chain(again).chain(self.accept_paused_until).chain(until).min();
        let wait = next.map(|next| next.saturating_duration_since(now));
        // Rounded up: not to look a moment too early again and again.
        let wait = wait.map(|wait| wait.saturating_add(Duration::from_millis(1)));
        wait.map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX))
    }

    /// Whether another client can be taken in now.
    fn takes_clients(&self) -> bool {
        self.accept_paused_until.is_none_or(|until| until <= Instant::now())
            && self.clients.len() < 2 * MAX_CLIENTS
    }

    /// Takes a few of those that have connected.
    fn accept(&mut self) {
        let room = self.descriptor_room();
        for _ in 0..room {
            let Some(socket) = &self.socket else { return };
            match socket.accept() {
                Ok(stream) => self.clients.push(Client::new(stream, self.settings.handshake_timeout)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.pause_accepting(&error),
            }
            self.refuse_excess();
        }
        if room == 0 {
            self.pause_accepting(&Errno::EMFILE.into());
        }
    }

    /// A guest whose descriptor cannot be taken would wait for ever: it waits in the backlog until others end.
    fn pause_accepting(&mut self, error: &io::Error) {
        // Once, and not each time it is tried.
        if self.accept_paused_until.is_none() {
            tracing::warn!(%error, "no descriptor left for another guest: it waits until one ends; raise the limit (ulimit -n)");
        }
        self.accept_paused_until = Some(Instant::now() + RETRY_INTERVAL);
    }

    /// For how many more clients descriptors can be had, up to as many as are taken in a turn.
    fn descriptor_room(&mut self) -> usize {
        let others = self.clients.len() + self.peer_threads.running();
        let wanted = (others + MAX_ACCEPTS_PER_TURN) * DESCRIPTORS_PER_GUEST;
        let clone = |_| self.shutdown.as_fd().try_clone_to_owned().ok();
        let had = (0..wanted).map_while(clone).collect::<Vec<OwnedFd>>().len();
        let room = (had / DESCRIPTORS_PER_GUEST).saturating_sub(others);
        if room > 0 {
            self.accept_paused_until = None;
        }
        room
    }

    /// Where there are too many clients: the user that has the most of them loses the oldest.
    fn refuse_excess(&mut self) {
        let waiting = || self.clients.iter().filter(|client| !client.is_refused());
        if waiting().count() <= MAX_CLIENTS {
            return;
        }
        let mut users: HashMap<u32, usize> = HashMap::new();
        waiting().for_each(|client| *users.entry(client.user()).or_default() += 1);
        let crowding = users.into_iter().max_by_key(|&(_, count)| count).map(|(user, _)| user);
        let mut clients = self.clients.iter_mut().filter(|client| !client.is_refused());
        if let Some(oldest) = clients.find(|client| Some(client.user()) == crowding) {
            oldest.refuse(HandshakeError::TooManyClients);
        }
    }

    /// Has clients seen to for which there is something to do, and takes in what was found out.
    fn advance_clients(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        let seen = self.peer_threads.take_results();
        self.in_progress -= seen.len();
        for seen in seen {
            match seen {
                ClientOutcome::Waiting(client) => self.clients.push(client),
                ClientOutcome::Complete(ready) => self.start_guest(*ready, on_event),
                ClientOutcome::Refused { owner, why } => on_event(&Event::Refused { owner, why: &why }),
            }
        }
        let (now, requirements) = (Instant::now(), self.requirements());
        for mut client in std::mem::take(&mut self.clients) {
            client.expire(now, self.settings.handshake_timeout);
            if !client.is_ready() {
                self.clients.push(client);
                continue;
            }
            match self.peer_threads.start(client.user(), (client, requirements), Client::handle) {
                Ok(()) => self.in_progress += 1,
                Err((client, _)) => self.clients.push(client),
            }
        }
    }

    const fn requirements(&self) -> Requirements {
        Requirements { loss: self.service.loss, bytes: self.service.snapshot.bytes() }
    }

    fn start_guest(&mut self, ready: ReadyGuest, on_event: &mut impl FnMut(&Event<'_>)) {
        let ReadyGuest { client, owner, mappings, uffd } = ready;
        let record = self.settings.record.is_some() && self.guests.iter().all(|guest| !guest.is_recorded());
        // Where it is refused after all, its memory is to be settled by a userfaultfd.
        let kept = uffd.try_clone();
        match self.service.serve(record, &owner, &mappings, uffd) {
            Ok(region) => {
                let guest = ServedGuest::new(region, owner, record, client.into_stream());
                let meter = guest.region().meter();
                on_event(&Event::Restored { owner: guest.owner(), bytes: mappings.bytes(), meter });
                self.guests.push(guest);
            }
            Err(why) => match kept {
                Ok(uffd) => self.clients.push(client.refused(Handshake { mappings, uffd }, why)),
                Err(error) => {
                    tracing::error!(guest = %owner, %error, "refused without a descriptor to settle its memory by: ended");
                    let _ = owner.kill();
                    on_event(&Event::Refused { owner: None, why: &why });
                }
            },
        }
    }

    fn reap_guests(&mut self, ended: &[bool], on_event: &mut impl FnMut(&Event<'_>)) {
        let guests = std::mem::take(&mut self.guests);
        for (guest, &ended) in guests.into_iter().zip(ended) {
            if !ended {
                self.guests.push(guest);
                continue;
            }
            let lost = guest.region().failures().len();
            let owner = Arc::clone(guest.owner());
            keep_recording(&mut self.settings.record, &guest, on_event);
            let metrics = guest.close();
            on_event(&Event::Ended { owner: &owner, metrics, lost });
        }
    }

    fn drain(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        self.close_socket();
        self.finish_handshakes(on_event);
        let (how, stop) = (self.settings.on_stop, self.shutdown.clone());
        for guest in self.guests.drain(..) {
            // Told again: whatever is left of the event's count.
            let hurry = || stop.is_requested();
            let owner = Arc::clone(guest.owner());
            keep_recording(&mut self.settings.record, &guest, on_event);
            let outcome = guest.detach(how, hurry);
            on_event(&Event::Detached { owner: &owner, outcome });
        }
    }

    /// Takes those that have connected, and no more.
    fn close_socket(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        socket.close();
        loop {
            match socket.accept() {
                Ok(stream) => self.clients.push(Client::new(stream, self.settings.handshake_timeout)),
                Err(error)
                    if matches!(error.raw_os_error(), Some(nix::libc::EINTR | nix::libc::ECONNABORTED)) => {}
                Err(_) => break,
            }
        }
        // Where descriptors are short, connections are left, which the kernel closes: that may wait.
        thread::spawn(move || drop(socket));
    }

    /// Serves guests whose handshakes are complete, and refuses the others: those would wait for ever.
    fn finish_handshakes(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        let started = Instant::now();
        for (until, last) in [
            (self.settings.handshake_timeout.min(SHUTDOWN_HANDSHAKE_TIMEOUT), false),
            (SHUTDOWN_HANDSHAKE_TIMEOUT, true),
        ] {
            let until = started + until;
            if last {
                self.clients.iter_mut().for_each(|client| client.refuse(HandshakeError::ShuttingDown));
            }
            self.advance_clients(on_event);
            while (!self.clients.is_empty() || self.in_progress > 0)
                && Instant::now() < until
                && !self.shutdown.is_requested()
            {
                let Ok(Ready { ended, .. }) = self.wait(Some(until)) else { break };
                self.reap_guests(&ended, on_event);
                self.advance_clients(on_event);
            }
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // To close what peers have sent may wait.
        let seen = self.peer_threads.close();
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

/// Writes the recording of the first guest that has touched its memory, if it is this one.
fn keep_recording(record: &mut Option<PathBuf>, guest: &ServedGuest, on_event: &mut impl FnMut(&Event<'_>)) {
    let (Some(path), Some(recording)) = (record.as_deref(), guest.region().recording()) else { return };
    // An empty recording would replace a good one.
    let written = if recording.is_empty() { Ok(()) } else { recording.write(path) };
    let outcome = written.map(|()| recording.len());
    let kept = outcome.as_ref().is_ok_and(|&pages| pages > 0);
    on_event(&Event::Recorded { owner: guest.owner(), path, outcome });
    if kept {
        *record = None;
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// What a guest takes: its connection, its userfaultfd, its process, and one that is soon given back.
const DESCRIPTORS_PER_GUEST: usize = 4;
/// Before it is looked again whether there are descriptors, or a thread.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Clients that are taken in before it is looked what else there is to do.
const MAX_ACCEPTS_PER_TURN: usize = 16;
/// How long handshakes that have begun may take when the handler is told to stop.
const SHUTDOWN_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);
