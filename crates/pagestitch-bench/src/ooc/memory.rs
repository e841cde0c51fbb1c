//! Writers of memory that is larger than its budget. The written pages go back to a source in memory.
//!
//! The time is that of the touches. Pages that are dirty at the end go to the source afterwards, and all written
//! pages are compared there.

use super::trace::{Pattern, Trace};
use super::words::Words;
use super::write_pages;
use super::writing::{Writer, are_written};
use crate::affinity::allowed;
use crate::case::Sample;
use crate::prototypes::evict::Bounded;
use crate::systems::PAGE;
use crate::team::at_once;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pagestitch::source::{WritableFile, WritableSource};
use pagestitch::{Budget, Builder, Chunk, Region, Server, WriteBack};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, RwLock};

/// The source of a region that is written: memory with the pages of [`write_pages`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum MemorySource {
    /// Bytes below a lock.
    Bytes,
    /// A memfd, as regions that are served inline need it.
    Memfd,
}

/// Measures a region of so many pages of which a budget holds so many.
pub(crate) fn write_region(
    source: MemorySource,
    (pages, resident): (usize, usize),
    trace: &Trace,
    server: impl Into<Server>,
) -> Sample {
    let budget = Budget::bytes((resident * PAGE) as u64).expect("a budget");
    match source {
        MemorySource::Bytes => {
            let bytes = Arc::new(RwLock::new(filled(pages)));
            write_to(written_back(Arc::clone(&bytes), &budget), server, trace, |page, into| {
                into.copy_from_slice(&bytes.read().expect("bytes")[page * PAGE..][..PAGE]);
            })
        }
        MemorySource::Memfd => {
            let memfd = filled_memfd(pages);
            write_to(written_back(of_memfd(&memfd), &budget), server, trace, |page, into| {
                memfd.read_exact_at(into, (page * PAGE) as u64).expect("a page");
            })
        }
    }
}

/// A region of a memfd with so many pages, whose written pages go back there.
pub(crate) fn region_of_memfd(pages: usize, budget: &Budget) -> Builder {
    written_back(of_memfd(&filled_memfd(pages)), budget)
}

fn written_back<S: WritableSource + 'static>(source: Arc<S>, budget: &Budget) -> Builder {
    Region::builder().chunk(Chunk::writable(source)).budget(budget).write_back(WriteBack::ToSource)
}

fn write_to(
    region: Builder,
    server: impl Into<Server>,
    trace: &Trace,
    read: impl Fn(usize, &mut [u8]),
) -> Sample {
    let region = region.build_shared(server).expect("a region");
    let (sample, writer) = touch(&Words::of(&region), trace);
    region.finish().expect("a source that takes all pages");
    assert!(are_written(&[writer], read), "the source has other bytes than were written");
    sample
}

/// Measures the prototype `evict move w`.
pub(crate) fn write_prototype((pages, resident): (usize, usize), trace: &Trace) -> Sample {
    let memory = Bounded::new(filled(pages), pages, resident, true);
    let (sample, writer) = memory.serve(|| touch(&Words::of_view(memory.view(), pages * PAGE), trace));
    let store = memory.into_store();
    let read = |page: usize, into: &mut [u8]| into.copy_from_slice(&store[page * PAGE..][..PAGE]);
    assert!(are_written(&[writer], read), "the store has other bytes than were written");
    sample
}

fn touch(words: &Words<'_>, trace: &Trace) -> (Sample, Writer) {
    let is_right = |&page: &u32| words.are_right(page as usize, Pattern::Random);
    assert!(trace.fill.iter().all(is_right), "a page has other bytes than its source");
    let pages = trace.touches.len();
    let mut writer = Writer::new(0);
    let (sample, right) = at_once(
        (pages, pages * PAGE),
        &allowed()[..1],
        vec![(&mut writer, &trace.touches[..])],
        |(writer, part)| writer.touch(words, part),
    );
    assert!(right[0], "a page has other bytes than were written");
    (sample, writer)
}

fn filled_memfd(pages: usize) -> File {
    let mut memfd = File::from(memfd_create("pages", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    write_pages(&mut memfd, pages).expect("memory");
    memfd
}

fn of_memfd(memfd: &File) -> Arc<WritableFile> {
    let memfd = memfd.try_clone().expect("a descriptor");
    Arc::new(WritableFile::from_file(memfd, "memfd").expect("a file"))
}

fn filled(pages: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pages * PAGE);
    write_pages(&mut bytes, pages).expect("memory");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ooc::has_write_back;
    use crate::prototypes::evict::moves_no_pages;
    use pagestitch::Inline;

    #[test]
    fn writers_of_bounded_memory_leave_their_bytes_in_its_source() {
        let sizes = (16 << 10, 4 << 10);
        let trace = Trace::new(Pattern::HalfWriting, sizes, 20_000, 1);
        if let Some(reason) = moves_no_pages().or_else(|| (!has_write_back()).then_some("no write-back")) {
            println!("SKIPPED writers_of_bounded_memory_leave_their_bytes_in_its_source: {reason}");
            return;
        }
        assert_eq!(write_prototype(sizes, &trace).pages, 20_000);
        let pool = super::super::pool();
        assert_eq!(write_region(MemorySource::Bytes, sizes, &trace, &pool).pages, 20_000);
        assert_eq!(write_region(MemorySource::Memfd, sizes, &trace, Inline).pages, 20_000);
    }
}
