//! Memory of one region as the bytes of another's chunk.
//!
//! A worker that copies an absent page of region A into region B waits until A's server has filled it. That ends where A has another
//! server, and A's own chunks are no memory of regions that B's server fills: a server that waits for itself may wait for ever.

use crate::error::{Error, ErrorKind};
use crate::serve::{INLINE, Server};
use crate::space::Layout;
use pagestitch_kernel::ranges::{ServedRange, served_in};

/// The regions that a layout's memory lies in.
pub(super) struct Below {
    /// Each with the number of a source whose memory lies in it.
    regions: Vec<(usize, ServedRange)>,
}

impl Below {
    pub(super) fn of(layout: &Layout) -> Self {
        let regions = served_in(layout.memory());
        Self { regions }
    }

    /// Refuses what could not be filled.
    pub(super) fn check(&self, name: &str, layout: &Layout, server: &Server) -> Result<(), Error> {
        let own = server.inner().number();
        let refused = self.regions.iter().find_map(|(source, below)| {
            let why = if below.servers.contains(&INLINE) {
                "is filled inline, so that the kernel cannot copy its absent pages"
            } else if below.servers.contains(&own) {
                "waits for the same server, which would wait for itself"
            } else {
                return None;
            };
            Some((source, &below.name, why))
        });
        let Some((&source, other, why)) = refused else { return Ok(()) };
        let chunk = layout.first_chunk_of(source);
        let what = format!(
            "region {name}: chunk {chunk} is memory of region {other}, which {why}: build the two with pools of their own, or copy the \
             bytes out with read_at()"
        );
        Err(Error::new(ErrorKind::BadChunk, what))
    }

    /// What a region over these waits for, that `server` fills.
    pub(super) fn served_by(self, name: &str, server: &Server) -> ServedRange {
        let mut servers = vec![server.inner().number()];
        servers.extend(self.regions.into_iter().flat_map(|(_, below)| below.servers));
        servers.sort_unstable();
        servers.dedup();
        ServedRange { name: name.to_owned(), servers }
    }
}
