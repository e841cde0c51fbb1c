//! The share of the pages that pass through the standby list before they are gone.
//!
//! A page that comes back from the list saves a read, and tells the policy that it is in use. But each move
//! to the list flushes the TLBs of all CPUs that run the process, where many pages are dropped with one
//! flush. Measured with 16 threads on two CPUs, random reads of a file: 18.5 us a page if a quarter of the pages
//! passes through the list, and 15.4 if none does. Simulated (`benches/replacement`): the list saves a third of
//! the reads where most pages that leave are wanted again soon, and hardly any where one page of ten is.
//!
//! So while few pages come back, the list is short: a few batches pass through it, and wait as long as all do
//! in a long list, so that the share of those that come back is the same. The other memory is left to the regions.

/// Decides for each batch whether it passes through the list, and how long the list is.
#[derive(Debug)]
pub(super) struct Sampling {
    /// The most pages that can wait.
    most: usize,
    /// True if all batches pass through the list.
    all: bool,
    /// True until the pages in the list have come there at the present share.
    settles: bool,
    /// The batches since one did.
    passed_over: usize,
    /// The pages that have left in this window.
    left: usize,
    /// The pages that had come back when this window began.
    returned_before: u64,
}

impl Sampling {
    /// For a list in which so many pages can wait.
    pub(super) const fn new(most: usize) -> Self {
        Self { most, all: true, settles: true, passed_over: 0, left: 0, returned_before: 0 }
    }

    /// The number of pages that wait.
    pub(super) fn waiting(&self) -> usize {
        self.most / self.one_of()
    }

    /// True if the next batch passes through the list. `returned` is the number of all pages that have come
    /// back from it.
    pub(super) fn takes_next(&mut self, returned: u64) -> bool {
        if self.left >= self.waiting().max(LEAST_WINDOW) * self.one_of() {
            self.look(returned);
        }
        self.passed_over += 1;
        let takes = self.passed_over >= self.one_of();
        if takes {
            self.passed_over = 0;
        }
        takes
    }

    /// Pages have been chosen: for the list, or to leave at once.
    pub(super) fn note_chosen(&mut self, pages: usize) {
        self.left += pages;
    }

    /// The application has pages move to the list. Each counts as the pages that leave for one that is sampled,
    /// because its return counts so.
    pub(super) fn note_requested(&mut self, pages: usize) {
        self.left += pages * self.one_of();
    }

    /// Changes the share at the end of a window, if it is wrong.
    ///
    /// Pages that come back are compared with all that leave and not with those that have moved, because fewer
    /// move than planned where a thread without a CPU holds up the end of the list; as many wait all the same.
    fn look(&mut self, returned: u64) {
        let in_window = returned.saturating_sub(self.returned_before) as usize * self.one_of();
        let all = in_window * if self.all { STOPS_BELOW } else { BEGINS_FROM } >= self.left;
        let changes = !self.settles && all != self.all;
        self.all ^= changes;
        (self.settles, self.left, self.returned_before) = (changes, 0, returned);
    }

    /// One batch of so many passes through the list.
    fn one_of(&self) -> usize {
        if self.all { 1 } else { (self.most / LEAST_WAITING).clamp(1, EVERY) }
    }
}

/// One batch of so many passes through the list while few pages come back.
const EVERY: usize = 32;
/// The least number of pages that wait, if the list has room for them.
const LEAST_WAITING: usize = 64;
/// The least number of pages by which the share of those that come back is judged.
const LEAST_WINDOW: usize = 1024;
/// All batches pass through the list until less than one page of so many comes back.
const STOPS_BELOW: usize = 16;
/// All batches pass through the list again if one page of so many comes back.
const BEGINS_FROM: usize = 8;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const MOST: usize = 4096;

    /// The share of batches of 64 pages that pass through the list, if one page of `one_of` comes back.
    fn share(sampling: &mut Sampling, returned: &mut u64, one_of: u64) -> f64 {
        const BATCHES: u32 = 6000;
        let mut taken = 0;
        for _ in 0..BATCHES {
            sampling.note_chosen(64);
            if sampling.takes_next(*returned) {
                *returned += 64 / one_of;
                taken += 1;
            }
        }
        f64::from(taken) / f64::from(BATCHES)
    }

    #[test]
    fn few_batches_pass_through_a_short_list_while_few_pages_come_back() {
        let (mut sampling, mut returned) = (Sampling::new(MOST), 0);
        assert!(share(&mut sampling, &mut returned, 16) == 1.0);
        assert_eq!(sampling.waiting(), MOST);
        assert!(share(&mut sampling, &mut returned, 32) < 0.1);
        assert_eq!(sampling.waiting(), MOST / EVERY);
        assert!((0.03..0.04).contains(&share(&mut sampling, &mut returned, 16)));
        assert!(share(&mut sampling, &mut returned, 8) > 0.6);
        assert!(share(&mut sampling, &mut returned, 16) == 1.0);
    }

    /// The pages of the long list still come back while few pages move to the short one.
    #[test]
    fn the_first_window_of_a_share_does_not_count() {
        let (mut sampling, mut returned) = (Sampling::new(MOST), 0);
        let mut windows_at_all = 0;
        while sampling.waiting() == MOST {
            (windows_at_all, returned) = (windows_at_all + 1, returned + MOST as u64 / 32);
            sampling.note_chosen(MOST);
            sampling.takes_next(returned);
        }
        assert_eq!(windows_at_all, 2);
        for (comes_back, waiting) in [(MOST as u64, MOST / EVERY), (64, MOST / EVERY), (256, MOST)] {
            returned += comes_back;
            sampling.note_chosen(LEAST_WINDOW * EVERY);
            sampling.takes_next(returned);
            assert_eq!(sampling.waiting(), waiting, "{comes_back}");
        }
    }

    #[test]
    fn all_batches_pass_through_a_list_that_cannot_be_shorter() {
        for most in [0, 100, 127] {
            let (mut sampling, mut returned) = (Sampling::new(most), 0);
            assert!(share(&mut sampling, &mut returned, 64) == 1.0, "{most}");
            assert_eq!(sampling.waiting(), most);
        }
    }
}
