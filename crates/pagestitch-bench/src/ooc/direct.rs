//! Plain reads around the page cache, without a mapping.

use crate::prototypes::direct::Block;
use crate::systems::PAGE;
use nix::libc::O_DIRECT;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// A file with the pages of [`write_pages`](super::write_pages).
pub(super) struct DirectReads {
    file: File,
    pages: usize,
}

impl DirectReads {
    /// Opens a file. Where the file system has no reads around the page cache, they pass through it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let direct = File::options().read(true).custom_flags(O_DIRECT).open(path);
        let file = direct.or_else(|_| File::open(path))?;
        let pages = file.metadata()?.len() as usize / PAGE;
        Ok(Self { file, pages })
    }

    pub(super) const fn pages(&self) -> usize {
        self.pages
    }

    /// Reads a page.
    pub(super) fn read(&self, page: usize, block: &mut Block) -> io::Result<()> {
        self.file.read_exact_at(&mut block.0, (page * PAGE) as u64)
    }

    /// Reads pages one by one. True if each has the bytes that were written.
    pub(super) fn are_right(&self, pages: &[u32]) -> bool {
        let mut block = Block([0; PAGE]);
        pages.iter().all(|&page| {
            let word = (u64::from(page) + 1).to_ne_bytes();
            self.read(page as usize, &mut block).is_ok() && block.0.chunks_exact(8).all(|bytes| bytes == word)
        })
    }
}
