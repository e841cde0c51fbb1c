//! The shards of a region, as the application sees them.

use crate::api::AnyRegion;
use std::ops::Range;

/// A part of a region with a userfaultfd of its own. [`AnyRegion::shards`] lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shard {
    /// Its byte offsets in the region.
    pub range: Range<u64>,
    /// The CPU to which its worker is pinned: a thread that is pinned to the same CPU is served
    /// fastest. `None` if its faults have no worker of their own, or one that is not pinned.
    pub cpu: Option<usize>,
}

impl AnyRegion {
    /// The [shards](crate::Builder::shards) of the region, in the order of their offsets.
    ///
    /// Threads that are pinned to CPUs, such as those of a virtual machine or of a database with a
    /// thread for each core, are served fastest if each works in a part of its own, on the CPU of
    /// that part's worker: waking a worker on another, idle CPU takes longer than the rest of a
    /// fault.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Placement, Pool, Region};
    /// # use std::thread;
    /// let pool = Pool::builder().placement(Placement::PerCpu).start()?;
    /// let region = Region::builder().chunk(Chunk::hole(64 << 20)).shards(pool.workers()).build(&pool)?;
    /// thread::scope(|scope| {
    ///     for shard in region.shards() {
    ///         let part = shard.range.start as usize..shard.range.end as usize;
    ///         let bytes = &region.as_slice()[part];
    ///         scope.spawn(move || {
    ///             println!("sched_setaffinity(2) to {:?}", shard.cpu);
    ///             assert!(bytes.iter().all(|&byte| byte == 0));
    ///         });
    ///     }
    /// });
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn shards(&self) -> Vec<Shard> {
        let (served, size) = (&self.served, self.served.page_size());
        let shard = |(number, (_, span))| {
            let pages = size.offsets(span);
            let len = served.len();
            let range = pages.start.min(len)..pages.end.min(len);
            Shard { range, cpu: self.server.cpu_of(served, number) }
        };
        served.uffd.spans(served.target.all(), size).enumerate().map(shard).collect()
    }
}
