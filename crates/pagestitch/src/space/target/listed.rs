//! The userfaultfds that are served: one that is adopted twice would give each fault to either
//! region, and the other would wait.

use pagestitch_kernel::Uffd;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An entry among those that are served, until it is dropped: before the userfaultfd is closed.
#[derive(Debug)]
pub(super) struct Listed(u64);

struct Entry {
    number: u64,
    fd: RawFd,
    region: String,
}

static ALL: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

impl Listed {
    /// The name of the region that serves it already is the error. Where the kernel does not
    /// compare descriptors (`kcmp(2)`), it is taken for another one.
    pub(super) fn new(uffd: &Uffd, region: &str) -> Result<Self, String> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let (number, fd) = (NUMBERS.fetch_add(1, Ordering::Relaxed), uffd.as_fd().as_raw_fd());
        let mut all = all();
        // The same number is of one that was closed.
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
