//! A replacement policy that no user process can have, simulated: the measure for those of a budget.

use std::collections::{HashMap, HashSet, VecDeque};

/// S3-FIFO as its authors describe it, with a perfect reference bit for each page: a page that was touched in the
/// small queue moves on to the main one, and one that was touched in the main queue begins there anew.
///
/// ```
/// use pagestitch_bench::simulated::PerfectBits;
///
/// let mut memory = PerfectBits::new(20);
/// assert!(!memory.touch(7) && memory.touch(7));
/// (100..200).for_each(|page| _ = memory.touch(page));    // a scan
/// assert!(memory.touch(7) && !memory.touch(100));
/// ```
#[derive(Debug)]
pub struct PerfectBits {
    /// The most pages.
    most: usize,
    small: VecDeque<u64>,
    main: VecDeque<u64>,
    /// The touches of each page in memory since it came, 3 at most.
    touches: HashMap<u64, u8>,
    ghosts: VecDeque<u64>,
    is_ghost: HashSet<u64>,
}

impl PerfectBits {
    /// Memory for so many pages.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let (small, main, ghosts) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Self { most, small, main, touches: HashMap::new(), ghosts, is_ghost: HashSet::new() }
    }

    /// Touches a page. True if it is in memory already.
    pub fn touch(&mut self, page: u64) -> bool {
        if let Some(touches) = self.touches.get_mut(&page) {
            *touches = (*touches + 1).min(3);
            return true;
        }
        if self.touches.len() >= self.most {
            self.drop_one();
        }
        self.touches.insert(page, 0);
        let queue = if self.is_ghost.remove(&page) { &mut self.main } else { &mut self.small };
        queue.push_back(page);
        false
    }

    fn drop_one(&mut self) {
        while self.small.len() >= self.most / 10 {
            let Some(page) = self.small.pop_front() else { break };
            if self.touches[&page] > 0 {
                self.touches.insert(page, 0);
                self.main.push_back(page);
                continue;
            }
            self.touches.remove(&page);
            self.ghosts.push_back(page);
            self.is_ghost.insert(page);
            if self.ghosts.len() > self.most {
                let oldest = self.ghosts.pop_front().expect("there are ghosts");
                self.is_ghost.remove(&oldest);
            }
            return;
        }
        while let Some(page) = self.main.pop_front() {
            match self.touches[&page] {
                0 => {
                    self.touches.remove(&page);
                    return;
                }
                count => {
                    self.touches.insert(page, count - 1);
                    self.main.push_back(page);
                }
            }
        }
    }
}
