//! The list of adopted userfaultfds. If two regions adopted the same one, each fault would be read
//! by either of them, and the page of the other would stay absent.

use pagestitch_kernel::Uffd;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An adopted userfaultfd and its entry in the list.
///
/// Invariant: the entry goes before the descriptor is closed, because the number of a closed
/// descriptor may be given at once to a userfaultfd that is about to be adopted.
#[derive(Debug)]
pub(crate) struct ListedUffd {
    uffd: Uffd,
    number: u64,
}

struct Entry {
    number: u64,
    fd: RawFd,
    region: String,
}

static ALL: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

impl ListedUffd {
    /// Adds a userfaultfd. If it is in the list, the error is the name of its region. If the kernel
    /// cannot compare descriptors (`kcmp(2)`), it counts as another one.
    pub(super) fn new(uffd: Uffd, region: &str) -> Result<Self, String> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let (number, fd) = (NUMBERS.fetch_add(1, Ordering::Relaxed), uffd.as_fd().as_raw_fd());
        let mut all = all();
        // The application has closed the descriptor of an entry with the same number, perhaps in a forked child.
        if let Some(other) = all.iter().find(|other| other.fd != fd && uffd.is_also(other.fd)) {
            return Err(other.region.clone());
        }
        all.push(Entry { number, fd, region: region.to_owned() });
        Ok(Self { uffd, number })
    }

    pub(crate) const fn uffd(&self) -> &Uffd {
        &self.uffd
    }
}

impl Drop for ListedUffd {
    fn drop(&mut self) {
        all().retain(|entry| entry.number != self.number);
    }
}

fn all() -> MutexGuard<'static, Vec<Entry>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagestitch_kernel::{Features, process::is_same_file};
    use std::path::Path;
    use std::sync::mpsc;
    use std::{fs, thread};

    #[test]
    fn an_entry_is_removed_while_its_descriptor_is_open() {
        let uffd = ListedUffd::new(Uffd::open(Features::NONE).unwrap(), "first").unwrap();
        let fd = uffd.uffd().as_fd().as_raw_fd();
        if !is_same_file(fd, fd) {
            return println!("SKIPPED: no kcmp(2)");
        }
        let list = all();
        thread::scope(|scope| {
            let (send, folder) = mpsc::channel();
            scope.spawn(move || {
                send.send(Path::new("/proc").join(fs::read_link("/proc/thread-self").unwrap())).unwrap();
                drop(uffd);
            });
            let stat = folder.recv().unwrap().join("stat");
            while !fs::read_to_string(&stat).unwrap().contains(") S ") {
                thread::yield_now();
            }
            assert!(is_same_file(fd, fd), "the thread waits for the list");
            drop(list);
        });
        assert!(all().iter().all(|entry| entry.region != "first"));
    }
}
