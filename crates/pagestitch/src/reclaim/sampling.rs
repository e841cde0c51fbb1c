//! The share of the pages that pass through the standby list before they are gone.
//!
//! A page that comes back from the list saves a read, and tells the policy that it is in use. But each move
//! to the list flushes the TLBs of all CPUs that run the process, where many pages are dropped with one
//! flush. Measured with 16 threads on two CPUs: random reads of a file take 32 us a page with the list, and
//! 25 without; but touches by Zipf's law, where a tenth of the pages comes back, read 7 % more without it.
//! So while few pages come back, one batch of [`EVERY`] passes through the list, where its pages wait as
//! many times as long.

/// Decides for each batch whether it passes through the list.
#[derive(Debug)]
pub(super) struct Sampling {
    /// True if all batches do.
    all: bool,
    /// The batches since one did.
    passed_over: u32,
    /// The pages that have moved to the list in this window.
    moved: u64,
    /// The pages that had come back when this window began.
    returned_before: u64,
}

impl Sampling {
    pub(super) const fn new() -> Self {
        Self { all: true, passed_over: 0, moved: 0, returned_before: 0 }
    }

    /// True if the next batch passes through the list. `returned` is the number of all pages that have come
    /// back from it.
    pub(super) fn takes_next(&mut self, returned: u64) -> bool {
        if self.moved >= WINDOW {
            let in_window = returned.saturating_sub(self.returned_before);
            self.all = in_window * if self.all { STOPS_BELOW } else { BEGINS_FROM } >= self.moved;
            (self.moved, self.returned_before) = (0, returned);
        }
        self.passed_over += 1;
        let takes = self.all || self.passed_over >= EVERY;
        if takes {
            self.passed_over = 0;
        }
        takes
    }

    /// Pages of a batch have been chosen for the list.
    pub(super) fn note_moved(&mut self, pages: usize) {
        self.moved += pages as u64;
    }
}

/// One batch of so many passes through the list while few pages come back.
const EVERY: u32 = 4;
/// The pages after which the share of those that came back is looked at.
const WINDOW: u64 = 2048;
/// All batches pass through the list until less than one page of so many comes back.
const STOPS_BELOW: u64 = 16;
/// All batches pass through the list again if one page of so many comes back. It waits longer now.
const BEGINS_FROM: u64 = 8;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    /// The share of batches of 64 pages that pass through the list, if one page of `one_of` comes back.
    fn share(sampling: &mut Sampling, returned: &mut u64, one_of: u64) -> f64 {
        const BATCHES: u32 = 1200;
        let mut taken = 0;
        for _ in 0..BATCHES {
            if sampling.takes_next(*returned) {
                sampling.note_moved(64);
                *returned += 64 / one_of;
                taken += 1;
            }
        }
        f64::from(taken) / f64::from(BATCHES)
    }

    #[test]
    fn a_quarter_of_the_batches_passes_through_the_list_while_few_pages_come_back() {
        let (mut sampling, mut returned) = (Sampling::new(), 0);
        assert!(share(&mut sampling, &mut returned, 8) == 1.0);
        assert!(share(&mut sampling, &mut returned, 32) < 0.3);
        assert!((0.25..0.26).contains(&share(&mut sampling, &mut returned, 16)));
        assert!(share(&mut sampling, &mut returned, 4) > 0.8);
        assert!(share(&mut sampling, &mut returned, 8) == 1.0);
    }
}
