//! A small region among many others on one pool.

use crate::case::{Case, Options, Sample};
use crate::systems::PAGE;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::source::Memory;
use pagestitch::{Chunk, Pool, Region};
use std::cell::RefCell;
use std::fs;
use std::rc::Rc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let crowd = Rc::new(RefCell::new(Crowd::new()));
    let case = |others: usize| {
        let crowd = Rc::clone(&crowd);
        let run = move |_| crowd.borrow_mut().build_and_drop(others);
        Case::new("pool, defaults", run).at(others.to_string()).against_point(FEW.to_string())
    };
    [FEW, options.size(MANY).min(descriptors_left())].map(case).into()
}

/// Regions on one pool.
struct Crowd {
    pool: Pool,
    source: Memory,
    regions: Vec<Region>,
}

impl Crowd {
    fn new() -> Self {
        let (pool, source) = (Pool::new().expect("a pool"), Memory::from(vec![7; REGION]));
        Self { pool, source, regions: Vec::new() }
    }

    fn region(&self) -> Region {
        Region::builder().chunk(Chunk::from(self.source.clone())).build(&self.pool).expect("a region")
    }

    /// Builds and drops a region [`TIMES`] times, among so many others.
    fn build_and_drop(&mut self, others: usize) -> Sample {
        while self.regions.len() < others {
            self.regions.push(self.region());
        }
        self.regions.truncate(others);
        // The allocator sorts the memory of dropped regions at the next builds.
        (0..TIMES).for_each(|_| drop(self.region()));
        let sample = Sample::of(TIMES, TIMES * REGION, || (0..TIMES).for_each(|_| drop(self.region())));
        assert!(
            self.region().as_slice().iter().all(|&byte| byte == 7),
            "a page has other bytes than its source"
        );
        Sample { descriptors: fs::read_dir("/proc/self/fd").ok().map(|open| open.count() as u64), ..sample }
    }
}

/// The descriptors that this process may still open, one of which a region may take. Raises the soft
/// limit to the hard one.
fn descriptors_left() -> usize {
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return FEW };
    let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    usize::try_from(hard).unwrap_or(usize::MAX).saturating_sub(SPARE).max(FEW)
}

const FEW: usize = 100;
const MANY: usize = 16_000;
/// The bytes of a region.
const REGION: usize = 16 * PAGE;
/// The regions that a run builds and drops.
const TIMES: usize = 100;
/// The descriptors that other code may need.
const SPARE: usize = 200;
