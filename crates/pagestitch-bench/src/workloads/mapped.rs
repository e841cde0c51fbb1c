//! Pages mapped in place beside a plain `mmap` of the same memfd; many small chunks beside as many
//! bare `mmap` calls.

use crate::case::{Case, Options, Sample};
use crate::systems::{PAGE, sum, touch_all};
use pagestitch::source::Memfd;
use pagestitch::{Access, Chunk, Pool, Region, Support};
use pagestitch_kernel::memfd::{SealedMemfd, UnsealedMemfd};
use pagestitch_kernel::{Page, View};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::Arc;

pub(super) fn cases(options: &Options) -> Vec<Case> {
    let bytes = options.size(256 << 20);
    let sealed = Arc::new(sealed(bytes));
    let offsets: Arc<Vec<usize>> = Arc::new((0..bytes).step_by(PAGE).collect());
    let pool = Pool::new().expect("a pool");
    let mut cases = Vec::new();
    for point in ["first touch", "steady read"] {
        let mut case = |system: &'static str, show: Box<Show>| {
            let (sealed, offsets) = (Arc::clone(&sealed), Arc::clone(&offsets));
            let run = move |_| {
                let shown = show(&sealed);
                let bytes = (*shown).as_ref();
                let first = Sample::of(offsets.len(), bytes.len(), || touch_all(bytes, &offsets));
                if point == "first touch" {
                    first
                } else {
                    Sample::of(offsets.len(), bytes.len(), || sum(bytes))
                }
            };
            cases.push(Case::new(system, run).at(point).against(&["mmap"]));
        };
        let pool = pool.clone();
        case(
            "region",
            Box::new(move |sealed| {
                let builder = Region::builder().chunk(Memfd::from(again(sealed))).require_zero_copy();
                Box::new(Shown(builder.build(&pool).expect("a region")))
            }),
        );
        case("mmap", Box::new(|sealed| Box::new(again(sealed))));
    }
    cases
}

/// Many small chunks.
pub(super) fn many(options: &Options) -> Vec<Case> {
    let bytes = options.size(256 << 20);
    let sealed = sealed(bytes);
    let pool = Pool::new().expect("a pool");
    // The default limit on mappings, minus those of the program itself.
    let chunks = CHUNKS_MAX.min(bytes / PAGE);
    let memfd = Memfd::from(again(&sealed));
    let region = move |_| {
        let chunk =
            |page: usize| Chunk::from(memfd.clone()).range((page * PAGE) as u64..((page + 1) * PAGE) as u64);
        Sample::of(chunks, chunks * PAGE, || {
            let builder = Region::builder().chunks(shuffled(chunks).map(chunk)).max_mappings(chunks);
            drop(builder.require_zero_copy().build(&pool).expect("a region"));
        })
    };
    let bare = move |_| Sample::of(chunks, chunks * PAGE, || map_bare(&sealed, chunks));
    vec![
        Case::new("region", region).chunks_of(PAGE).against(&["mmap"]),
        Case::new("mmap", bare).chunks_of(PAGE).against(&["mmap"]),
    ]
}

/// Maps a memfd again.
type Show = dyn Fn(&SealedMemfd) -> Box<dyn AsRef<[u8]>>;

struct Shown(Region);

impl AsRef<[u8]> for Shown {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

fn sealed(bytes: usize) -> SealedMemfd {
    let unsealed = UnsealedMemfd::create("bench", bytes as u64).expect("a memfd");
    for offset in (0..bytes).step_by(1 << 20) {
        std::os::unix::fs::FileExt::write_all_at(unsealed.file(), &[7; 1 << 20], offset as u64)
            .expect("memory");
    }
    unsealed.seal().expect("a sealed memfd")
}

/// The same memfd, mapped a second time.
fn again(sealed: &SealedMemfd) -> SealedMemfd {
    let fd = sealed.as_fd().try_clone_to_owned().expect("a descriptor");
    SealedMemfd::try_from(fd).expect("sealed")
}

/// The pages of a memfd in an order in which no page follows its neighbour.
fn shuffled(pages: usize) -> impl Iterator<Item = usize> {
    // The factor is a prime above the number of pages.
    (0..pages).map(move |place| place * 65_537 % pages)
}

/// Makes as many bare `mmap` calls over a reserved range, and unmaps the range at once.
fn map_bare(memfd: &SealedMemfd, pages: usize) {
    let count = NonZeroUsize::new(pages).expect("some pages");
    let size = Support::current().page_size();
    let (_reservation, mut view) = View::reserve(count, size, Access::ReadOnly).expect("addresses");
    for (place, page) in shuffled(pages).enumerate() {
        view.map(Page(place).span(), memfd, (page * PAGE) as u64).expect("a mapping");
    }
}

const CHUNKS_MAX: usize = 65_000;
