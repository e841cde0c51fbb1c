//! Reads of files that are in flight together. A worker begins the read of a page, and serves other faults until
//! the disk answers. The answer then takes the same journey as that of an asynchronous source.
//!
//! For a file that is read around the page cache, where the kernel allows an io_uring. Otherwise the worker
//! waits for each read, and so many are in flight as there are workers.

use crate::fault::fetch::{FetchReason, Pending};
use crate::fault::fill::{Buffers, read_page};
use crate::fault::request::{FaultRequest, Host};
use crate::space::page_table::Claim;
use pagestitch_kernel::Errno;
use pagestitch_kernel::direct_read::DirectFile;
use pagestitch_kernel::read_ring::{Next, READS, ReadBuffers, ReadRing};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem, thread};

/// The reads in flight of a worker.
#[derive(Debug)]
pub(crate) struct PageReads<H: Host> {
    ring: Ring,
    /// By slot of the ring.
    pending: Vec<Option<Pending<H>>>,
    others_wait: bool,
}

/// The ring of a worker, whose thread must start it.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a worker that starts its ring allocates nothing")]
enum Ring {
    /// It is started when two faults wait for the first time.
    Unstarted(ReadBuffers),
    Started(ReadRing),
    /// The kernel forbids it, or no one thread uses it.
    None,
}

impl<H: Host> PageReads<H> {
    /// Allocates all memory, so that faults allocate nothing.
    pub(crate) fn new() -> Result<Self, Errno> {
        let pending = (0..READS).map(|_| None).collect();
        Ok(Self { ring: Ring::Unstarted(ReadBuffers::new()?), pending, others_wait: false })
    }

    /// For faults that several threads serve in turn: no read begins.
    pub(crate) const fn none() -> Self {
        Self { ring: Ring::None, pending: Vec::new(), others_wait: false }
    }

    /// True if no read is in flight.
    pub(crate) const fn is_idle(&self) -> bool {
        match &self.ring {
            Ring::Started(ring) => ring.in_flight() == 0,
            Ring::Unstarted(_) | Ring::None => true,
        }
    }

    /// True if reads can begin.
    pub(crate) const fn is_possible(&self) -> bool {
        !matches!(self.ring, Ring::None)
    }

    /// Notes whether other faults wait for the worker. A single read takes less time without a ring.
    pub(crate) const fn note_others(&mut self, others_wait: bool) {
        self.others_wait = others_wait;
    }

    /// True if the worker should begin the read of a page, and serve other faults meanwhile.
    pub(super) const fn are_useful(&self) -> bool {
        self.is_possible() && (self.others_wait || !self.is_idle())
    }

    /// Begins the read of the first page of a claim. False, and nothing is changed, if the worker has to wait for
    /// the read: if too many are in flight, or if the kernel forbids it.
    pub(super) fn begin(
        &mut self,
        region: &Arc<H>,
        claim: &mut Claim<'_>,
        (file, offset): (&DirectFile, u64),
        asked: impl FnOnce() -> FaultRequest,
        permit: H::Permit,
    ) -> bool {
        let Some(slot) = self.start().and_then(|ring| ring.begin(file, offset)) else { return false };
        // A region that is being dropped has no use for the bytes.
        self.pending[slot] = Pending::new(region, claim.split_off(1), FetchReason::Now(asked()), permit);
        true
    }

    fn start(&mut self) -> Option<&mut ReadRing> {
        if matches!(self.ring, Ring::Unstarted(_)) {
            if let Ring::Unstarted(buffers) = mem::replace(&mut self.ring, Ring::None) {
                match ReadRing::start(buffers) {
                    Ok(ring) => self.ring = Ring::Started(ring),
                    Err((errno, _)) => {
                        log!(debug, %errno, "no io_uring, so a worker waits for each read of a file");
                    }
                }
            }
        }
        match &mut self.ring {
            Ring::Started(ring) => Some(ring),
            Ring::Unstarted(_) | Ring::None => None,
        }
    }

    /// Waits until a read has ended, another descriptor is readable, or the time is over.
    pub(crate) fn wait(&mut self, other: BorrowedFd<'_>, most: Option<Duration>) {
        if let Ring::Started(ring) = &mut self.ring {
            check(ring.wait(other, most));
        }
    }

    /// Sends the reads that were begun, so that the disk works meanwhile, and installs the pages whose reads have
    /// ended. True if there were some.
    pub(crate) fn complete(&mut self, buffers: &mut Buffers) -> bool {
        let Ring::Started(ring) = &mut self.ring else { return false };
        let before = ring.in_flight();
        if before == 0 {
            return false;
        }
        check(ring.send());
        while let Some(next) = ring.next() {
            let Next::Read(slot, read) = next else { continue };
            if let Some(pending) = self.pending[slot].take() {
                deliver(pending, read, buffers);
            }
        }
        ring.in_flight() < before
    }

    /// Waits for all reads, and installs their pages.
    pub(crate) fn finish(&mut self, buffers: &mut Buffers) {
        while !self.is_idle() {
            if let Ring::Started(ring) = &mut self.ring {
                check(ring.wait_for_reads());
            }
            self.complete(buffers);
        }
    }
}

/// Delivers the bytes of a page. If they are not whole, an ordinary read gives them, or the reason.
fn deliver<H: Host>(pending: Pending<H>, read: Result<&[u8], Errno>, buffers: &mut Buffers) {
    let (region, page) = (Arc::clone(pending.region()), pending.span().first);
    let answer: io::Result<&[u8]> = match read {
        Ok(bytes) if bytes.len() == region.page_size().bytes() => Ok(bytes),
        _ => read_page(&region, page, buffers),
    };
    // The last pointer to the region must not end here.
    drop(region);
    pending.answer(answer);
}

/// Tries again later without memory. The kernel has allowed the ring at its start, and has no other reason to
/// refuse.
fn check(waited: Result<(), Errno>) {
    match waited {
        Ok(()) => {}
        Err(Errno::EAGAIN) => thread::yield_now(),
        Err(errno) => panic!("io_uring_enter on an owned ring: {errno}"),
    }
}
