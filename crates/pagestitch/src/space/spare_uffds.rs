//! The userfaultfds of dropped regions, kept for the next ones.
//!
//! A close of a userfaultfd walks all mappings of the process: 0.4 ms in a process with 16,000 regions.
//! To end the registration of one range takes a microsecond.

use pagestitch_kernel::uffd::{OpenError, kernel_features};
use pagestitch_kernel::{Features, Uffd};
use parking_lot::Mutex;

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
                Uffd::open(wanted)
            }
        }
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
