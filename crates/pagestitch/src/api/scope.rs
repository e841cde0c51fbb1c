//! Regions over borrowed memory: the borrow ends with a scope.

use crate::api::{AdoptedRegion, Builder, Region, SharedRegion};
use crate::error::Error;
use crate::serve::Server;
use crate::source::Memory;
use crate::space::{AdoptedMemory, Chunk};
use pagestitch_kernel::revocable::{self, RevocableScope};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, RangeBounds};

/// Runs `body` with a scope in which regions may have chunks of borrowed memory.
///
/// A worker may read a borrowed chunk at any moment, and a region can be leaked. The borrow must
/// therefore end in a place that cannot be skipped: the return of this function. It waits for reads
/// in progress, and no borrowed byte is read after it. A leaked region fails its later faults.
///
/// ```
/// use pagestitch::{Pool, scope};
///
/// let pool = Pool::new()?;
/// let (head, tail) = (vec![1u8; 5_000], [2u8; 100]);
/// let sum: u32 = scope(|scope| {
///     let region = scope.region().borrow(&head).borrow(&tail).build(&pool)?;
///     Ok::<_, pagestitch::Error>(region.as_slice().iter().map(|&byte| u32::from(byte)).sum())
/// })?;
/// assert_eq!(sum, 5_200);
/// # Ok::<(), pagestitch::Error>(())
/// ```
///
/// A region cannot leave the scope whose memory it shows:
///
/// ```compile_fail
/// # let pool = pagestitch::Pool::new().unwrap();
/// let data = vec![1u8; 5_000];
/// let escaped = pagestitch::scope(|scope| scope.region().borrow(&data).build(&pool).unwrap());
/// ```
///
/// nor can it borrow what does not live long enough:
///
/// ```compile_fail
/// # let pool = pagestitch::Pool::new().unwrap();
/// pagestitch::scope(|scope| {
///     let data = vec![1u8; 5_000];
///     let region = scope.region().borrow(&data).build(&pool).unwrap();
/// });
/// ```
pub fn scope<'env, R>(body: impl for<'scope> FnOnce(Scope<'scope, 'env>) -> R) -> R {
    revocable::scope(|lend| body(Scope { lend }))
}

/// A scope in which regions can borrow memory. [`scope`] creates it.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'scope, 'env: 'scope> {
    lend: &'scope RevocableScope<'scope, 'env>,
}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// Starts to describe a region that cannot leave the scope.
    ///
    /// ```
    /// # use pagestitch::{Pool, scope};
    /// # let pool = Pool::new()?;
    /// let bytes = vec![7u8; 5_000];
    /// let first = scope(|scope| Ok::<_, pagestitch::Error>(scope.region().borrow(&bytes).build(&pool)?.as_slice()[0]))?;
    /// assert_eq!(first, 7);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn region(self) -> ScopedBuilder<'scope, 'env> {
        Builder::in_scope(self)
    }
}

/// A [`Builder`] that also accepts borrowed chunks. Its region cannot leave the scope.
pub type ScopedBuilder<'scope, 'env> = Builder<Scope<'scope, 'env>>;

/// In a [`scope`].
impl<'scope> Builder<Scope<'scope, '_>> {
    /// Appends borrowed bytes as a chunk.
    ///
    /// ```
    /// # use pagestitch::{Pool, scope};
    /// # let pool = Pool::new()?;
    /// let (head, tail) = (vec![1u8; 5_000], [2u8; 100]);
    /// scope(|scope| {
    ///     let region = scope.region().borrow(&head).borrow(&tail).build(&pool)?;
    ///     assert_eq!(region.as_slice()[4_999..5_001], [1, 2]);
    ///     Ok::<_, pagestitch::Error>(())
    /// })?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn borrow(self, bytes: &'scope [u8]) -> Self {
        let lent = Memory::lent(self.scope.lend.lend(bytes));
        self.chunk(lent)
    }

    /// Appends a byte range of borrowed bytes as a chunk, as [`Chunk::range`] does.
    ///
    /// ```
    /// # use pagestitch::{Pool, scope};
    /// # let pool = Pool::new()?;
    /// let bytes: Vec<u8> = (0..100).collect();
    /// scope(|scope| {
    ///     let region = scope.region().borrow_range(&bytes, 90..).borrow_range(&bytes, ..10).build(&pool)?;
    ///     assert_eq!(region.as_slice()[9..11], [99, 0]);
    ///     Ok::<_, pagestitch::Error>(())
    /// })?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn borrow_range(self, bytes: &'scope [u8], range: impl RangeBounds<u64>) -> Self {
        let lent = Memory::lent(self.scope.lend.lend(bytes));
        self.chunk(Chunk::from(lent).range(range))
    }

    /// As [`Builder::build`], for a region that cannot leave the scope.
    ///
    /// ```
    /// # use pagestitch::{Pool, Readahead, scope};
    /// # let pool = Pool::new()?;
    /// let (head, tail) = (vec![1u8; 5_000], vec![2u8; 5_000]);
    /// scope(|scope| {
    ///     let builder = scope.region().name("borrowed").readahead(Readahead::None).page_aligned();
    ///     let region = builder.borrow(&head).chunk("owned").borrow(&tail).build(&pool)?;
    ///     assert_eq!(region.chunk_slice(1), Some(&b"owned"[..]));
    ///     assert_eq!(region.chunk_slice(2), Some(&tail[..]));
    ///     Ok::<_, pagestitch::Error>(())
    /// })?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Builder::build`].
    pub fn build(self, server: impl Into<Server>) -> Result<ScopedRegion<'scope>, Error> {
        Ok(ScopedRegion::new(self.unscoped().build(server)?))
    }

    /// As [`Builder::build_shared`], for a region that cannot leave the scope.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, scope};
    /// # let pool = Pool::new()?;
    /// let (header, mut start) = (vec![7u8; 4096], [0; 4]);
    /// let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// scope(|scope| {
    ///     let region = scope.region().borrow(&header).chunk(file).build_shared(&pool)?;
    ///     region.read_at(4096, &mut start)
    /// })?;
    /// assert_eq!(&start, b"\x7fELF");
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Builder::build_shared`].
    pub fn build_shared(
        self,
        server: impl Into<Server>,
    ) -> Result<ScopedRegion<'scope, SharedRegion>, Error> {
        Ok(ScopedRegion::new(self.unscoped().build_shared(server)?))
    }

    /// As [`Builder::build_adopted`], for a region that cannot leave the scope.
    ///
    /// ```no_run
    /// # use pagestitch::{AdoptedMemory, Pool, scope};
    /// # fn receive() -> (std::os::fd::OwnedFd, usize) { unimplemented!() }
    /// # let pool = Pool::new()?;
    /// let image = std::fs::read("guest.mem")?;
    /// let (uffd, address) = receive();                     // SCM_RIGHTS, see unix(7)
    /// let memory = AdoptedMemory::new(uffd)?.range(address, image.len());
    /// scope(|scope| scope.region().borrow(&image).build_adopted(memory, &pool)?.into_inner().finish())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Builder::build_adopted`].
    pub fn build_adopted(
        self,
        memory: AdoptedMemory,
        server: impl Into<Server>,
    ) -> Result<ScopedRegion<'scope, AdoptedRegion>, Error> {
        Ok(ScopedRegion::new(self.unscoped().build_adopted(memory, server)?))
    }
}

/// A region that cannot leave its scope: a [`Region`], or one of another kind.
#[derive(Debug)]
pub struct ScopedRegion<'scope, R = Region> {
    region: R,
    scope: PhantomData<&'scope ()>,
}

impl<R> ScopedRegion<'_, R> {
    const fn new(region: R) -> Self {
        Self { region, scope: PhantomData }
    }

    /// The region itself, for a method that consumes it. If it outlives the scope, its borrowed
    /// pages that are absent then fail: SIGBUS, never other bytes.
    ///
    /// ```
    /// # use pagestitch::{Pool, scope};
    /// # let pool = Pool::new()?;
    /// let bytes = vec![7u8; 10_000];
    /// let metrics = scope(|scope| {
    ///     let region = scope.region().borrow(&bytes).build(&pool)?;
    ///     assert_eq!(region[5_000], 7);
    ///     Ok::<_, pagestitch::Error>(region.into_inner().close())
    /// })?;
    /// assert_eq!(metrics.pages_installed(), 1);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn into_inner(self) -> R {
        self.region
    }
}

impl AsRef<[u8]> for ScopedRegion<'_> {
    fn as_ref(&self) -> &[u8] {
        self.region.as_slice()
    }
}

impl<R> Deref for ScopedRegion<'_, R> {
    type Target = R;

    fn deref(&self) -> &R {
        &self.region
    }
}

/// Swapping the region out of its scope through this is sound: its borrowed chunks fail once the
/// scope has ended.
impl<R> DerefMut for ScopedRegion<'_, R> {
    fn deref_mut(&mut self) -> &mut R {
        &mut self.region
    }
}
