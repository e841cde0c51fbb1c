//! Pages shown in place against a plain `mmap` of the same memfd; many small chunks against as many bare `mmap` calls.

use crate::{Environment, median, timed};
use pagestitch::source::Memfd;
use pagestitch::{Access, Chunk, Pool, Region, Support};
use pagestitch_kernel::memfd::{SealedMemfd, UnsealedMemfd};
use pagestitch_kernel::{Page, PageSize, Reservation};
use std::fmt;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;

/// What was measured: nanoseconds a page.
#[derive(Debug)]
pub struct Report {
    environment: Environment,
    bytes: usize,
    region: Figures,
    mmap: Figures,
    /// How many chunks of a page were mapped, and what each took to build.
    chunks: usize,
    build: (Vec<f64>, Vec<f64>),
}

#[derive(Debug, Default)]
struct Figures {
    first: Vec<f64>,
    steady: Vec<f64>,
}

/// Reads a memfd of `bytes` through a region and through a mapping, in turn, as many `rounds`.
///
/// # Panics
///
/// Where this process has no userfaultfd.
#[must_use]
pub fn run(bytes: usize, rounds: usize) -> Report {
    let unsealed = UnsealedMemfd::create("bench", bytes as u64).expect("a memfd");
    for offset in (0..bytes).step_by(1 << 20) {
        std::os::unix::fs::FileExt::write_all_at(unsealed.file(), &[7; 1 << 20], offset as u64)
            .expect("memory");
    }
    let sealed = unsealed.seal().expect("a sealed memfd");
    let again =
        || SealedMemfd::try_from(sealed.as_fd().try_clone_to_owned().expect("a descriptor")).expect("sealed");
    let pool = Pool::new().expect("a pool");
    let (mut region, mut mmap) = (Figures::default(), Figures::default());
    // As many as a process may have by default, but for what the program itself needs.
    let chunks = CHUNKS_MAX.min(bytes / PageSize::system().bytes());
    let memfd = Memfd::from(again());
    let mut build = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let shown = Region::builder().chunk(Memfd::from(again())).require_zero_copy().build(&pool);
        region.measure(shown.expect("a region").as_slice());
        mmap.measure(again().as_ref());
    }
    // Apart from the others: the kernel is busy freeing so many mappings for a while after they have gone.
    for _ in 0..rounds {
        build.0.push(map_chunks(&memfd, chunks, &pool));
        build.1.push(map_bare(&sealed, chunks));
    }
    Report { environment: Environment::current(), bytes, region, mmap, chunks, build }
}

/// Pages of a memfd, of which no two follow each other.
fn shuffled(pages: usize) -> impl Iterator<Item = usize> {
    // Prime, and above what there are.
    (0..pages).map(move |place| place * 65_537 % pages)
}

/// Nanoseconds a chunk to build a region of them, and to drop it.
fn map_chunks(memfd: &Memfd, pages: usize, pool: &Pool) -> f64 {
    let size = PageSize::system().bytes() as u64;
    let chunk = |page| Chunk::from(memfd.clone()).range(page as u64 * size..(page as u64 + 1) * size);
    let (ns, ()) = timed(|| {
        let builder = Region::builder().chunks(shuffled(pages).map(chunk)).mappings(pages);
        drop(builder.require_zero_copy().build(pool).expect("a region"));
    });
    ns as f64 / pages as f64
}

/// Nanoseconds a page for as many bare `mmap` calls over a reserved range, and to unmap it.
fn map_bare(memfd: &SealedMemfd, pages: usize) -> f64 {
    let size = Support::current().page_size();
    let (ns, ()) = timed(|| {
        let count = NonZeroUsize::new(pages).expect("some pages");
        let (_reservation, mut view) = Reservation::new(count, size, Access::ReadOnly).expect("addresses");
        for (place, page) in shuffled(pages).enumerate() {
            view.map(Page(place).span(), memfd, (page * size.bytes()) as u64).expect("a mapping");
        }
    });
    ns as f64 / pages as f64
}

impl Figures {
    fn measure(&mut self, bytes: &[u8]) {
        let pages = bytes.len() as f64 / 4096.0;
        let touch = || bytes.iter().step_by(4096).map(|&byte| u64::from(byte)).sum::<u64>();
        let read = || {
            bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).fold(0, u64::wrapping_add)
        };
        self.first.push(timed(|| black_box(touch())).0 as f64 / pages);
        self.steady.push(timed(|| black_box(read())).0 as f64 / pages);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.region.first.len();
        writeln!(
            f,
            "a memfd of {} MiB in place, in ns a page: medians of {rounds} rounds, interleaved",
            self.bytes >> 20
        )?;
        writeln!(f, "{}", self.environment)?;
        writeln!(f, "  {:12} {:>8} {:>8} {:>8}", "", "region", "mmap", "ratio")?;
        let rows = [
            ("first touch", &self.region.first, &self.mmap.first),
            ("steady read", &self.region.steady, &self.mmap.steady),
        ];
        rows.iter().try_for_each(|(what, region, mmap)| {
            let (region, mmap) = (median(region.to_vec()), median(mmap.to_vec()));
            writeln!(f, "  {what:12} {region:>8.1} {mmap:>8.1} {:>8.2}", region / mmap)
        })?;
        let (region, mmap) = (median(self.build.0.clone()), median(self.build.1.clone()));
        let chunks = self.chunks;
        writeln!(
            f,
            "  {:12} {region:>8.1} {mmap:>8.1} {:>8.2}  {chunks} chunks of a page",
            "build",
            region / mmap
        )
    }
}

const CHUNKS_MAX: usize = 65_000;
