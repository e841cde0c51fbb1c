//! Computations without the kernel: locating a byte, claiming a present page, planning.

use divan::{Bencher, black_box};
use pagestitch::{Chunk, Inline, Region};

fn main() {
    if std::env::args().any(|argument| argument == "--quick") {
        divan::Divan::default().sample_count(1).sample_size(1).run_benches();
    } else {
        divan::main();
    }
}

/// A region of so many chunks of 1 to 97 bytes.
fn region(chunks: usize) -> Region {
    let chunk = |i: usize| Chunk::hole((i * 31 % 97 + 1) as u64);
    Region::builder().chunks((0..chunks).map(chunk)).build(Inline).expect("a region")
}

#[divan::bench(args = [1_000, 100_000, 1_000_000])]
fn locate(bencher: Bencher<'_, '_>, chunks: usize) {
    let region = region(chunks);
    let mut random = fastrand::Rng::with_seed(1);
    let offsets: Vec<u64> = (0..4096).map(|_| random.u64(..region.len() as u64)).collect();
    let mut next = offsets.iter().cycle();
    bencher.bench_local(|| region.chunk_at(black_box(*next.next().expect("endless"))));
}

/// A claim of a present page, which asks the kernel if the page is present.
#[divan::bench]
fn claim_a_present_page(bencher: Bencher<'_, '_>) {
    let region = region(1_000);
    region.populate(..).expect("zeros");
    bencher.bench_local(|| region.populate(black_box(4096..8192)));
}

/// The span of each fault, with tracing off.
#[divan::bench]
fn span_that_is_off() {
    let span = tracing::trace_span!("fault", region = black_box("unnamed"), page = black_box(7_usize));
    let _entered = span.enter();
}

#[divan::bench(args = [1_000, 100_000])]
fn plan(bencher: Bencher<'_, '_>, chunks: usize) {
    let region = region(chunks);
    bencher.bench_local(|| black_box(region.plan()));
}
