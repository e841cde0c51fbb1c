//! A region whose chunk is memory of another region.
//!
//! A worker that copies an absent page of region A into region B blocks until A's server has filled
//! the page. A server that waits for itself may wait forever. So A must have another server than B,
//! and A's own chunks must not be memory of regions that B's server fills.

use crate::error::{Error, ErrorKind};
use crate::serve::{INLINE, Server};
use crate::space::Layout;
use pagestitch_kernel::ranges::{ServedRange, served_in};

/// The regions that hold the memory of a layout's chunks.
pub(super) struct Below {
    /// Each region, with the number of a source whose memory lies in it.
    regions: Vec<(usize, ServedRange)>,
}

impl Below {
    pub(super) fn of(layout: &Layout) -> Self {
        let regions = served_in(layout.memory());
        Self { regions }
    }

    /// Refuses a layout whose fills could wait for their own server.
    pub(super) fn check(&self, name: &str, layout: &Layout, server: &Server) -> Result<(), Error> {
        let own = server.inner().number();
        let refused = self.regions.iter().find_map(|(source, below)| {
            let why = if below.servers.contains(&INLINE) {
                "is served inline, so that the kernel cannot copy its absent pages"
            } else if below.servers.contains(&own) {
                "is filled by the same server, which would wait for itself"
            } else {
                return None;
            };
            Some((source, &below.name, why))
        });
        let Some((&source, other, why)) = refused else { return Ok(()) };
        let chunk = layout.first_chunk_of(source);
        let what = format!(
            "region {name}: chunk {chunk} is memory of region {other}, which {why}: give each region a pool of its own, or copy the \
             bytes out with read_at()"
        );
        Err(Error::new(ErrorKind::NestedRegion, what).of_chunk(chunk))
    }

    /// The servers that a region over these waits for: `server`, and those of the regions below.
    pub(super) fn served_by(self, name: &str, server: &Server) -> ServedRange {
        let mut servers = vec![server.inner().number()];
        servers.extend(self.regions.into_iter().flat_map(|(_, below)| below.servers));
        servers.sort_unstable();
        servers.dedup();
        ServedRange { name: name.to_owned(), servers }
    }
}
