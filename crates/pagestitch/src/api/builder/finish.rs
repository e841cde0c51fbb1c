//! The end of a description: its last checks, and the three kinds of regions that are built of it.

use super::Builder;
use crate::api::build::{TargetKind, build};
use crate::api::options::Options;
use crate::api::{AdoptedRegion, Region, SharedRegion};
use crate::error::{BuildOption, Error, ErrorKind};
use crate::serve::Server;
use crate::space::{AdoptedMemory, Layout};
use pagestitch_kernel::PageSize;

impl Builder {
    /// Reserves the addresses and starts to serve their faults: by a pool (`&pool`),
    /// [inline](crate::Inline), or by the [caller's own loop](crate::Manual). Reads no source.
    ///
    /// # Errors
    ///
    /// Each error names the thing and the remedy:
    ///
    /// * [`InvalidChunk`](ErrorKind::InvalidChunk), [`TooLarge`](ErrorKind::TooLarge): the first
    ///   invalid chunk; [`NoChunks`](ErrorKind::NoChunks);
    /// * [`SharedSource`](ErrorKind::SharedSource): a chunk whose bytes other processes may change;
    /// * [`OptionConflict`](ErrorKind::OptionConflict): options that exclude each other;
    /// * [`UnsuitableServer`](ErrorKind::UnsuitableServer): the server cannot serve a chunk or an
    ///   option; [`NestedRegion`](ErrorKind::NestedRegion);
    /// * [`NoUserfaultfd`](ErrorKind::NoUserfaultfd), [`LimitReached`](ErrorKind::LimitReached),
    ///   [`OutOfMemory`](ErrorKind::OutOfMemory): the kernel or a limit of the process;
    /// * [`InvalidRecording`](ErrorKind::InvalidRecording): the recording is of another region;
    /// * [`ForkedChild`](ErrorKind::ForkedChild): the server was created before `fork(2)`.
    ///
    /// ```
    /// # use pagestitch::{Inline, Manual, Pool, Region};
    /// let by_a_pool = Region::builder().chunk(vec![7u8; 5_000]).build(&Pool::new()?)?;
    /// let by_the_touching_thread = Region::builder().chunk(vec![7u8; 5_000]).build(Inline)?;
    /// let by_a_loop = Region::builder().chunk(vec![7u8; 5_000]).build(&Manual::new()?)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn build(self, server: impl Into<Server>) -> Result<Region, Error> {
        if self.options.on_memfd {
            let what = format!(
                "region {}: other processes may change the pages of a memfd: use build_shared(), or leave out on_memfd()",
                self.options.name()
            );
            return Err(Error::new(ErrorKind::OptionConflict, what).of_option(BuildOption::OnMemfd));
        }
        let (mut options, layout) = self.described();
        options.slices = true;
        if let Ok(layout) = &layout {
            check_unshared(options.name(), layout)?;
            if options.budget.is_some() {
                check_same_bytes(options.name(), layout)?;
            }
        }
        let (view, any) = build(options, layout, TargetKind::Own, &server.into())?;
        let view = view.expect("own target has a view").into_stable();
        let view = view.expect("only a shared source makes a view unstable, and the layout has none");
        Ok(Region::new(view, any))
    }

    /// As [`build`](Self::build), for a region with chunks whose bytes other processes may change:
    /// files, unsealed memfds, aliases, physical memory.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build), without [`ErrorKind::SharedSource`]; also
    /// [`ErrorKind::UnusableFile`] if a [`writable`](Self::writable) region maps a file that is
    /// open for reading only.
    ///
    /// ```
    /// # use pagestitch::source::SharedFile;
    /// # use pagestitch::{Access, Pool, Region};
    /// let file = SharedFile::open("/proc/self/exe", Access::ReadOnly)?;
    /// let region = Region::builder().chunk(vec![7u8; 4096]).chunk(file).build_shared(&Pool::new()?)?;
    /// let mut bytes = [0; 4];
    /// region.read_at(4095, &mut bytes)?;
    /// assert_eq!(&bytes, b"\x07\x7fEL");                         // the file's own page, behind a copied one
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn build_shared(self, server: impl Into<Server>) -> Result<SharedRegion, Error> {
        let (options, layout) = self.described();
        let (view, any) = build(options, layout, TargetKind::Own, &server.into())?;
        Ok(SharedRegion::new(view.expect("own target has a view"), any))
    }

    /// As [`build`](Self::build), for memory that its owner has registered: another process, or
    /// another part of this program. The chunks must hold exactly as many bytes as the ranges of
    /// `memory`. All chunks are copied, whatever their source.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build); [`ErrorKind::InvalidOption`] for ranges that are not whole pages,
    /// overlap, or differ from the chunks in length; [`ErrorKind::UnsuitableServer`] for a server
    /// that is [`Inline`](crate::Inline).
    ///
    /// ```no_run
    /// use pagestitch::source::FileSource;
    /// use pagestitch::{AdoptedMemory, Pool, Region};
    /// # fn receive() -> (std::os::fd::OwnedFd, usize) { unimplemented!() }
    ///
    /// let (uffd, address) = receive();                            // SCM_RIGHTS, see unix(7)
    /// let memory = AdoptedMemory::new(uffd)?.range(address, 1 << 30);
    /// let region = Region::builder().chunk(FileSource::open("guest.mem")?).build_adopted(memory, &Pool::new()?)?;
    /// # Ok::<(), pagestitch::Error>(())
    /// ```
    pub fn build_adopted(
        self,
        memory: AdoptedMemory,
        server: impl Into<Server>,
    ) -> Result<AdoptedRegion, Error> {
        let (options, layout) = self.described();
        let (_, any) = build(options, layout, TargetKind::Adopted(memory), &server.into())?;
        Ok(AdoptedRegion::new(any))
    }

    /// The options, with the alignment of the chunks that are appended later, and the finished layout.
    fn described(self) -> (Options, Result<Layout, Error>) {
        let Self { scope: _, mut options, aligned, align, layout } = self;
        options.align = if aligned { align.max(PageSize::system().bytes() as u64) } else { align };
        let grows = options.capacity.is_some();
        (options, layout.and_then(|layout| layout.finish(grows)))
    }
}

/// Refuses chunks whose bytes other processes may change.
fn check_unshared(region: &str, layout: &Layout) -> Result<(), Error> {
    let Some((chunk, source)) = layout.first_shared() else { return Ok(()) };
    let what = format!(
        "region {region}: other processes may change chunk {chunk} ({source}): use build_shared(), or seal or copy it"
    );
    Err(Error::new(ErrorKind::SharedSource, what).of_chunk(chunk))
}

/// Refuses chunks whose pages may come back as zeros.
fn check_same_bytes(region: &str, layout: &Layout) -> Result<(), Error> {
    let Some(chunk) = layout.first_zeroed() else { return Ok(()) };
    let what = format!(
        "region {region}: a page of chunk {chunk} may come back as zeros (OnFailure::Zeros): use build_shared(), or another \
         on_failure(), or leave out budget()"
    );
    Err(Error::new(ErrorKind::OptionConflict, what).of_chunk(chunk).of_option(BuildOption::Budget))
}
