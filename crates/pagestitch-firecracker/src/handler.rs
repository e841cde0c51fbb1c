//! The handler: one thread that accepts guests, and notices their end. The pool serves their
//! faults.
//!
//! ```text
//!               ┌─ shutdown ──── drain: fill the missing pages of each guest, and detach it
//!   poll(2) ────┼─ socket ────── accept: a handshake begins
//!               ├─ handshakes ── read; complete: a guest; incomplete: refused after a time
//!               ├─ fills ─────── a background fill has ended: detach the guest if it has all pages
//!               └─ guests ────── the process has ended: release the guest
//! ```

use crate::background::FillEnds;
use crate::client::{Client, ClientOutcome, KernelAnswers, ReadyGuest, Requirements};
use crate::descriptor_room::DescriptorRoom;
use crate::guest::OnStop;
use crate::guest::{ServedGuest, Service};
use crate::handshake::{Handshake, HandshakeError, MAX_CLIENTS};
use crate::peer_threads::{PeerThreads, ResultSender};
use crate::shutdown::ShutdownHandle;
use crate::socket::Socket;
use crate::{Error, Event};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Waker;
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
    /// In the order of their connections.
    clients: Vec<Client>,
    peer_threads: PeerThreads<ClientOutcome>,
    /// The number of clients that a peer thread holds.
    in_progress: usize,
    guests: Vec<ServedGuest>,
    /// The number of guests that a peer thread detaches.
    detaching: usize,
    fill_ends: FillEnds,
    /// Set after the process ran out of descriptors: the time of the next attempt to accept.
    accept_paused_until: Option<Instant>,
    kernel: KernelAnswers,
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
    /// Makes a handler without guests.
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
            detaching: 0,
            fill_ends: FillEnds::new()?,
            accept_paused_until: None,
            kernel: KernelAnswers::ask()?,
        })
    }

    /// A handle that shuts the handler down.
    #[must_use]
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
    }

    /// The path of the listening socket: `@NAME` for an inherited socket without a file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until its shutdown, and calls `on_event` for each event. Then detaches each guest as
    /// [`on_stop`](crate::Builder::on_stop) says.
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
        // Also after an error: a guest that is not detached would hang.
        self.drain(&mut on_event);
        end
    }

    /// Waits for events and handles some of them, so that no peer keeps the handler in one turn.
    /// Returns false at shutdown.
    fn run_once(&mut self, on_event: &mut impl FnMut(&Event<'_>)) -> Result<bool, Error> {
        let Ready { stop, connection, fills, ended } = self.wait(None)?;
        if stop {
            self.shutdown.take();
            return Ok(false);
        }
        self.reap_guests(&ended, on_event);
        if fills {
            self.fill_ends.acknowledge();
            self.look_at_fills(on_event);
        }
        self.detach_complete_guests();
        self.advance_clients(on_event);
        if connection {
            self.accept();
        }
        Ok(true)
    }

    /// Waits for events, at most until `until`, and notes which clients have sent data.
    fn wait(&mut self, until: Option<Instant>) -> Result<Ready, Error> {
        let wait = self.time_to_wait(until);
        let socket = self.socket.as_ref().filter(|_| self.takes_clients());
        let waiting: Vec<usize> =
            (0..self.clients.len()).filter(|&client| !self.clients[client].is_ready()).collect();
        let own = [self.shutdown.as_fd(), self.peer_threads.as_fd(), self.fill_ends.as_fd()];
        let mut fds: Vec<_> = own.into_iter().map(readable).collect();
        fds.extend(socket.map(|socket| readable(socket.as_fd())));
        fds.extend(waiting.iter().map(|&client| readable(self.clients[client].as_fd())));
        fds.extend(self.guests.iter().map(|guest| readable(guest.owner().as_fd())));
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Poll(errno.into())),
        }
        let listens = usize::from(socket.is_some());
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let (clients, ended) = ready[OWN_FDS + listens..].split_at(waiting.len());
        for (&client, _) in waiting.iter().zip(clients).filter(|(_, ready)| **ready) {
            self.clients[client].set_readable();
        }
        let connection = listens == 1 && ready[OWN_FDS];
        Ok(Ready { stop: ready[0], connection, fills: ready[2], ended: ended.to_vec() })
    }

    fn time_to_wait(&self, until: Option<Instant>) -> PollTimeout {
        let now = Instant::now();
        // A client or a guest without a thread is tried again after a while.
        let lacks_thread = self.clients.iter().any(Client::is_ready)
            || self.socket.is_some() && self.guests.iter().any(ServedGuest::is_complete);
        let again = lacks_thread.then(|| now + RETRY_INTERVAL);
        let deadlines = self.clients.iter().filter_map(Client::deadline);
        let next = deadlines.chain(again).chain(self.accept_paused_until).chain(until).min();
        let wait = next.map(|next| next.saturating_duration_since(now));
        // Rounded up, because a wait that ends too early would repeat in a loop.
        let wait = wait.map(|wait| wait.saturating_add(Duration::from_millis(1)));
        wait.map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX))
    }

    /// True if the handler accepts another client now.
    fn takes_clients(&self) -> bool {
        self.accept_paused_until.is_none_or(|until| until <= Instant::now())
            && self.clients.len() < 2 * MAX_CLIENTS
    }

    /// Accepts a few clients, each with room for the descriptors of its guest.
    fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS_PER_TURN {
            let Some(socket) = &self.socket else { return };
            match self.accept_from(socket) {
                Ok(client) => self.clients.push(client),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return self.pause_accepting(&error),
            }
            self.refuse_excess();
        }
        self.accept_paused_until = None;
    }

    fn accept_from(&self, socket: &Socket) -> io::Result<Client> {
        let room = DescriptorRoom::keep(DESCRIPTORS_PER_GUEST, &self.shutdown);
        let mut room = room.ok_or(Errno::EMFILE)?;
        room.free(DESCRIPTORS_PER_CLIENT);
        Ok(Client::new(socket.accept()?, room, self.settings.handshake_timeout, self.kernel))
    }

    /// Leaves connections in the backlog until guests have ended. A guest whose descriptor does not
    /// fit into the process would wait forever.
    fn pause_accepting(&mut self, error: &io::Error) {
        // Warns once, not at each attempt.
        if self.accept_paused_until.is_none() {
            tracing::warn!(%error, "no descriptor is left for another guest, which waits until a guest ends: raise the limit (ulimit -n)");
        }
        self.accept_paused_until = Some(Instant::now() + RETRY_INTERVAL);
    }

    /// Refuses a client if there are too many: the oldest one of the user with the most clients.
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

    /// Starts threads for clients that have work, and takes the results of earlier ones.
    fn advance_clients(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        for seen in self.peer_threads.take_results() {
            if let ClientOutcome::Detached { owner, outcome } = seen {
                self.detaching -= 1;
                on_event(&Event::Detached { owner: &owner, outcome });
                continue;
            }
            self.in_progress -= 1;
            match seen {
                ClientOutcome::Detached { .. } => {}
                ClientOutcome::Waiting(client) => self.clients.push(client),
                ClientOutcome::Complete(ready) => self.start_guest(*ready, on_event),
                ClientOutcome::Refused { owner, reason } => {
                    on_event(&Event::Refused { owner, reason: &reason })
                }
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
        let (on_unavailable, bytes) = (self.service.on_unavailable, self.service.snapshot.bytes());
        Requirements { on_unavailable, bytes, kernel: self.kernel }
    }

    fn start_guest(&mut self, ready: ReadyGuest, on_event: &mut impl FnMut(&Event<'_>)) {
        let ReadyGuest { mut client, owner, mappings, uffd } = ready;
        let user = client.user();
        let record = self.settings.record.is_some() && self.guests.iter().all(|guest| !guest.is_recorded());
        // A second descriptor, because a refusal needs the userfaultfd to poison the memory.
        client.free_descriptor();
        let kept = uffd.try_clone();
        match self.service.serve(record, &owner, &mappings, uffd) {
            Ok(region) => {
                let mut guest = ServedGuest::new(region, owner, record, user, client.into_stream());
                let meter = guest.region().meter();
                on_event(&Event::Restored { owner: guest.owner(), bytes: mappings.bytes(), meter });
                self.service.background.iter().for_each(|rate| guest.fill_in_background(*rate));
                note_end_of_fill(&mut guest, self.fill_ends.waker(), on_event);
                self.guests.push(guest);
            }
            Err(reason) => match kept {
                Ok(uffd) => self.clients.push(client.refused(Handshake { mappings, uffd }, reason)),
                Err(error) => {
                    tracing::error!(guest = %owner, %error, "guest refused and killed, because no descriptor is left to poison its memory: raise the limit (ulimit -n)");
                    let _ = owner.kill();
                    on_event(&Event::Refused { owner: None, reason: &reason });
                }
            },
        }
    }

    fn look_at_fills(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        let waker = self.fill_ends.waker();
        self.guests.iter_mut().for_each(|guest| note_end_of_fill(guest, waker, on_event));
    }

    /// Detaches the guests with all of their memory. A peer can delay this, so a thread of its own does
    /// it.
    fn detach_complete_guests(&mut self) {
        if !self.guests.iter().any(ServedGuest::is_complete) {
            return;
        }
        for guest in std::mem::take(&mut self.guests) {
            if !guest.is_complete() {
                self.guests.push(guest);
                continue;
            }
            match self.peer_threads.start(guest.user(), guest, detach) {
                Ok(()) => self.detaching += 1,
                Err(guest) => self.guests.push(guest),
            }
        }
    }

    fn reap_guests(&mut self, ended: &[bool], on_event: &mut impl FnMut(&Event<'_>)) {
        let guests = std::mem::take(&mut self.guests);
        for (guest, &ended) in guests.into_iter().zip(ended) {
            if !ended {
                self.guests.push(guest);
                continue;
            }
            let pages_lost = guest.region().failures().len();
            let owner = Arc::clone(guest.owner());
            keep_recording(&mut self.settings.record, &guest, on_event);
            let metrics = guest.close();
            on_event(&Event::Ended { owner: &owner, metrics, pages_lost });
        }
    }

    fn drain(&mut self, on_event: &mut impl FnMut(&Event<'_>)) {
        self.close_socket();
        self.finish_handshakes(on_event);
        while self.detaching > 0 && !self.shutdown.is_requested() {
            let Ok(Ready { ended, .. }) = self.wait(None) else { break };
            self.reap_guests(&ended, on_event);
            self.advance_clients(on_event);
        }
        let (how, stop) = (self.settings.on_stop, self.shutdown.clone());
        for guest in self.guests.drain(..) {
            // True after a second shutdown request.
            let hurry = || stop.is_requested();
            let owner = Arc::clone(guest.owner());
            keep_recording(&mut self.settings.record, &guest, on_event);
            let outcome = guest.detach(how, hurry);
            on_event(&Event::Detached { owner: &owner, outcome });
        }
    }

    /// Accepts the pending connections and closes the socket. Those at a socket of a service manager
    /// wait for the next handler.
    fn close_socket(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        socket.close();
        while !socket.is_inherited() {
            match self.accept_from(&socket) {
                Ok(client) => self.clients.push(client),
                Err(error)
                    if matches!(error.raw_os_error(), Some(nix::libc::EINTR | nix::libc::ECONNABORTED)) => {}
                Err(_) => break,
            }
        }
        // If descriptors are short, connections are left. The kernel closes these with the socket,
        // which may block.
        thread::spawn(move || drop(socket));
    }

    /// Serves guests with complete handshakes, and refuses the others, because these would wait for
    /// ever.
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
        // Dropping the data of peers may block, so a thread does it.
        let seen = self.peer_threads.close();
        let (clients, socket) = (std::mem::take(&mut self.clients), self.socket.take());
        if !seen.is_empty() || !clients.is_empty() || socket.is_some() {
            let _ = thread::Builder::new().spawn(move || drop((seen, clients, socket)));
        }
    }
}

/// The events of one wait.
struct Ready {
    stop: bool,
    connection: bool,
    /// True if a background fill has ended.
    fills: bool,
    /// For each guest: true if its process has ended.
    ended: Vec<bool>,
}

/// Writes the recording of this guest, if it is the first with a touch.
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

/// Reports the end of a guest's background fill, once.
fn note_end_of_fill(guest: &mut ServedGuest, waker: &Waker, on_event: &mut impl FnMut(&Event<'_>)) {
    let Some(progress) = guest.end_of_fill(waker) else { return };
    // Pages are left if the VMM has ended, which is reported as the end of the guest.
    if progress.pages_left == 0 {
        let (pages, pages_missing) = (progress.pages_filled, progress.pages_failed + progress.pages_skipped);
        on_event(&Event::Filled { owner: guest.owner(), pages, pages_missing });
    }
}

/// Detaches a guest with all of its memory, in a thread of its own.
fn detach(guest: ServedGuest, results: &ResultSender<ClientOutcome>) {
    let owner = Arc::clone(guest.owner());
    let outcome = guest.detach(OnStop::Finish, || false);
    results.send(ClientOutcome::Detached { owner, outcome });
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// The descriptors for which the handler waits besides its socket, clients and guests.
const OWN_FDS: usize = 3;
/// A client takes a connection and a pidfd.
const DESCRIPTORS_PER_CLIENT: usize = 2;
/// Its guest takes a userfaultfd too, and a duplicate of it for a short time.
const DESCRIPTORS_PER_GUEST: usize = DESCRIPTORS_PER_CLIENT + 2;
/// The pause before another attempt to get descriptors or a thread.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// The most clients that are accepted in one turn.
const MAX_ACCEPTS_PER_TURN: usize = 16;
/// The time limit of unfinished handshakes at shutdown.
const SHUTDOWN_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);
