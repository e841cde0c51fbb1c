//! Touches half of which write, and the check of the written file.

use super::words::Words;
use crate::systems::PAGE;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A thread that touches pages and writes to every other one: to a word that no other thread writes.
pub(super) struct Writer {
    /// The number of the word in each page.
    word: usize,
    /// The words that it has written, by their page.
    written: HashMap<u32, u64>,
}

impl Writer {
    pub(super) fn new(thread: usize) -> Self {
        Self { word: 1 + thread, written: HashMap::new() }
    }

    /// Touches pages. True if each has the bytes of the file, or those that this thread has written.
    pub(super) fn touch(&mut self, words: &Words<'_>, pages: &[u32]) -> bool {
        pages.iter().enumerate().all(|(turn, &page)| {
            let own = self.written.get(&page).copied().unwrap_or_else(|| value_of(page));
            let is_right = words.word(page, 0) == value_of(page) && words.word(page, self.word) == own;
            if turn % 2 == 1 {
                let value = !(turn as u64);
                words.write(page, self.word, value);
                self.written.insert(page, value);
            }
            is_right
        })
    }
}

/// Compares all bytes of the written pages with those of the file, and writes the bytes that the file had
/// before. False if a word differs. Has one page in memory at a time, because the memory of the reader is limited.
pub(super) fn check_and_restore(file: &File, writers: &[Writer]) -> io::Result<bool> {
    let (mut bytes, mut is_right) = ([0; PAGE], true);
    for (page, expected) in written_pages(writers) {
        let offset = u64::from(page) * PAGE as u64;
        file.read_exact_at(&mut bytes, offset)?;
        is_right &= bytes == *of_words(expected);
        file.write_all_at(&of_words([value_of(page); PAGE / 8]), offset)?;
    }
    file.sync_data()?;
    Ok(is_right)
}

/// True if all written pages have their bytes, according to `read`, which reads a page.
pub(super) fn are_written(writers: &[Writer], read: impl Fn(usize, &mut [u8])) -> bool {
    let mut bytes = [0; PAGE];
    written_pages(writers).all(|(page, expected)| {
        read(page as usize, &mut bytes);
        bytes == *of_words(expected)
    })
}

/// The written pages, each with its words.
fn written_pages(writers: &[Writer]) -> impl Iterator<Item = (u32, [u64; PAGE / 8])> {
    let mut written = BTreeMap::new();
    for Writer { word, written: words } in writers {
        for (&page, &value) in words {
            written.entry(page).or_insert_with(Vec::new).push((*word, value));
        }
    }
    written.into_iter().map(|(page, words)| {
        let mut expected = [value_of(page); PAGE / 8];
        words.into_iter().for_each(|(word, value)| expected[word] = value);
        (page, expected)
    })
}

/// The word of which a page of the file consists.
const fn value_of(page: u32) -> u64 {
    page as u64 + 1
}

fn of_words(words: [u64; PAGE / 8]) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_ne_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ooc::write_pages;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::ProtFlags;

    #[test]
    fn a_file_without_a_written_word_is_found_and_has_its_bytes_again() {
        let mut file = File::from(memfd_create("pages", MFdFlags::MFD_CLOEXEC).unwrap());
        write_pages(&mut file, 4).unwrap();
        let words = Words::mapped(&file, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        let mut writers = [Writer::new(0), Writer::new(1)];
        assert!(writers.iter_mut().all(|writer| writer.touch(&words, &[0, 2, 3, 2, 1, 3])));
        assert!(!Writer::new(0).touch(&words, &[2]), "it has another thread's word");
        assert_eq!((words.word(2, 1), words.word(2, 2), words.word(2, 3)), (!3, !3, 3));
        words.write(2, 2, !1);
        for is_right in [false, true] {
            assert_eq!(check_and_restore(&file, &writers).unwrap(), is_right);
            assert!((0..4).all(|page| (0..PAGE / 8).all(|word| words.word(page, word) == value_of(page))));
            writers = [Writer::new(0), Writer::new(1)];
        }
    }
}
