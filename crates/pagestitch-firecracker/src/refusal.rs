//! What becomes of a guest that is refused: its virtual CPUs would wait for ever for pages that no handler fills. So its memory is
//! marked as bad, or its process is ended, as was declared for bytes that cannot be had.

use pagestitch::{Loss, Process};
use pagestitch_kernel::Features;
use pagestitch_kernel::{AddressRange, Errno, Outcome, PageSize, Uffd};
use std::fs;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

/// A guest that is refused.
pub(crate) struct RefusedGuest<'a> {
    /// Its process, if it is known for certain.
    pub(crate) owner: Option<&'a Process>,
    /// Where it says that its memory is, if it says so.
    pub(crate) announced: Vec<Range<usize>>,
    pub(crate) loss: Loss,
    /// The max_bytes bytes that are marked.
    pub(crate) max_bytes: u64,
}

impl RefusedGuest<'_> {
    /// Sees to it that no thread of the guest waits for ever for memory of this userfaultfd.
    pub(crate) fn poison_or_kill(&self, uffd: OwnedFd) {
        let guest = self.owner.map_or_else(|| String::from("a guest"), ToString::to_string);
        let uffd = match Uffd::adopt(uffd) {
            Ok(uffd) => uffd,
            // It may be this process, which is not to be ended.
            Err(why) => {
                return tracing::error!(guest, %why, "refused, and its memory cannot be marked: it waits for ever; end it");
            }
        };
        // The other way is better than to wait for ever: a process of another PID namespace cannot be ended, and before Linux 6.6
        // no page can be marked.
        let settled = match self.loss {
            Loss::Kill => self.kill().or_else(|why| self.poison_all(&uffd).map_err(|_| why)),
            Loss::Poison => self.poison_all(&uffd).or_else(|_| self.kill()),
        };
        if let Err(why) = settled {
            tracing::error!(guest, %why, "refused, and cannot be ended: it waits for its memory for ever; end it");
        }
    }

    fn kill(&self) -> Result<(), Errno> {
        self.owner.ok_or(Errno::ESRCH)?.kill()
    }

    /// PoisonPass all memory that is registered with the userfaultfd, wherever the guest says that it is.
    fn poison_all(&self, uffd: &Uffd) -> Result<(), Outcome> {
        if !uffd.features().contains(Features::POISON) {
            return Err(Outcome::Refused(Errno::EOPNOTSUPP));
        }
        let mapped = self.owner.and_then(mapped_by);
        if mapped.is_none() && self.announced.is_empty() {
            // Nothing tells where its memory is.
            return Err(Outcome::Refused(Errno::ENODATA));
        }
        let mut pass = PoisonPass { uffd, left: self.max_bytes, until: Instant::now() + TIME_LIMIT };
        for range in mapped.as_ref().unwrap_or(&self.announced) {
            pass.range(range)?;
        }
        Ok(())
    }
}

/// Where a process has memory.
fn mapped_by(process: &Process) -> Option<Vec<Range<usize>>> {
    if process.pid().as_raw() == 0 {
        return None;
    }
    let maps = fs::read(format!("/proc/{}/maps", process.pid())).ok()?;
    let ranges = maps.split(|&byte| byte == b'\n').filter_map(range_of).collect();
    // Its number may be another process's by now. The pass would do no harm there, and no good here.
    (!process.has_ended()).then_some(ranges)
}

/// The addresses at the beginning of a line of `/proc/PID/maps`.
fn range_of(line: &[u8]) -> Option<Range<usize>> {
    let addresses = std::str::from_utf8(line.split(|&byte| byte == b' ').next()?).ok()?;
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// PoisonPass pages, until there are too many of them.
struct PoisonPass<'a> {
    uffd: &'a Uffd,
    left: u64,
    until: Instant,
}

impl PoisonPass<'_> {
    /// PoisonPass what is missing of a range, if it is registered with this userfaultfd.
    fn range(&mut self, range: &Range<usize>) -> Result<(), Outcome> {
        let mut at = range.start;
        while at < range.end {
            let end = (at / HUGE_PAGE + 1).saturating_mul(HUGE_PAGE).min(range.end);
            let Some(addresses) = AddressRange::new(at, end - at, PageSize::system()) else { return Ok(()) };
            if self.left == 0 || Instant::now() >= self.until {
                return Err(Outcome::NoMemory);
            }
            let marked = match self.uffd.poison(addresses) {
                Outcome::Done => end - at,
                Outcome::Partial { bytes } => bytes,
                Outcome::AlreadyThere => PageSize::system().bytes(),
                // A page that is there, of a range of huge pages.
                Outcome::Refused(Errno::EINVAL) if !at.is_multiple_of(HUGE_PAGE) => end - at,
                // Some other memory of the process.
                Outcome::NotRegistered | Outcome::Refused(Errno::EINVAL) if at == range.start => {
                    return Ok(());
                }
                Outcome::NotRegistered => end - at,
                Outcome::ProcessGone => return Ok(()),
                // The guest changes its memory, and waits for an event to be read that is not read any more.
                Outcome::Changing => {
                    thread::yield_now();
                    0
                }
                outcome => return Err(outcome),
            };
            self.left = self.left.saturating_sub(marked as u64);
            at += marked;
        }
        Ok(())
    }
}

/// Marked at once: a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// How long it may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_a_mapping_are_read() {
        let line = b"7f0000001000-7f0000003000 rw-p 00000000 00:00 0   [heap]";
        assert_eq!(range_of(line), Some(0x7f00_0000_1000..0x7f00_0000_3000));
        assert_eq!(range_of(b""), None);
        assert_eq!(range_of(b"\xff-1"), None);
        let process = Process::open(nix::unistd::Pid::this()).unwrap();
        let here = (&raw const line).addr();
        assert!(mapped_by(&process).unwrap().iter().any(|range| range.contains(&here)));
    }
}
