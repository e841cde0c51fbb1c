//! Regions over borrowed memory: the borrow ends with a scope.

use crate::api::{Builder, Region};
use crate::error::Error;
use crate::serve::Server;
use crate::source::Memory;
use crate::space::{Chunk, IntoChunk};
use pagestitch_kernel::revocable::{self, RevocableScope};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

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
        ScopedBuilder { builder: Region::builder(), scope: self }
    }
}

/// A [`Builder`] that also accepts borrowed chunks.
#[derive(Debug)]
#[must_use]
pub struct ScopedBuilder<'scope, 'env: 'scope> {
    builder: Builder,
    scope: Scope<'scope, 'env>,
}

impl<'scope> ScopedBuilder<'scope, '_> {
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

    /// Appends a byte range of borrowed bytes as a chunk.
    ///
    /// ```
    /// # use pagestitch::{Pool, scope};
    /// # let pool = Pool::new()?;
    /// let bytes: Vec<u8> = (0..100).collect();
    /// scope(|scope| {
    ///     let region = scope.region().borrow_range(&bytes, 90..100).borrow_range(&bytes, 0..10).build(&pool)?;
    ///     assert_eq!(region.as_slice()[9..11], [99, 0]);
    ///     Ok::<_, pagestitch::Error>(())
    /// })?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn borrow_range(self, bytes: &'scope [u8], range: Range<u64>) -> Self {
        let lent = Memory::lent(self.scope.lend.lend(bytes));
        self.chunk(Chunk::from(lent).range(range))
    }

    /// As [`Builder::chunk`].
    pub fn chunk(self, chunk: impl IntoChunk) -> Self {
        Self { builder: self.builder.chunk(chunk), ..self }
    }

    /// As [`Builder::name`].
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { builder: self.builder.name(name), ..self }
    }

    /// As [`Builder::writable`].
    pub fn writable(self) -> Self {
        Self { builder: self.builder.writable(), ..self }
    }

    /// As [`Builder::build`].
    ///
    /// # Errors
    ///
    /// As [`Builder::build`].
    pub fn build(self, server: impl Into<Server>) -> Result<ScopedRegion<'scope>, Error> {
        Ok(ScopedRegion { region: self.builder.build(server)?, scope: PhantomData })
    }
}

/// A [`Region`] that cannot leave its scope.
#[derive(Debug)]
pub struct ScopedRegion<'scope> {
    region: Region,
    scope: PhantomData<&'scope ()>,
}

impl AsRef<[u8]> for ScopedRegion<'_> {
    fn as_ref(&self) -> &[u8] {
        self.region.as_slice()
    }
}

impl Deref for ScopedRegion<'_> {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.region
    }
}

/// Swapping the region out of its scope through this is sound: its borrowed chunks fail once the
/// scope has ended.
impl DerefMut for ScopedRegion<'_> {
    fn deref_mut(&mut self) -> &mut Region {
        &mut self.region
    }
}
