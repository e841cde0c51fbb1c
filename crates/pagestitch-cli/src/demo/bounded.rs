//! A region that is longer than its budget is read to its end, while the kernel tells its memory.

use crate::output::{bytes, count};
use pagestitch::source::Memory;
use pagestitch::{Budget, Chunk, Error, Pool, Region};
use serde_json::{Value, json};
use std::fs;

/// The figures of a region that is longer than its budget.
pub(super) struct Bounded {
    limit: u64,
    len: u64,
    /// The bytes that were compared with their source, all of which are equal.
    equal: u64,
    /// The most memory that was taken while the region was read.
    resident_max: u64,
    /// True if the kernel tells `resident_max`, and not the budget.
    is_measured: bool,
    evictions: u64,
}

impl Bounded {
    /// Builds a region of some content, again and again, and compares all of its bytes.
    pub(super) fn read(content: &[u8]) -> Result<Self, Error> {
        let mut block = content.repeat(LEAST_BLOCK.div_ceil(content.len()));
        block.truncate(LENGTH);
        let times = LENGTH.div_ceil(block.len());
        let source = Memory::from(block.clone());
        let budget = Budget::bytes(LIMIT)?;
        let pool = Pool::builder().name("bounded").workers(WORKERS).start()?;
        let chunks = (0..times).map(|_| Chunk::from(source.clone()));
        let region = Region::builder().name("bounded").chunks(chunks).budget(&budget).build(&pool)?;
        let before = anonymous_bytes();
        let (mut rest, mut equal, mut resident_max) = (region.as_slice(), 0, 0);
        for expected in (0..times).flat_map(|_| block.chunks(SAMPLE)) {
            let (part, others) = rest.split_at(expected.len());
            equal += if part == expected { part.len() as u64 } else { 0 };
            rest = others;
            let grown = before.zip(anonymous_bytes()).map(|(before, now)| now.saturating_sub(before));
            resident_max = grown.unwrap_or_else(|| budget.resident_bytes()).max(resident_max);
        }
        let (len, evictions, is_measured) = (region.len() as u64, budget.evictions(), before.is_some());
        Ok(Self { limit: budget.limit(), len, equal, resident_max, is_measured, evictions })
    }

    /// True if each byte was that of its source.
    pub(super) const fn is_right(&self) -> bool {
        self.equal == self.len
    }

    pub(super) fn line(&self) -> String {
        let Self { limit, len, equal, resident_max, evictions, .. } = self;
        let told = if self.is_measured { "the kernel" } else { "the budget" };
        format!(
            "A region of {} in a budget of {}: {equal} of {len} bytes are equal; at most {} of memory with its buffers, as {told} tells; {} left.",
            bytes(*len),
            bytes(*limit),
            bytes(*resident_max),
            count(*evictions as usize, "page"),
        )
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "bytes": self.len, "limit_bytes": self.limit, "equal_bytes": self.equal,
            "resident_bytes_max": self.resident_max, "measured": self.is_measured, "evictions": self.evictions,
        })
    }
}

/// The anonymous memory of this process, as the kernel counts it; `None` if it does not tell. Before Linux 6.10,
/// `smaps_rollup` may skip a mapping.
fn anonymous_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The least length of the region.
const LENGTH: usize = 64 << 20;
const LIMIT: u64 = 8 << 20;
const WORKERS: usize = 2;
/// Content that is shorter is repeated in memory, because a region of a byte a chunk takes long to build.
const LEAST_BLOCK: usize = 1 << 20;
/// The memory is measured after so many bytes.
const SAMPLE: usize = 4 << 20;
