//! The list of adopted userfaultfds. If two regions adopted the same one, each fault would be read
//! by either of them, and the page of the other would stay absent.

use pagestitch_kernel::Uffd;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An entry in the list, until it is dropped. It is dropped before the userfaultfd is closed.
#[derive(Debug)]
pub(super) struct Listed(u64);

struct Entry {
    number: u64,
    fd: RawFd,
    region: String,
}

static ALL: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

impl Listed {
    /// Adds a userfaultfd. If it is in the list, the error is the name of its region. If the kernel
    /// cannot compare descriptors (`kcmp(2)`), it counts as another one.
    pub(super) fn new(uffd: &Uffd, region: &str) -> Result<Self, String> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let (number, fd) = (NUMBERS.fetch_add(1, Ordering::Relaxed), uffd.as_fd().as_raw_fd());
        let mut all = all();
        // An entry with the same number is of a descriptor that was closed.
        if let Some(other) = all.iter().find(|other| other.fd != fd && uffd.is_also(other.fd)) {
            return Err(other.region.clone());
        }
        all.push(Entry { number, fd, region: region.to_owned() });
        Ok(Self(number))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        all().retain(|entry| entry.number != self.0);
    }
}

fn all() -> MutexGuard<'static, Vec<Entry>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}
