//! Regions that grow: chunks are appended while other threads read.

use crate::api::{AnyRegion, Region, SharedRegion};
use crate::error::{BuildOption, Error, ErrorKind};
use crate::serve;
use crate::source::Backing;
use crate::space::{Chunk, IntoChunk, Reveal};
use pagestitch_kernel::ranges::served_in;
use std::ops::Range;

impl Region {
    /// Appends a chunk, and returns its place in the region. Other threads read the region meanwhile,
    /// also the page in which it ended: an append changes no byte before it.
    ///
    /// The region is built with a [`capacity`](crate::Builder::capacity). Chunks lie end to end at any
    /// byte length, unless the builder or the chunk asks for an alignment. A slice ends at the length
    /// at its call, so a reader calls [`as_slice`](Self::as_slice) again to see more.
    ///
    /// * **Sources** are read when a page is touched, as those of the build. If the last page is
    ///   present and not full, the append reads the chunk's bytes of that page at once and writes them
    ///   there.
    /// * **Copies.** Nothing is mapped in place while threads read, so a memfd or a file is copied.
    /// * **Threads.** Several threads can append: one waits for the other. A source must not append to a
    ///   region that reads it.
    /// * **In a [budget](crate::Builder::budget)** appended pages leave and come back as others. Their bytes must not
    ///   change: memory, sealed memfds, immutable files, stable sources and holes. A chunk
    ///   that would begin in a page of a source that may change is refused without an [alignment](Chunk::align).
    /// * **Borrowed memory** cannot be appended, also inside a [`scope`](crate::scope()): copy it.
    ///
    /// # Errors
    ///
    /// After an error the region is as before.
    ///
    /// * [`ErrorKind::InvalidOption`]: the region has no capacity. [`ErrorKind::TooLarge`]: it is
    ///   too small; the error names both numbers.
    /// * [`ErrorKind::InvalidChunk`]: the chunk is empty or leaves its source, or its pages move in:
    ///   donated pages, and memfds that are filled later. [`ErrorKind::NestedRegion`]: it is memory of
    ///   a region. [`ErrorKind::SharedSource`]: other processes may change it.
    /// * [`ErrorKind::SourceFailed`]: its bytes for the last page cannot be read.
    /// * [`ErrorKind::LimitReached`]: the kernel opens no further page.
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    /// use std::thread;
    ///
    /// let log = Region::builder().capacity(1 << 30).build(&Pool::new()?)?;
    /// thread::scope(|scope| {
    ///     scope.spawn(|| (0..100u32).for_each(|line| drop(log.append(format!("line {line}\n")))));
    ///     while log.as_slice().iter().filter(|&&byte| byte == b'\n').count() < 100 {
    ///         assert!(log.is_empty() || log.as_slice().starts_with(b"line 0\n"));
    ///     }
    /// });
    /// assert!(log.as_slice().ends_with(b"line 99\n"));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// A slice lives on across an append, and borrowed memory does not compile:
    ///
    /// ```compile_fail,E0597
    /// # use pagestitch::{Pool, Region};
    /// # let log = Region::builder().capacity(1 << 30).build(&Pool::new()?)?;
    /// let line = vec![b'x'; 100];
    /// log.append(line.as_slice())?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn append(&self, chunk: impl IntoChunk) -> Result<Range<usize>, Error> {
        let chunk = self.to_append_unshared(chunk, "appended chunk")?;
        self.check_same_bytes(&chunk)?;
        self.append_chunk(&chunk, &|first, len| self.stable_view().reveal(first, len))
    }
}

impl SharedRegion {
    /// As [`Region::append`]. Sources that other processes may change are taken too, and copied on
    /// first touch.
    ///
    /// # Errors
    ///
    /// As [`Region::append`].
    ///
    /// ```
    /// use pagestitch::{Pool, SharedRegion};
    ///
    /// let log = SharedRegion::builder().capacity(1 << 30).build_shared(&Pool::new()?)?;
    /// let place = log.append(vec![7u8; 5_000])?;
    /// let mut last = [0; 2];
    /// log.read_at(place.end as u64 - 2, &mut last)?;
    /// assert_eq!(last, [7, 7]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn append(&self, chunk: impl IntoChunk) -> Result<Range<usize>, Error> {
        let chunk = self.to_append(chunk)?;
        self.append_chunk(&chunk, &|first, len| self.view().reveal(first, len))
    }
}

impl AnyRegion {
    /// The most bytes that the region can have; its length, if it cannot grow.
    ///
    /// ```
    /// # use pagestitch::{Pool, Region};
    /// let log = Region::builder().chunk("text").capacity(10_000).build(&Pool::new()?)?;
    /// assert_eq!((log.len(), log.capacity()), (4, 10_000));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.served.growth.as_ref().map_or(self.len() as u64, |growth| growth.capacity())
    }

    /// A chunk that joins the region after the build.
    pub(super) fn to_append(&self, chunk: impl IntoChunk) -> Result<Chunk, Error> {
        let chunk = chunk.into_chunk().map_err(|error| error.inside(self.name()))?;
        let Backing::Memory(memory) = chunk.backing() else { return Ok(chunk) };
        let below = served_in(memory.addresses().into_iter().map(|range| (0, range)));
        let Some((_, below)) = below.first() else { return Ok(chunk) };
        let what = format!(
            "region {}: the chunk is memory of region {}, which only a build can take: copy the bytes out with read_at()",
            self.name(),
            below.name
        );
        Err(Error::new(ErrorKind::NestedRegion, what))
    }

    /// As [`to_append`](Self::to_append), for a region that gives out slices. An error calls the chunk by
    /// its `role`.
    pub(super) fn to_append_unshared(&self, chunk: impl IntoChunk, role: &str) -> Result<Chunk, Error> {
        let chunk = self.to_append(chunk)?;
        if !matches!(chunk.backing(), Backing::Shared(_)) {
            return Ok(chunk);
        }
        let what = format!(
            "region {}: other processes may change the {role} ({}): use build_shared(), or seal or copy it",
            self.name(),
            chunk.backing().source().name()
        );
        Err(Error::new(ErrorKind::SharedSource, what))
    }

    /// Refuses a chunk whose pages may come back with other bytes after they have left.
    fn check_same_bytes(&self, chunk: &Chunk) -> Result<(), Error> {
        if self.served.residence.is_none() {
            return Ok(());
        }
        let number = self.served.layout.next_number();
        let (name, source) = (self.name(), chunk.backing().source().name());
        if chunk.may_be_zeros() {
            let what = format!(
                "region {name}: a page of chunk {number} ({source}) may come back as zeros (OnFailure::Zeros): use \
                 build_shared(), or another on_failure(), or leave out budget()"
            );
            let error = Error::new(ErrorKind::OptionConflict, what).of_option(BuildOption::Budget);
            return Err(error.of_chunk(number));
        }
        if !chunk.backing().is_stable() {
            let what = format!(
                "region {name}: chunk {number} ({source}) may have other bytes after its page has left, because hashes are \
                 kept for the chunks of the build alone: use build_shared(), or bytes that cannot change"
            );
            return Err(Error::new(ErrorKind::InvalidChunk, what).of_chunk(number));
        }
        Ok(())
    }

    fn append_chunk(&self, chunk: &Chunk, reveal: Reveal<'_>) -> Result<Range<usize>, Error> {
        let name = self.name();
        if !self.server.is_of_this_process() {
            let what = format!("region {name}: it belongs to the parent process: call append() there");
            return Err(Error::new(ErrorKind::ForkedChild, what));
        }
        let Some(growth) = &self.served.growth else {
            let what = format!("region {name}: it has no room for further chunks: build it with capacity()");
            return Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Capacity));
        };
        let place = serve::append(&self.served, growth, self.server.as_ref(), chunk, reveal)?;
        Ok(place.start as usize..place.end as usize)
    }
}
