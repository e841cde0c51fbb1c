//! A peer that has connected, until it is a guest or refused. What it sends is read, and closed, in a thread of its own: see
//! `peer_threads`.

use crate::handshake::{GuestMappings, Handshake, HandshakeError, PartialHandshake};
use crate::peer_threads::ResultSender;
use crate::refusal::RefusedGuest;
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use pagestitch::{Loss, Process};
use pagestitch_kernel::Features;
use pagestitch_kernel::fd_passing;
use pagestitch_kernel::uffd::handshake_probe;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A peer that has connected, and is not served yet.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    user: u32,
    /// Held from when the connection was taken.
    process: Result<Arc<Process>, Errno>,
    /// Whether that is the process that connected, whatever has become of its number.
    certain: bool,
    handshake: PartialHandshake,
    /// None: it may take for ever.
    until: Option<Instant>,
    /// Whether there is something to read.
    readable: bool,
    /// Why it is to be refused.
    verdict: Option<HandshakeError>,
}

/// What is declared for all clients.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Requirements {
    pub(crate) loss: Loss,
    /// How much memory a guest has.
    pub(crate) bytes: u64,
}

/// A guest that can be served.
#[derive(Debug)]
pub(crate) struct ReadyGuest {
    pub(crate) client: Client,
    pub(crate) owner: Arc<Process>,
    pub(crate) mappings: GuestMappings,
    pub(crate) uffd: OwnedFd,
}

/// What a look at a client has found.
#[derive(Debug)]
pub(crate) enum ClientOutcome {
    /// There is more to come.
    Waiting(Client),
    Complete(Box<ReadyGuest>),
    Refused {
        owner: Option<i32>,
        why: HandshakeError,
    },
}

impl Client {
    pub(crate) fn new(stream: UnixStream, handshake_timeout: Duration) -> Self {
        let user = getsockopt(&stream, PeerCredentials).map_or(u32::MAX, |peer| peer.uid());
        let process = Process::peer(&stream).map(Arc::new);
        // Too far off to be told: never.
        let until = Instant::now().checked_add(handshake_timeout);
        let (handshake, certain) = (PartialHandshake::default(), peers_are_certain());
        Self { stream, user, process, certain, handshake, until, readable: false, verdict: None }
    }

    pub(crate) const fn user(&self) -> u32 {
        self.user
    }

    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// When its time is over, if it still has time.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.until.filter(|_| !self.is_ready())
    }

    /// Whether there is something to do for it.
    pub(crate) const fn is_ready(&self) -> bool {
        self.readable || self.verdict.is_some()
    }

    pub(crate) const fn is_refused(&self) -> bool {
        self.verdict.is_some()
    }

    pub(crate) const fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Has it refused when it is seen to, if it is not complete by then.
    pub(crate) fn refuse(&mut self, why: HandshakeError) {
        self.verdict.get_or_insert(why);
    }

    /// Refuses it where its time is over: also a client that sends a byte now and then.
    pub(crate) fn expire(&mut self, now: Instant, handshake_timeout: Duration) {
        if self.until.is_some_and(|until| until <= now) {
            self.refuse(self.handshake.late(handshake_timeout));
        }
    }

    /// A complete handshake that cannot be served after all.
    pub(crate) fn refused(mut self, handed: Handshake, why: HandshakeError) -> Self {
        self.handshake = PartialHandshake::of(handed);
        self.refuse(why);
        self
    }

    /// Reads what has come, and tells what it is; refuses the client where that is no handshake, and closes what it has sent: this
    /// may take as long as the client likes.
    pub(crate) fn handle(
        (mut client, requirements): (Self, Requirements),
        results: &ResultSender<ClientOutcome>,
    ) {
        match client.advance(requirements) {
            Ok(None) => results.send(ClientOutcome::Waiting(client)),
            Ok(Some((owner, Handshake { mappings, uffd }))) => {
                results.send(ClientOutcome::Complete(Box::new(ReadyGuest { client, owner, mappings, uffd })));
            }
            Err(why) => {
                client.poison_or_kill(requirements);
                results.send(ClientOutcome::Refused { owner: client.name(), why });
            }
        }
    }

    fn advance(
        &mut self,
        requirements: Requirements,
    ) -> Result<Option<(Arc<Process>, Handshake)>, HandshakeError> {
        let handed = if std::mem::take(&mut self.readable) { self.read()? } else { None };
        let Some(handed) = handed else { return self.verdict.take().map_or(Ok(None), Err) };
        match self.check(requirements, &handed) {
            Ok(owner) => Ok(Some((owner, handed))),
            Err(why) => {
                self.handshake = PartialHandshake::of(handed);
                Err(why)
            }
        }
    }

    /// Reads what has come.
    fn read(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        let mut buffer = vec![0; 16 << 10];
        match fd_passing::receive_all(&self.stream, &mut buffer) {
            Ok(received) => self.handshake.take(&buffer[..received.bytes], received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The process of a guest, if all is there that serving it takes.
    fn check(
        &mut self,
        requirements: Requirements,
        handed: &Handshake,
    ) -> Result<Arc<Process>, HandshakeError> {
        let guest = handed.mappings.bytes();
        let process = self.process.clone().map_err(|errno| HandshakeError::Peer(errno.into()))?;
        if !self.certain {
            self.certain = process.holds(&handed.uffd).map_err(|errno| HandshakeError::Peer(errno.into()))?;
        }
        if !self.certain {
            return Err(HandshakeError::Peer(Errno::ESRCH.into()));
        }
        if guest != requirements.bytes {
            return Err(HandshakeError::Size { guest, file: requirements.bytes });
        }
        if requirements.loss == Loss::Kill || !pages_can_be_poisoned() {
            process.can_kill().map_err(|errno| HandshakeError::CannotKill(errno.into()))?;
        }
        Ok(process)
    }

    /// Sees to it that a guest that is refused does not wait for its memory for ever.
    fn poison_or_kill(&mut self, requirements: Requirements) {
        let (fds, announced) = self.handshake.give_up();
        let process = self.process.as_ref().ok().map(Arc::as_ref);
        for uffd in fds {
            // A process that has the number of one that has ended holds no userfaultfd of it.
            let certain = |process: &&Process| self.certain || process.holds(&uffd) == Ok(true);
            let max_bytes = requirements.bytes.saturating_mul(MAX_POISON_FACTOR);
            let refused = RefusedGuest {
                owner: process.filter(certain),
                announced: announced.clone(),
                loss: requirements.loss,
                max_bytes,
            };
            refused.poison_or_kill(uffd);
        }
    }

    /// The number of its process, where no other can have it.
    fn name(&self) -> Option<i32> {
        let process = self.process.as_ref().ok().filter(|process| self.certain && !process.has_ended())?;
        Some(process.pid().as_raw()).filter(|&pid| pid > 0)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn peers_are_certain() -> bool {
    static CERTAIN: OnceLock<bool> = OnceLock::new();
    *CERTAIN.get_or_init(|| Process::peers_are_certain().unwrap_or(false))
}

fn pages_can_be_poisoned() -> bool {
    static POISON: OnceLock<bool> = OnceLock::new();
    *POISON.get_or_init(|| handshake_probe().map_or(true, |features| features.contains(Features::POISON)))
}

/// A refused guest with so many times the memory of the snapshot is ended: each of its pages would have to be marked.
const MAX_POISON_FACTOR: u64 = 8;
