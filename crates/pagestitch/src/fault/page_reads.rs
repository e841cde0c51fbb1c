//! Reads of files that are in flight together. A worker begins the read of a page, and serves other faults until
//! the disk answers. The answer then takes the same journey as that of an asynchronous source.
//!
//! A worker does so for files on a disk that are read around the page cache, where the kernel allows an io_uring.
//! It has no read in flight while a fault may hang, because no other worker can install the page. Otherwise a worker
//! waits for each read, and as many reads are in flight as there are workers.

use crate::fault::fetch::{FetchReason, Pending};
use crate::fault::fill::{Buffers, read_page};
use crate::fault::request::{FaultRequest, Host};
use crate::space::Mapping;
use crate::space::page_table::Claim;
use pagestitch_kernel::Errno;
use pagestitch_kernel::direct_read::DirectFile;
use pagestitch_kernel::read_ring::{Next, READS, ReadBuffers, ReadRing};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem, thread};

/// The reads in flight of a worker.
#[derive(Debug)]
pub(crate) struct PageReads<H: Host> {
    ring: Ring,
    /// By slot of the ring.
    begun: Vec<Option<Begun<H>>>,
    others_wait: bool,
    /// The share of a read in the time of the disk, in nanoseconds: a moving average.
    cost: u64,
}

/// A read in flight. It has no page if its region is being dropped.
#[derive(Debug)]
struct Begun<H: Host> {
    at: Instant,
    pending: Option<Pending<H>>,
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
        let begun = (0..READS).map(|_| None).collect();
        Ok(Self { ring: Ring::Unstarted(ReadBuffers::new()?), begun, others_wait: false, cost: 0 })
    }

    /// For faults that several threads serve in turn: no read begins.
    pub(crate) const fn none() -> Self {
        Self { ring: Ring::None, begun: Vec::new(), others_wait: false, cost: 0 }
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

    /// Makes way for a fault of a region. Waits for the reads in flight if the fault may hang, because no other
    /// worker can install their pages. `others_wait`: other faults wait for the
    /// worker, because a single read takes less time without a ring.
    pub(crate) fn prepare(&mut self, region: &Mapping, others_wait: bool, buffers: &mut Buffers) {
        self.others_wait = others_wait;
        if !self.is_idle() && region.may_hang() {
            self.finish(buffers);
        }
        while let Ring::Started(ring) = &mut self.ring {
            if ring.in_flight() < READS {
                break;
            }
            let waited = ring.wait_for_reads();
            self.recover(waited, buffers);
            self.complete(buffers);
        }
    }

    /// True if the worker should begin the read of a page, and serve other faults meanwhile.
    pub(super) const fn are_useful(&self) -> bool {
        self.is_possible() && (self.others_wait || !self.is_idle())
    }

    /// The cost of a read among others.
    pub(super) const fn cost(&self) -> u64 {
        self.cost
    }

    /// Begins the read of the first page of a claim. False, and the pages stay claimed, if the worker has to wait
    /// for the read.
    pub(super) fn begin(
        &mut self,
        region: &Arc<H>,
        claim: &mut Claim<'_>,
        (file, offset): (&DirectFile, u64),
        asked: impl FnOnce() -> FaultRequest,
        permit: H::Permit,
    ) -> bool {
        let Some(slot) = self.start().and_then(|ring| ring.begin(file, offset)) else { return false };
        let pending = Pending::new(region, claim.split_off(1), FetchReason::Now(asked()), permit);
        self.begun[slot] = Some(Begun { at: Instant::now(), pending });
        true
    }

    fn start(&mut self) -> Option<&mut ReadRing> {
        if matches!(self.ring, Ring::Unstarted(_)) {
            if let Ring::Unstarted(buffers) = mem::replace(&mut self.ring, Ring::None) {
                match ReadRing::start(buffers) {
                    Ok(ring) => self.ring = Ring::Started(ring),
                    Err(errno) => {
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
    pub(crate) fn wait(&mut self, other: BorrowedFd<'_>, most: Option<Duration>, buffers: &mut Buffers) {
        if let Ring::Started(ring) = &mut self.ring {
            let waited = ring.wait(other, most);
            self.recover(waited, buffers);
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
        let sent = ring.send();
        let mut cost = None;
        while let Some(next) = ring.next() {
            let Next::Read(slot, read) = next else { continue };
            let Some(Begun { at, pending }) = self.begun[slot].take() else { continue };
            cost.get_or_insert_with(|| at.elapsed().as_nanos() as u64 / before as u64);
            if let Some(pending) = pending {
                deliver(pending, read, buffers);
            }
        }
        let has_ended = ring.in_flight() < before;
        self.cost = cost.map_or(self.cost, |cost| self.cost - self.cost / 8 + cost / 8);
        self.recover(sent, buffers);
        has_ended
    }

    /// Waits for all reads, and installs their pages.
    pub(crate) fn finish(&mut self, buffers: &mut Buffers) {
        while !self.is_idle() {
            if let Ring::Started(ring) = &mut self.ring {
                let waited = ring.wait_for_reads();
                self.recover(waited, buffers);
            }
            self.complete(buffers);
        }
    }

    /// Recovers from a call of the kernel that has failed. Without memory the worker tries again; after any other error
    /// it reads all pages itself, because a filter of system calls that came after the start of the ring forbids its use.
    fn recover(&mut self, called: Result<(), Errno>, buffers: &mut Buffers) {
        match called {
            Ok(()) => {}
            Err(Errno::EAGAIN) => thread::yield_now(),
            Err(errno) => {
                log!(warn, %errno, "an io_uring is of no use any more, so a worker waits for each read of a file");
                self.ring = Ring::None;
                for begun in self.begun.iter_mut().filter_map(Option::take) {
                    begun.pending.into_iter().for_each(|pending| deliver(pending, Err(errno), buffers));
                }
            }
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
