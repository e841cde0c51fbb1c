//! A chunk: a byte range of one source, as a part of a region.

use crate::error::{Error, ErrorKind};
use crate::policy::OnFailure;
use crate::source::{
    Alias, Backing, Donated, Fetch, Fetched, FileSource, Hole, ImmutableFile, LazyMemfd, Memfd, Memory,
    Pages, Physical, Shared, SharedFile, Source, StableSource, WritableSource,
};
use bytes::Bytes;
use pagestitch_kernel::PageSize;
use pagestitch_kernel::memfd::SealedMemfd;
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::shared::Sharing;
use std::fs::File;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

/// A byte range of one source. It may start and end at any byte; chunks lie end to end in a region.
///
/// ```
/// use std::sync::Arc;
/// use pagestitch::Chunk;
/// use pagestitch::source::Memory;
///
/// let whole = Chunk::from(vec![1u8; 5_000]);
/// let part = Chunk::from(vec![2u8; 5_000]).range(100..777);
/// let shared: Arc<[u8]> = vec![3u8; 64].into();
/// let twice = [Chunk::from(Arc::clone(&shared)), Chunk::from(shared)];
/// let zeros = Chunk::hole(1 << 30);
/// # let _ = (whole, part, twice, zeros);
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Chunk {
    pub(super) backing: Backing,
    pub(super) range: Range<u64>,
    /// `None`: the user has not chosen.
    pub(super) on_failure: Option<OnFailure>,
    /// The chunk starts at a multiple of so many bytes.
    pub(crate) align: u64,
}

impl Chunk {
    /// All bytes of a source of your own, or of a wrapper. Clone the `Arc` to take several chunks
    /// of it.
    ///
    /// ```
    /// use pagestitch::source::{Cached, FileSource, Limited};
    /// use pagestitch::{Chunk, Pool, Region, Source};
    /// use std::sync::Arc;
    ///
    /// let mut source: Box<dyn Source> = Box::new(FileSource::open("/proc/self/exe")?);
    /// source = Box::new(Limited::new(source, 4));                   // wrappers take boxed sources
    /// let shared: Arc<dyn Source> = Arc::new(Cached::new(source, 1 << 20));
    /// let region = Region::builder()
    ///     .chunk(Chunk::source(Arc::clone(&shared)).range(..1_000)) // unsized sources, too
    ///     .chunk(shared)
    ///     .build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[1..4], region.as_slice()[1_001..1_004]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn source<S: Source + ?Sized + 'static>(source: Arc<S>) -> Self {
        Self::whole(Backing::of_source(source))
    }

    /// All bytes of a source that takes written pages back, in a region that is built
    /// [`write_back`](crate::Builder::write_back). In another region, writes stay in the region. Each byte
    /// belongs to one chunk at most: a chunk sees no write of another one.
    ///
    /// ```
    /// # use pagestitch::{Chunk, ErrorKind, Pool, Region, WriteBack};
    /// # use std::sync::{Arc, Mutex};
    /// let bytes = Arc::new(Mutex::new(vec![7u8; 10_000]));
    /// let builder = Region::builder().chunk(Chunk::writable(Arc::clone(&bytes))).write_back(WriteBack::ToSource);
    /// let region = match builder.build_shared(&Pool::new()?) {
    ///     Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),  // Linux before 6.7
    ///     built => built?,
    /// };
    /// region.write_at(5_000, b"written")?;
    /// region.flush(..)?;
    /// assert_eq!(&bytes.lock().unwrap()[5_000..5_007], b"written");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn writable<S: WritableSource + ?Sized + 'static>(source: Arc<S>) -> Self {
        Self::whole(Backing::of_writable(source))
    }

    /// All bytes of a source that vouches for them: no hash is kept of its pages in a region with a
    /// [budget](crate::Builder::budget).
    ///
    /// ```
    /// use pagestitch::source::StableSource;
    /// use pagestitch::{Budget, Chunk, Pool, Region, Source};
    /// use std::io;
    /// use std::sync::Arc;
    ///
    /// /// The same byte over and over.
    /// struct Pattern(u8, u64);
    /// impl Source for Pattern {
    ///     fn size(&self) -> u64 {
    ///         self.1
    ///     }
    ///     fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
    ///         into.fill(self.0);
    ///         Ok(())
    ///     }
    /// }
    /// // SAFETY: each read gives the same byte.
    /// unsafe impl StableSource for Pattern {}
    ///
    /// let chunk = Chunk::stable(Arc::new(Pattern(7, 1 << 30)));
    /// let region = Region::builder().chunk(chunk).budget(&Budget::bytes(8 << 20)?).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[1 << 29], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn stable<S: StableSource + ?Sized + 'static>(source: Arc<S>) -> Self {
        Self::whole(Backing::of_stable(source))
    }

    /// All bytes of an asynchronous source, or of a wrapper around one. Clone the `Arc` to take
    /// several chunks of it.
    ///
    /// ```
    /// use pagestitch::source::{Fetch, Reply};
    /// use pagestitch::{Chunk, Pool, Region};
    /// use std::sync::Arc;
    /// use std::sync::mpsc::{Sender, channel};
    /// use std::{io, thread};
    ///
    /// /// Requests go to a thread that answers them.
    /// struct Queue(Sender<Reply>);
    /// impl Fetch for Queue {
    ///     fn size(&self) -> u64 {
    ///         1 << 20
    ///     }
    ///     fn fetch(&self, _offset: u64, reply: Reply) {
    ///         if let Err(unsent) = self.0.send(reply) {
    ///             unsent.0.fail(io::ErrorKind::BrokenPipe.into());
    ///         }
    ///     }
    /// }
    /// let (queue, requests) = channel::<Reply>();
    /// thread::spawn(move || {
    ///     for reply in requests {
    ///         let sevens = vec![7; reply.len()];
    ///         reply.answer(&sevens);
    ///     }
    /// });
    /// let region = Region::builder().chunk(Chunk::fetch(Arc::new(Queue(queue)))).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[500_000], 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn fetch<F: Fetch + ?Sized + 'static>(source: Arc<F>) -> Self {
        Self::whole(Backing::Fetched(Fetched::new(source)))
    }

    /// `bytes` zeros.
    ///
    /// ```
    /// # use pagestitch::{Chunk, Pool, Region};
    /// let region = Region::builder().chunk(Chunk::hole(1 << 40)).chunk(vec![7u8; 9]).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[(1 << 40) - 1..][..2], [0, 7]);     // a tebibyte, of which two pages are present
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub const fn hole(bytes: u64) -> Self {
        Self { backing: Backing::Hole(Hole), range: 0..bytes, on_failure: None, align: 1 }
    }

    /// All bytes of a file or memfd, mapped `MAP_PRIVATE`: writes through the region stay in the
    /// region. A page not yet written to still shows later changes of the file.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Chunk, Pool, Region};
    /// let program = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// let region = Region::builder().chunk(Chunk::copy_on_write(program)).writable().build_shared(&Pool::new()?)?;
    /// region.write_at(1, b"elf")?;                                // the file keeps its bytes
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn copy_on_write(file: impl Into<Arc<SharedFile>>) -> Self {
        Self::whole(Backing::Shared(Shared::File(file.into(), Sharing::CopyOnWrite)))
    }

    /// Limits the chunk to a range of bytes, counted from the source's start. A bound that is left
    /// out stays as it is: at first, it is the source's start or end.
    ///
    /// The build of the region fails if the range is empty or reaches past the source's end.
    ///
    /// ```
    /// use pagestitch::{Chunk, Pool, Region};
    ///
    /// let region = Region::builder()
    ///     .chunk(Chunk::from("0123456789").range(7..))
    ///     .chunk(Chunk::from("0123456789").range(..=2))
    ///     .build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice(), b"789012");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn range(mut self, range: impl RangeBounds<u64>) -> Self {
        // A bound past 2^64 - 1 is past the end of each source, too.
        self.range.start = match range.start_bound() {
            Bound::Included(&first) => first,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => self.range.start,
        };
        self.range.end = match range.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.range.end,
        };
        self
    }

    /// Starts the chunk at a multiple of `bytes`: for the numbers in it, for a cache line. Padding
    /// fills the gap before it. A region starts at a page, so the chunk's
    /// address is aligned too. [`Builder::align`](crate::Builder::align) aligns all later chunks.
    ///
    /// The build of the region fails if `bytes` is not a power of two, or exceeds the page size.
    ///
    /// ```
    /// use pagestitch::{Chunk, Pool, Region};
    ///
    /// let numbers = 2.5f64.to_ne_bytes();
    /// let region = Region::builder()
    ///     .chunk("a header of odd length")
    ///     .chunk(Chunk::from(numbers).align(align_of::<f64>() as u64))
    ///     .build(&Pool::new()?)?;
    /// let bytes = region.chunk_slice(1).expect("two chunks");
    /// assert!(bytes.as_ptr().cast::<f64>().is_aligned());
    /// assert_eq!((region.offset_of(1), bytes), (Some(24), &numbers[..]));
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub const fn align(mut self, bytes: u64) -> Self {
        self.align = bytes;
        self
    }

    /// Sets what happens to the chunk's pages when its source fails. Default:
    /// [poisoned](OnFailure::Poison), or the failure of the build with the server
    /// [`Eager`](crate::Eager).
    ///
    /// ```
    /// use pagestitch::{Chunk, OnFailure, Pool, Region, Retry, Source};
    /// # use std::io;
    /// # use std::sync::Arc;
    /// # struct Thumbnails;
    /// # impl Source for Thumbnails {
    /// #     fn size(&self) -> u64 {
    /// #         8192
    /// #     }
    /// #     fn read_at(&self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
    /// #         Err(io::Error::other("gone"))
    /// #     }
    /// # }
    /// # let (thumbnails, index) = (Arc::new(Thumbnails), Arc::new(Thumbnails));
    ///
    /// let optional = Chunk::source(thumbnails).on_failure(OnFailure::Zeros);
    /// let needed = Chunk::source(index).on_failure(OnFailure::Retry(Retry::times(5)));
    /// let region = Region::builder().chunk(optional).chunk(needed).build(&Pool::new()?)?;
    /// assert_eq!(region.as_slice()[0], 0);
    /// assert_eq!(region.close().pages_zeroed_on_failure, 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub const fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = Some(on_failure);
        self
    }

    /// True if the chunk is as long as a huge page, of a source whose pages lie in the page cache.
    /// The kernel may then map huge pages of it, or of it and the chunks that continue it.
    /// The source.
    pub(crate) const fn backing(&self) -> &Backing {
        &self.backing
    }

    /// True for a memfd that is filled later.
    pub(crate) const fn is_filled_later(&self) -> bool {
        matches!(self.backing, Backing::Shared(Shared::Lazy(_)))
    }

    /// Its alignment in a region whose chunks are aligned to `align` bytes.
    pub(crate) fn align_with(&self, align: u64, number: usize) -> Result<u64, Error> {
        let (page, aligns) = (PageSize::system(), [align, self.align]);
        let most = page.bytes() as u64;
        if let Some(align) = aligns.iter().find(|align| !align.is_power_of_two() || **align > most) {
            let what = format!(
                "chunk {number} cannot be aligned to {align} bytes: use a power of two, at most the page size of {most}"
            );
            return Err(Error::new(ErrorKind::InvalidChunk, what).of_chunk(number));
        }
        Ok(align.max(self.align))
    }

    /// The number of its bytes.
    pub(crate) const fn bytes(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// True if the user has chosen the reaction to a failure of the source.
    pub(crate) const fn has_policy(&self) -> bool {
        self.on_failure.is_some()
    }

    /// True if pages that cannot be read become zeros.
    pub(crate) const fn may_be_zeros(&self) -> bool {
        matches!(self.on_failure, Some(OnFailure::Zeros))
    }

    pub(super) fn has_huge_pages(&self) -> bool {
        let len = self.range.end.saturating_sub(self.range.start);
        self.backing.is_in_page_cache() && len >= HUGE as u64
    }

    fn whole(backing: Backing) -> Self {
        let range = 0..backing.source().size();
        Self { backing, range, on_failure: None, align: 1 }
    }
}

impl From<Memory> for Chunk {
    fn from(memory: Memory) -> Self {
        // The size without a dynamic call, because there may be millions of buffers.
        let range = 0..memory.size();
        Self { backing: Backing::Memory(memory), range, on_failure: None, align: 1 }
    }
}

impl From<Memfd> for Chunk {
    fn from(memfd: Memfd) -> Self {
        Self::whole(Backing::Memfd(memfd))
    }
}

/// Clone the file to take several chunks of it.
impl From<ImmutableFile> for Chunk {
    fn from(file: ImmutableFile) -> Self {
        Self::whole(Backing::Immutable(file))
    }
}

/// The pages move into the region: no copy for whole pages that are aligned in both. Locked pages
/// are unlocked by the build, because the kernel does not move locked pages; lock the region
/// instead.
impl From<Pages> for Chunk {
    fn from(pages: Pages) -> Self {
        Donated::from(pages).into()
    }
}

/// The pages move into the region: no copy for whole pages that are aligned in both.
impl From<Donated> for Chunk {
    fn from(donated: Donated) -> Self {
        Arc::new(donated).into()
    }
}

/// Clone the `Arc` to take several chunks, with each byte in one chunk at most. A page whose bytes
/// are not all in one chunk is copied.
impl From<Arc<Donated>> for Chunk {
    fn from(donated: Arc<Donated>) -> Self {
        Self::whole(Backing::Donated(donated))
    }
}

impl From<LazyMemfd> for Chunk {
    fn from(memfd: LazyMemfd) -> Self {
        Self::whole(Backing::Shared(Shared::Lazy(memfd)))
    }
}

/// For a [`SharedRegion`](crate::SharedRegion): writes to the file appear in the region, and the
/// region's writes in the file.
impl From<Arc<SharedFile>> for Chunk {
    fn from(file: Arc<SharedFile>) -> Self {
        Self::whole(Backing::Shared(Shared::File(file, Sharing::Shared)))
    }
}

impl From<SharedFile> for Chunk {
    fn from(file: SharedFile) -> Self {
        Arc::new(file).into()
    }
}

/// For a [`SharedRegion`](crate::SharedRegion).
impl From<Arc<Alias>> for Chunk {
    fn from(alias: Arc<Alias>) -> Self {
        Self::whole(Backing::Shared(Shared::Alias(alias)))
    }
}

impl From<Alias> for Chunk {
    fn from(alias: Alias) -> Self {
        Arc::new(alias).into()
    }
}

/// For a [`SharedRegion`](crate::SharedRegion).
impl From<Arc<Physical>> for Chunk {
    fn from(physical: Arc<Physical>) -> Self {
        Self::whole(Backing::Shared(Shared::Physical(physical)))
    }
}

impl From<Physical> for Chunk {
    fn from(physical: Physical) -> Self {
        Arc::new(physical).into()
    }
}

impl From<SealedMemfd> for Chunk {
    fn from(memfd: SealedMemfd) -> Self {
        Memfd::from(memfd).into()
    }
}

impl From<FileSource> for Chunk {
    fn from(file: FileSource) -> Self {
        Self::source(Arc::new(file))
    }
}

impl From<Arc<FileSource>> for Chunk {
    fn from(file: Arc<FileSource>) -> Self {
        Self::source(file)
    }
}

impl From<Arc<dyn Source>> for Chunk {
    fn from(source: Arc<dyn Source>) -> Self {
        Self::source(source)
    }
}

impl From<Box<dyn Source>> for Chunk {
    fn from(source: Box<dyn Source>) -> Self {
        Self::source(Arc::<dyn Source>::from(source))
    }
}

/// All bytes of a file that is open for reading, as those of a [`FileSource`]. A builder takes the
/// file itself, and its `build` then returns the error, which names the chunk.
///
/// ```
/// use pagestitch::{Chunk, Pool, Region};
/// use std::fs::File;
///
/// let region = Region::builder()
///     .chunk(File::open("/proc/self/exe")?)
///     .chunk(Chunk::try_from(File::open("/proc/self/exe")?)?.range(1..4))
///     .build(&Pool::new()?)?;
/// assert!(region.as_slice().ends_with(b"ELF"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
impl TryFrom<File> for Chunk {
    type Error = Error;

    fn try_from(file: File) -> Result<Self, Error> {
        Ok(FileSource::try_from(file)?.into())
    }
}

/// Converts owners of bytes by way of [`Memory`].
macro_rules! from_memory {
    ($($owner:ty $(, const $N:ident)?;)*) => {$(
        impl $(<const $N: usize>)? From<$owner> for Chunk {
            fn from(bytes: $owner) -> Self {
                Memory::from(bytes).into()
            }
        }
    )*};
}

from_memory! {
    Vec<u8>;
    Box<[u8]>;
    Arc<[u8]>;
    Bytes;
    String;
    &'static str;
    &'static [u8];
    &'static [u8; N], const N;
    [u8; N], const N;
}
