//! A connected peer before it becomes a guest or is refused. A thread of its own reads and closes
//! its data: see `peer_threads`.

use crate::descriptor_room::DescriptorRoom;
use crate::handshake::{GuestMappings, Handshake, HandshakeError, PartialHandshake};
use crate::peer_threads::ResultSender;
use crate::refusal::RefusedGuest;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use pagestitch::{Metrics, OnUnavailable, Process};
use pagestitch_kernel::fd_passing;
use pagestitch_kernel::uffd::kernel_features;
use pagestitch_kernel::{Errno, Features, Uffd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A connected peer that is not served yet.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    user: u32,
    /// For the userfaultfd that the client sends, and for the duplicate of it.
    room: DescriptorRoom,
    /// Opened when the connection was accepted.
    process: Result<Arc<Process>, Errno>,
    /// True if `process` is certainly the process that connected, even if its pid was reused.
    certain: bool,
    handshake: PartialHandshake,
    /// The end of its time; none if it has no limit.
    until: Option<Instant>,
    /// True if the stream has data to read.
    readable: bool,
    /// The reason for its refusal.
    verdict: Option<HandshakeError>,
}

/// The conditions that all clients must meet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Requirements {
    pub(crate) on_unavailable: OnUnavailable,
    /// The bytes of memory of a guest.
    pub(crate) bytes: u64,
    pub(crate) kernel: KernelAnswers,
}

/// A guest with a complete handshake.
#[derive(Debug)]
pub(crate) struct ReadyGuest {
    pub(crate) client: Client,
    pub(crate) owner: Arc<Process>,
    pub(crate) mappings: GuestMappings,
    pub(crate) uffd: OwnedFd,
}

/// The result of one step with a client, or of the end of a guest.
#[derive(Debug)]
pub(crate) enum ClientOutcome {
    /// The handshake is incomplete.
    Waiting(Client),
    Complete(Box<ReadyGuest>),
    Refused {
        owner: Option<u32>,
        reason: HandshakeError,
    },
    /// A guest that had all of its memory runs without the handler.
    Detached {
        owner: Arc<Process>,
        outcome: Result<Metrics, pagestitch::Error>,
    },
}

impl Client {
    pub(crate) fn new(
        stream: UnixStream,
        room: DescriptorRoom,
        handshake_timeout: Duration,
        kernel: KernelAnswers,
    ) -> Self {
        let user = getsockopt(&stream, PeerCredentials).map_or(u32::MAX, |peer| peer.uid());
        let process = Process::peer(&stream).map(Arc::new);
        // A moment that `Instant` cannot represent counts as no limit.
        let until = Instant::now().checked_add(handshake_timeout);
        let (handshake, certain) = (PartialHandshake::default(), kernel.peers_are_certain);
        Self { stream, user, room, process, certain, handshake, until, readable: false, verdict: None }
    }

    pub(crate) const fn user(&self) -> u32 {
        self.user
    }

    /// Frees the descriptor for the duplicate of its userfaultfd.
    pub(crate) fn free_descriptor(&mut self) {
        self.room.free(1);
    }

    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// The end of its time, if the client still waits for data.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.until.filter(|_| !self.is_ready())
    }

    /// True if a thread has work to do for this client.
    pub(crate) const fn is_ready(&self) -> bool {
        self.readable || self.verdict.is_some()
    }

    pub(crate) const fn is_refused(&self) -> bool {
        self.verdict.is_some()
    }

    pub(crate) const fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Refuses the client in its next step, unless its handshake is complete by then.
    pub(crate) fn refuse(&mut self, reason: HandshakeError) {
        self.verdict.get_or_insert(reason);
    }

    /// Refuses the client if its time is over, even if it sends a byte now and then.
    pub(crate) fn expire(&mut self, now: Instant, handshake_timeout: Duration) {
        if self.until.is_some_and(|until| until <= now) {
            self.refuse(self.handshake.late(handshake_timeout));
        }
    }

    /// Takes back a complete handshake that cannot be served.
    pub(crate) fn refused(mut self, handed: Handshake, reason: HandshakeError) -> Self {
        self.handshake = PartialHandshake::of(handed);
        self.refuse(reason);
        self
    }

    /// Reads the data of the client and sends the result. Refuses the client if the data is no
    /// handshake, and closes what it sent. A client can make this take arbitrarily long.
    pub(crate) fn handle(
        (mut client, requirements): (Self, Requirements),
        results: &ResultSender<ClientOutcome>,
    ) {
        match client.advance(requirements) {
            Ok(None) => results.send(ClientOutcome::Waiting(client)),
            Ok(Some((owner, Handshake { mappings, uffd }))) => {
                results.send(ClientOutcome::Complete(Box::new(ReadyGuest { client, owner, mappings, uffd })));
            }
            Err(reason) => {
                client.poison_or_kill(requirements);
                results.send(ClientOutcome::Refused { owner: client.name(), reason });
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
            Err(reason) => {
                self.handshake = PartialHandshake::of(handed);
                Err(reason)
            }
        }
    }

    /// Reads the data of the client.
    fn read(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        let mut buffer = vec![0; 16 << 10];
        let room = self.room.len();
        self.room.free(room.saturating_sub(1));
        match fd_passing::receive_all(&self.stream, &mut buffer) {
            Ok(received) => {
                if received.fds.is_empty() && !received.cut {
                    // The userfaultfd comes with later bytes.
                    self.room.refill(room, &self.stream);
                }
                self.handshake.take(&buffer[..received.bytes], received)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.room.refill(room, &self.stream);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The process of a guest, if the guest meets all conditions.
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
        if requirements.on_unavailable == OnUnavailable::Kill || !requirements.kernel.pages_can_be_poisoned {
            process.can_kill().map_err(|errno| HandshakeError::CannotKill(errno.into()))?;
        }
        Ok(process)
    }

    /// Poisons the memory of a refused guest, or kills its process, so that it does not wait for
    /// ever.
    fn poison_or_kill(&mut self, requirements: Requirements) {
        let (fds, announced) = self.handshake.give_up();
        let process = self.process.as_ref().ok().map(Arc::as_ref);
        for uffd in fds {
            // A process that reused the pid of a dead peer holds no userfaultfd of it.
            let certain = |process: &&Process| self.certain || process.holds(&uffd) == Ok(true);
            let max_bytes = requirements.bytes.saturating_mul(MAX_POISON_FACTOR);
            let refused = RefusedGuest {
                owner: process.filter(certain),
                announced: announced.clone(),
                on_unavailable: requirements.on_unavailable,
                max_bytes,
            };
            refused.poison_or_kill(uffd);
        }
    }

    /// The pid of its process, unless another process may have the same pid.
    fn name(&self) -> Option<u32> {
        let process = self.process.as_ref().ok().filter(|process| self.certain && !process.has_ended())?;
        Some(process.pid()).filter(|&pid| pid > 0)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The answers of this kernel. A handler asks at its start, because descriptors are free then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KernelAnswers {
    /// True if the process of a peer is certain, whatever its pid.
    peers_are_certain: bool,
    pages_can_be_poisoned: bool,
}

impl KernelAnswers {
    /// Asks, and prepares the adoption of userfaultfds. Fails if descriptors or memory are missing now. After
    /// any other refusal the handler starts, because an adoption may do without.
    pub(crate) fn ask() -> io::Result<Self> {
        Uffd::prepare_adoption().or_else(|errno| if errno.is_transient() { Err(errno) } else { Ok(()) })?;
        let pages_can_be_poisoned = match kernel_features() {
            Ok(features) => features.contains(Features::POISON),
            // A process that may not open a userfaultfd learns by trying.
            Err(refused) => refused.transient().map_or(Ok(true), Err)?,
        };
        Ok(Self { peers_are_certain: Process::peers_are_certain()?, pages_can_be_poisoned })
    }
}

/// A refused guest with more than this many times the memory of the snapshot is killed, because
/// poisoning each of its pages would take too long.
const MAX_POISON_FACTOR: u64 = 8;
