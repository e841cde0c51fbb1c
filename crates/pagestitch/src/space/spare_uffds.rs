//! The userfaultfds of dropped regions, kept for the next ones.
//!
//! A close of a userfaultfd walks all mappings of the process: 0.4 ms in a process with 16,000 regions.
//! To end the registration of one range takes a microsecond.

use pagestitch_kernel::uffd::{OpenError, kernel_features};
use pagestitch_kernel::{Errno, Features, Uffd};
use parking_lot::Mutex;
use std::mem;

/// Userfaultfds without a registration, an event and a waiting thread.
#[derive(Debug, Default)]
pub(crate) struct SpareUffds(Mutex<Vec<Uffd>>);

impl SpareUffds {
    /// A userfaultfd as [`Uffd::open`] returns it.
    pub(crate) fn open(&self, wanted: Features) -> Result<Uffd, OpenError> {
        let features = wanted & kernel_features()?;
        let mut spares = self.0.lock();
        let spare = spares.iter().rposition(|spare| spare.features() == features);
        match spare.map(|index| spares.swap_remove(index)) {
            Some(spare) => Ok(spare),
            None => {
                drop(spares);
                let is_short = |error: &OpenError| matches!(error.errno(), Errno::EMFILE | Errno::ENFILE);
                match Uffd::open(wanted) {
                    Err(error) if is_short(&error) && self.close_all() => Uffd::open(wanted),
                    opened => opened,
                }
            }
        }
    }

    /// Closes all that are kept, because their descriptors are needed. False if there are none.
    pub(crate) fn close_all(&self) -> bool {
        let spares = mem::take(&mut *self.0.lock());
        !spares.is_empty()
    }

    /// Keeps a userfaultfd, or closes it if there are enough.
    pub(super) fn keep(&self, uffd: Uffd) {
        let mut spares = self.0.lock();
        if spares.len() < SPARES_MAX {
            spares.push(uffd);
        }
    }
}

/// The most userfaultfds that are kept, because each takes a descriptor. More are dropped at once only
/// at the end of a program.
const SPARES_MAX: usize = 64;
