//! The best server of this process: a pool, or `Eager` where userfaultfd is missing.

use crate::error::{Error, ErrorKind};
use crate::serve::{Eager, Pool, PoolBuilder, Server};
use pagestitch_kernel::{Features, Uffd};
use std::fmt;
use std::sync::Arc;

/// A [`Pool`], or [`Eager`] where this process may not use userfaultfd. [`best_server`] and
/// [`PoolBuilder::start_or_eager`] choose it; `Display` tells which it is, and why.
#[derive(Debug, Clone)]
pub struct BestServer(Choice);

#[derive(Debug, Clone)]
enum Choice {
    Pool(Pool),
    /// The reason why there is no userfaultfd.
    Eager(Arc<Error>),
}

/// Starts a [`Pool`] with the default options, or takes [`Eager`] where this process may not use
/// userfaultfd: the same program then runs under Docker's default seccomp profile, in gVisor, and on
/// a kernel without userfaultfd.
///
/// ```
/// use pagestitch::{Region, best_server};
///
/// let server = best_server()?;
/// println!("{server}");
/// let region = Region::builder().chunk(vec![7u8; 100_000]).build(&server)?;
/// assert_eq!(region.as_slice()[50_000], 7);
/// # Ok::<(), pagestitch::Error>(())
/// ```
///
/// # Errors
///
/// As [`PoolBuilder::start`]; [`ErrorKind::LimitReached`] and [`ErrorKind::OutOfMemory`] if the kernel
/// refuses a userfaultfd for now.
pub fn best_server() -> Result<BestServer, Error> {
    Pool::builder().start_or_eager()
}

impl PoolBuilder {
    /// As [`best_server`], with the options of this pool.
    ///
    /// ```
    /// use pagestitch::{Pool, Region};
    ///
    /// let server = Pool::builder().workers(2).name("restore").start_or_eager()?;
    /// let region = Region::builder().chunk(vec![7u8; 9]).build(&server)?;
    /// assert_eq!(region.as_slice(), [7; 9]);
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`best_server`].
    pub fn start_or_eager(self) -> Result<BestServer, Error> {
        let refusal = match Uffd::open(Features::NONE) {
            Ok(_) => return Ok(BestServer(Choice::Pool(self.start()?))),
            Err(refusal) => Error::no_userfaultfd(&refusal),
        };
        if refusal.kind() != ErrorKind::NoUserfaultfd {
            return Err(refusal);
        }
        let server = BestServer(Choice::Eager(Arc::new(refusal)));
        log!(info, server = %server, "server chosen");
        Ok(server)
    }
}

impl BestServer {
    /// The pool; `None` if regions are filled when they are built.
    ///
    /// ```
    /// let server = pagestitch::best_server()?;
    /// match server.pool() {
    ///     Some(pool) => println!("{} workers", pool.workers()),
    ///     None => println!("no pool: {}", server.refusal().expect("the reason")),
    /// }
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    #[must_use]
    pub const fn pool(&self) -> Option<&Pool> {
        match &self.0 {
            Choice::Pool(pool) => Some(pool),
            Choice::Eager(_) => None,
        }
    }

    /// The reason why there is no pool: an [`ErrorKind::NoUserfaultfd`] that names the remedy. `None`
    /// if there is a pool.
    #[must_use]
    pub fn refusal(&self) -> Option<&Error> {
        match &self.0 {
            Choice::Pool(_) => None,
            Choice::Eager(refusal) => Some(refusal),
        }
    }
}

impl fmt::Display for BestServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Choice::Pool(_) => f.write_str("a pool fills the pages of regions on first touch"),
            Choice::Eager(refusal) => {
                write!(f, "the server Eager fills regions when they are built, because there is {refusal}")
            }
        }
    }
}

impl From<&BestServer> for Server {
    fn from(server: &BestServer) -> Self {
        match &server.0 {
            Choice::Pool(pool) => pool.into(),
            Choice::Eager(_) => Eager.into(),
        }
    }
}
