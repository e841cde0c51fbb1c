//! The memory of a refused guest. Its virtual CPUs would wait forever for pages that no handler
//! fills. So its memory is poisoned, or its process is killed, as [`OnUnavailable`] says.

use pagestitch::{OnUnavailable, Process};
use pagestitch_kernel::Features;
use pagestitch_kernel::{AddressRange, Batch, Errno, Outcome, PageSize, Uffd};
use std::fs;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

/// A guest that is refused.
pub(crate) struct RefusedGuest<'a> {
    /// Its process, if that is known for certain.
    pub(crate) owner: Option<&'a Process>,
    /// The ranges of memory that the guest announced, if it did.
    pub(crate) announced: Vec<Range<usize>>,
    pub(crate) on_unavailable: OnUnavailable,
    /// The most bytes that are poisoned.
    pub(crate) max_bytes: u64,
}

impl RefusedGuest<'_> {
    /// Poisons the memory of this userfaultfd, or kills the guest, so that no thread of it waits
    /// forever.
    pub(crate) fn poison_or_kill(&self, uffd: OwnedFd) {
        let guest = self.owner.map_or_else(|| String::from("a guest"), ToString::to_string);
        let uffd = match Uffd::adopt(uffd) {
            Ok(uffd) => uffd,
            // The process may be this one, which must not be killed.
            Err(reason) => {
                return tracing::error!(guest, %reason, "the refused guest waits forever, because its memory cannot be poisoned: kill it");
            }
        };
        // The other way is better than a wait forever: a process of another PID namespace cannot
        // be killed, and before Linux 6.6 no page can be poisoned.
        let done = match self.on_unavailable {
            OnUnavailable::Kill => self.kill().or_else(|reason| self.poison_all(&uffd).map_err(|_| reason)),
            OnUnavailable::Poison => self.poison_all(&uffd).or_else(|_| self.kill()),
        };
        if let Err(reason) = done {
            tracing::error!(guest, %reason, "the refused guest waits forever, because it cannot be killed: kill it");
        }
    }

    fn kill(&self) -> Result<(), Errno> {
        self.owner.ok_or(Errno::ESRCH)?.kill()
    }

    /// Poisons all memory of the guest that is registered with a userfaultfd, wherever the guest announced it,
    /// and ends these registrations. Registered memory lets threads wait for messages that no thread reads: at
    /// a write-protected page, and where the kernel takes a poison marker for a missing page.
    fn poison_all(&self, uffd: &Uffd) -> Result<(), Outcome> {
        if !uffd.features().contains(Features::POISON) {
            return Err(Outcome::Refused(Errno::EOPNOTSUPP));
        }
        let mapped = self.owner.and_then(mapped_by);
        if mapped.is_none() && self.announced.is_empty() {
            // The addresses of its memory are unknown.
            return Err(Outcome::Refused(Errno::ENODATA));
        }
        let until = Instant::now() + TIME_LIMIT;
        let mut pass = PoisonPass { uffd, left: self.max_bytes, until, is_mapped: mapped.is_some() };
        for range in mapped.as_ref().unwrap_or(&self.announced) {
            let Some(addresses) = AddressRange::new(range.start, range.len(), PageSize::system()) else {
                continue;
            };
            // Missing pages of the others would read as zeros.
            if pass.range(range)? == Missing::None {
                // A refusal means that another userfaultfd has the range, or that it is unmapped by now.
                let _ = uffd.unregister(addresses);
                pass.let_changes_end(addresses)?;
            }
        }
        Ok(())
    }
}

/// The ranges of memory that a process has mapped.
fn mapped_by(process: &Process) -> Option<Vec<Range<usize>>> {
    if process.pid() == 0 {
        return None;
    }
    let maps = fs::read(format!("/proc/{}/maps", process.pid())).ok()?;
    let ranges = maps.split(|&byte| byte == b'\n').filter_map(range_of).collect();
    // If the process has ended, another one may have its pid, and these ranges may be that one's.
    (!process.has_ended()).then_some(ranges)
}

/// The addresses at the beginning of a line of `/proc/PID/maps`.
fn range_of(line: &[u8]) -> Option<Range<usize>> {
    let addresses = std::str::from_utf8(line.split(|&byte| byte == b' ').next()?).ok()?;
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// Poisons pages, up to a number of bytes and a time.
struct PoisonPass<'a> {
    uffd: &'a Uffd,
    left: u64,
    until: Instant,
    /// True if the ranges are whole mappings of the process, and false if the guest has announced them.
    is_mapped: bool,
}

/// The missing pages of a range after a pass over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    None,
    /// Pages that are not registered, or behind such a page.
    Some,
}

impl PoisonPass<'_> {
    /// Poisons the missing pages of a range that are registered with a userfaultfd.
    fn range(&mut self, range: &Range<usize>) -> Result<Missing, Outcome> {
        let (mut at, mut missing) = (range.start, Missing::None);
        while at < range.end {
            let end = (at / HUGE_PAGE + 1).saturating_mul(HUGE_PAGE).min(range.end);
            let Some(addresses) = AddressRange::new(at, end - at, PageSize::system()) else {
                return Ok(Missing::Some);
            };
            if self.left == 0 || Instant::now() >= self.until {
                return Err(Outcome::NoMemory);
            }
            let passed = match self.uffd.poison_protected(addresses) {
                Outcome::Done => end - at,
                Outcome::Partial { bytes } => bytes,
                Outcome::AlreadyThere => PageSize::system().bytes(),
                // A page that is present, in a range of huge pages.
                Outcome::Refused(Errno::EINVAL) if at % HUGE_PAGE != 0 => end - at,
                // Other memory of the process, and the kernel's page that each process has.
                Outcome::NotRegistered if self.is_mapped && at == range.start => return Ok(Missing::Some),
                Outcome::Refused(Errno::EINVAL) if at > isize::MAX as usize => return Ok(Missing::Some),
                Outcome::NotRegistered => {
                    missing = Missing::Some;
                    PageSize::system().bytes()
                }
                Outcome::ProcessGone => return Ok(Missing::Some),
                // The guest changes its mappings.
                Outcome::Changing => {
                    self.read_events();
                    thread::yield_now();
                    0
                }
                outcome => return Err(outcome),
            };
            self.left = self.left.saturating_sub(passed as u64);
            at += passed;
        }
        Ok(missing)
    }

    /// Returns when no thread of the guest waits until the event of its change is read. `range` was registered.
    fn let_changes_end(&self, range: AddressRange) -> Result<(), Outcome> {
        // The kernel refuses this while a change is under way, whose event it may queue a moment later.
        while self.uffd.continue_pages(range.prefix(PageSize::system().bytes())) == Outcome::Changing {
            if Instant::now() >= self.until {
                return Err(Outcome::Changing);
            }
            self.read_events();
            thread::yield_now();
        }
        Ok(())
    }

    /// Reads the events for which threads of the guest wait. That of a fork stays unread, so that the guest is
    /// killed after the time limit, because missing pages of its child would read as zeros.
    fn read_events(&self) {
        if !self.uffd.features().contains(Features::EVENT_FORK) {
            // A message that cannot be decoded is read all the same.
            let _ = Batch::with_capacity(MESSAGES).read(self.uffd, PageSize::system());
        }
    }
}

/// The most messages of one read.
const MESSAGES: usize = 64;
/// The size of one step: a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// The time limit.
const TIME_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_from_a_line_of_maps() {
        let line = b"7f0000001000-7f0000003000 rw-p 00000000 00:00 0   [heap]";
        assert_eq!(range_of(line), Some(0x7f00_0000_1000..0x7f00_0000_3000));
        assert_eq!(range_of(b""), None);
        assert_eq!(range_of(b"\xff-1"), None);
        let process = Process::open(std::process::id()).unwrap();
        let here = (&raw const line).addr();
        assert!(mapped_by(&process).unwrap().iter().any(|range| range.contains(&here)));
    }
}
