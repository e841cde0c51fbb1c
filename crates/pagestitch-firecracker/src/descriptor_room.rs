//! Descriptors that are kept free for the guest of a client: the kernel closes a userfaultfd that
//! does not fit into the process, and the guest would wait forever.

use std::os::fd::{AsFd, OwnedFd};

/// Descriptors that are kept free. Each is a duplicate of any other one.
#[derive(Debug, Default)]
pub(crate) struct DescriptorRoom(Vec<OwnedFd>);

impl DescriptorRoom {
    /// Keeps `count` descriptors free. `None` if the process has fewer left.
    pub(crate) fn keep(count: usize, any: &impl AsFd) -> Option<Self> {
        let mut room = Self::default();
        room.refill(count, any).then_some(room)
    }

    /// Keeps `count` descriptors free again. False if the process has fewer left.
    pub(crate) fn refill(&mut self, count: usize, any: &impl AsFd) -> bool {
        let missing = self.0.len()..count;
        self.0.extend(missing.map_while(|_| any.as_fd().try_clone_to_owned().ok()));
        self.0.len() >= count
    }

    /// The number of descriptors.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Gives `count` of them back to the process, for something that takes as many at once.
    pub(crate) fn free(&mut self, count: usize) {
        self.0.truncate(self.0.len().saturating_sub(count));
    }
}
