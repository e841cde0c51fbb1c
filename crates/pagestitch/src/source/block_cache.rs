//! A bounded table of blocks: kept, or being read for one or more requests.
//!
//! ```text
//!   find(block):   kept     ─▶ its bytes
//!                  read     ─▶ the request waits for that read
//!                  absent   ─▶ the caller reads it, and finishes or fails the `BlockRead`
//!                  no room  ─▶ the caller reads it for itself
//! ```

use crate::error::FailureReason;
use crate::guard::guarded;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fmt, io, mem};

/// The blocks of a source.
#[derive(Debug)]
pub(super) struct BlockCache {
    /// The size of a block. Set by the first call that needs it, because the source knows it.
    block_size: OnceLock<u64>,
    state: Mutex<State>,
}

/// Identifies a block. One source can implement both [`Source`](super::Source) and
/// [`Fetch`](super::Fetch) with different bytes, so the number alone is not enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum BlockId {
    Read(u64),
    Fetched(u64),
}

#[derive(Debug, Default)]
struct State {
    blocks: HashMap<BlockId, Block>,
    /// The kept blocks, in the order in which they are considered for removal.
    kept: VecDeque<BlockId>,
    /// The number of blocks that are being read.
    reading: usize,
}

enum Block {
    Kept {
        bytes: Bytes,
        /// Used since it was last considered for removal.
        used: bool,
    },
    Reading(Vec<Waiter>),
}

/// Takes the answer for a request that waits for a block.
pub(super) type Waiter = Box<dyn FnOnce(Answer) + Send + Sync>;

/// The outcome of the read of a block.
#[derive(Debug)]
pub(super) enum Answer {
    Ready(Bytes),
    Failed(io::Error),
    /// The source asks for the same request after a pause.
    Retry(Duration, io::Error),
}

/// The state of a block that is looked for.
pub(super) enum Found {
    Kept(Bytes),
    /// Another request reads it: the waiter gets the answer.
    Waits,
    /// The caller reads it for all that wait.
    Absent(BlockRead),
    /// The caller reads it for itself, because blocks that are being read take all of the room.
    NoRoom,
}

impl BlockCache {
    pub(super) fn new(block_size: OnceLock<u64>) -> Self {
        Self { block_size, state: Mutex::default() }
    }

    /// The size of a block: that of the first call, because the number of a block must always mean
    /// the same bytes.
    pub(super) fn block_size(&self, preferred: impl FnOnce() -> u64) -> u64 {
        *self.block_size.get_or_init(preferred)
    }

    /// Looks for a block, in a cache of `most` blocks. `waiter` is made if another request reads the
    /// block.
    pub(super) fn find(self: &Arc<Self>, id: BlockId, most: usize, waiter: impl FnOnce() -> Waiter) -> Found {
        // Dropped after the lock is released.
        let _removed;
        let mut state = self.state.lock();
        let is_full = state.reading >= most;
        match state.blocks.get_mut(&id) {
            Some(Block::Kept { bytes, used }) => {
                *used = true;
                return Found::Kept(bytes.clone());
            }
            Some(Block::Reading(waiters)) => {
                waiters.push(waiter());
                return Found::Waits;
            }
            None if is_full => return Found::NoRoom,
            None => {}
        }
        _removed = state.make_room(most);
        state.reading += 1;
        state.blocks.insert(id, Block::Reading(Vec::new()));
        Found::Absent(BlockRead { cache: Arc::clone(self), id, ended: false })
    }
}

impl State {
    /// Removes a block if `most` are kept or being read: the first that was not used since it was
    /// last considered.
    fn make_room(&mut self, most: usize) -> Option<Bytes> {
        while self.kept.len() + self.reading >= most {
            let id = self.kept.pop_front()?;
            let Entry::Occupied(mut entry) = self.blocks.entry(id) else { continue };
            match entry.get_mut() {
                Block::Kept { used, .. } if *used => {
                    *used = false;
                    self.kept.push_back(id);
                }
                Block::Kept { bytes, .. } => {
                    let bytes = mem::take(bytes);
                    entry.remove();
                    return Some(bytes);
                }
                Block::Reading(_) => unreachable!("a block that is being read is not kept"),
            }
        }
        None
    }
}

/// The read of a block. If it is dropped before its end, the requests that wait fail.
pub(super) struct BlockRead {
    cache: Arc<BlockCache>,
    id: BlockId,
    ended: bool,
}

impl BlockRead {
    /// Keeps the block, and answers the requests that wait for it.
    pub(super) fn finish(mut self, bytes: &Bytes) {
        for waiter in self.end(Some(bytes.clone())) {
            waiter(Answer::Ready(bytes.clone()));
        }
    }

    /// Fails the requests that wait, with copies of the error. The block is absent again.
    pub(super) fn fail(mut self, error: &io::Error) {
        for waiter in self.end(None) {
            waiter(Answer::Failed(copy(error)));
        }
    }

    /// Has the requests that wait sent again after a pause. The block is absent again.
    pub(super) fn retry(mut self, pause: Duration, error: &io::Error) {
        for waiter in self.end(None) {
            waiter(Answer::Retry(pause, copy(error)));
        }
    }

    fn end(&mut self, bytes: Option<Bytes>) -> Vec<Waiter> {
        self.ended = true;
        let mut state = self.cache.state.lock();
        state.reading -= 1;
        let block = state.blocks.remove(&self.id);
        if let Some(bytes) = bytes {
            state.blocks.insert(self.id, Block::Kept { bytes, used: false });
            state.kept.push_back(self.id);
        }
        match block {
            Some(Block::Reading(waiters)) => waiters,
            _ => unreachable!("only its read ends the state of a block"),
        }
    }
}

impl Drop for BlockRead {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        for waiter in self.end(None) {
            let error = FailureReason::Panicked.error("the source panicked while it read this block");
            waiter(Answer::Failed(error));
        }
    }
}

/// An error of the same kind and text, for each of several requests.
fn copy(error: &io::Error) -> io::Error {
    if let Some(code) = error.raw_os_error() {
        return io::Error::from_raw_os_error(code);
    }
    let text = guarded(|| error.to_string());
    let text = text.unwrap_or_else(|said| format!("an error whose text panics: {said}"));
    FailureReason::copy(error, text)
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept { bytes, used } => write!(f, "{} bytes, used: {used}", bytes.len()),
            Self::Reading(waiters) => write!(f, "being read, {} wait", waiters.len()),
        }
    }
}

impl fmt::Debug for BlockRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "read of block {:?}", self.id)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn unused() -> Waiter {
        unreachable!("no other request reads the block")
    }

    fn read(cache: &Arc<BlockCache>, number: u64, most: usize) -> bool {
        match cache.find(BlockId::Read(number), most, unused) {
            Found::Kept(_) => false,
            Found::Absent(read) => {
                read.finish(&Bytes::from_static(b"bytes"));
                true
            }
            Found::Waits | Found::NoRoom => panic!("no other request reads a block"),
        }
    }

    #[test]
    fn no_more_blocks_are_kept_than_allowed() {
        let cache = Arc::new(BlockCache::new(OnceLock::new()));
        for number in 0..100 {
            assert!(read(&cache, number % 17, 4), "block {number} comes back after 16 others");
            let state = cache.state.lock();
            assert!(state.kept.len() <= 4 && state.blocks.len() == state.kept.len(), "{state:?}");
        }
    }

    #[test]
    fn a_used_block_outlasts_unused_ones() {
        let cache = Arc::new(BlockCache::new(OnceLock::new()));
        assert!(read(&cache, 0, 4));
        for number in 1..100 {
            assert!(read(&cache, number, 4));
            assert!(!read(&cache, 0, 4), "block 0 was used after block {number} was read");
        }
    }

    #[test]
    fn blocks_that_are_being_read_take_room() {
        let cache = Arc::new(BlockCache::new(OnceLock::new()));
        assert!(read(&cache, 9, 2));
        let Found::Absent(first) = cache.find(BlockId::Read(0), 2, unused) else { panic!() };
        let Found::Absent(second) = cache.find(BlockId::Read(1), 2, unused) else { panic!() };
        assert!(matches!(cache.find(BlockId::Read(2), 2, unused), Found::NoRoom));
        assert!(cache.state.lock().kept.is_empty(), "block 9 made room");
        first.finish(&Bytes::new());
        second.fail(&io::Error::other("lost"));
        assert!(!read(&cache, 0, 2) && read(&cache, 1, 2), "an error is not kept");
    }

    #[test]
    fn each_request_that_waits_gets_the_answer_of_the_one_read() {
        for outcome in 0..4 {
            let cache = Arc::new(BlockCache::new(OnceLock::new()));
            let answers = Arc::new(AtomicUsize::new(0));
            let Found::Absent(read) = cache.find(BlockId::Read(3), 1, unused) else { panic!() };
            for _ in 0..5 {
                let answers = Arc::clone(&answers);
                let waiter = move |answer| {
                    let right = match &answer {
                        Answer::Ready(bytes) => outcome == 0 && &bytes[..] == b"xyz",
                        Answer::Failed(error) if outcome == 1 => error.raw_os_error() == Some(5),
                        Answer::Failed(error) => {
                            outcome == 3 && FailureReason::of(error) == FailureReason::Panicked
                        }
                        Answer::Retry(pause, error) => {
                            outcome == 2
                                && pause.as_secs() == 1
                                && error.kind() == io::ErrorKind::ResourceBusy
                        }
                    };
                    assert!(right, "{answer:?}");
                    answers.fetch_add(1, Ordering::Relaxed);
                };
                assert!(matches!(cache.find(BlockId::Read(3), 1, || Box::new(waiter)), Found::Waits));
            }
            match outcome {
                0 => read.finish(&Bytes::from_static(b"xyz")),
                1 => read.fail(&io::Error::from_raw_os_error(5)),
                2 => read.retry(Duration::from_secs(1), &io::ErrorKind::ResourceBusy.into()),
                _ => drop(read),
            }
            assert_eq!(answers.load(Ordering::Relaxed), 5);
            assert_eq!(matches!(cache.find(BlockId::Read(3), 1, unused), Found::Kept(_)), outcome == 0);
        }
    }
}
