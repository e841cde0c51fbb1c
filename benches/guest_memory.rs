//! Accesses to present pages of guest memory: a guest region beside a plain mapping of vm-memory, in turns.
//!
//! Prints the time of an access in each, the median of many short rounds, and how they relate. Both have the
//! same bytes at the same guest addresses.

use pagestitch::{Builder, Pool, Region};
use pagestitch_vm_memory::GuestRegion;
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionCollection};

/// Two regions with a hole between them, as a guest with more than 3 GiB of memory has.
const STARTS: [u64; 2] = [0, 1 << 32];

/// The size of the measurement.
#[derive(Clone, Copy)]
struct Size {
    bytes: usize,
    accesses: usize,
    rounds: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let size = match std::env::args().any(|argument| argument == "--quick") {
        true => Size { bytes: 4 << 20, accesses: 1_000, rounds: 3 },
        false => Size { bytes: 128 << 20, accesses: 20_000, rounds: 300 },
    };
    let pool = Pool::new()?;
    let ranges = STARTS.map(|start| (GuestAddress(start), size.bytes));
    let plain = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
    let marking = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?;
    for (start, bytes) in ranges {
        plain.write_slice(&vec![7; bytes], start)?;
        marking.write_slice(&vec![7; bytes], start)?;
    }
    // The pages of the plain mappings are small ones, or huge ones, as the machine is set up.
    let region = |options: fn(Builder) -> Builder| {
        let region = options(Region::builder().chunk(vec![7; size.bytes]).writable()).build_shared(&pool)?;
        region.populate(..)?;
        Ok::<_, pagestitch::Error>(region)
    };
    let guest = |options: fn(Builder) -> Builder| {
        let regions = STARTS.map(|start| Ok(GuestRegion::new(region(options)?, GuestAddress(start))?));
        let regions = regions.into_iter().collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        Ok::<_, Box<dyn Error>>(GuestRegionCollection::from_regions(regions)?)
    };
    println!("{:<30} {:>10} {:>10} {:>8} {:>8}", "access", "ours", "plain", "median", "minimum");
    compare("guest region", &guest(|builder| builder)?, &plain, size);
    // Without misses of the cache, the time is that of the code.
    let few = Size { bytes: 4 << 12, ..size };
    compare("four pages of each region", &guest(|builder| builder)?, &plain, few);
    compare("on a memfd", &guest(Builder::on_memfd)?, &plain, size);
    match region(|builder| builder.track_changes()) {
        Err(error) => println!("no dirty pages: {error}"),
        Ok(low) => {
            let regions = vec![
                GuestRegion::tracked(low, GuestAddress(STARTS[0]))?,
                GuestRegion::tracked(region(|builder| builder.track_changes())?, GuestAddress(STARTS[1]))?,
            ];
            compare(
                "dirty pages, AtomicBitmap",
                &GuestRegionCollection::from_regions(regions)?,
                &marking,
                size,
            );
        }
    }
    Ok(())
}

/// Measures each access in both memories, in turns.
fn compare<A: GuestMemory, B: GuestMemory>(name: &str, ours: &A, plain: &B, size: Size) {
    println!("{name}");
    let addresses = addresses(size);
    let accesses: [(&str, Access<A>, Access<B>); 5] = [
        ("read_obj of 8 bytes", read_obj, read_obj),
        ("write_obj of 8 bytes", write_obj, write_obj),
        ("read_slice of 64 bytes", read_slice::<A, 64>, read_slice::<B, 64>),
        ("read_slice of 2 KiB", read_slice::<A, 2048>, read_slice::<B, 2048>),
        ("write_slice of 2 KiB", write_slice::<A, 2048>, write_slice::<B, 2048>),
    ];
    for (access, of_ours, of_plain) in accesses {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for round in 0..size.rounds {
            // Each begins every other round, because the second one finds warm caches.
            if round % 2 == 0 {
                first.push(time(|| of_ours(ours, &addresses)));
                second.push(time(|| of_plain(plain, &addresses)));
            } else {
                second.push(time(|| of_plain(plain, &addresses)));
                first.push(time(|| of_ours(ours, &addresses)));
            }
        }
        first.sort_by(f64::total_cmp);
        second.sort_by(f64::total_cmp);
        let (middle, each) = (size.rounds / 2, size.accesses as f64);
        println!(
            "  {access:<28} {:>7.1} ns {:>7.1} ns {:>8.3} {:>8.3}",
            first[middle] / each,
            second[middle] / each,
            first[middle] / second[middle],
            first[0] / second[0]
        );
    }
}

type Access<M> = fn(&M, &[GuestAddress]);

fn read_obj<M: GuestMemory>(memory: &M, addresses: &[GuestAddress]) {
    for address in addresses {
        black_box(memory.read_obj::<u64>(*address).ok());
    }
}

fn write_obj<M: GuestMemory>(memory: &M, addresses: &[GuestAddress]) {
    for address in addresses {
        black_box(memory.write_obj(black_box(7u64), *address).ok());
    }
}

fn read_slice<M: GuestMemory, const BYTES: usize>(memory: &M, addresses: &[GuestAddress]) {
    let mut into = [0; BYTES];
    for address in addresses {
        black_box(memory.read_slice(black_box(&mut into), *address).ok());
    }
}

fn write_slice<M: GuestMemory, const BYTES: usize>(memory: &M, addresses: &[GuestAddress]) {
    for address in addresses {
        black_box(memory.write_slice(black_box(&[7; BYTES]), *address).ok());
    }
}

/// Random aligned addresses in random pages of both regions.
fn addresses(size: Size) -> Vec<GuestAddress> {
    let mut random = fastrand::Rng::with_seed(1);
    let page =
        |random: &mut fastrand::Rng| random.usize(..size.bytes / 4096) * 4096 + random.usize(..256) * 8;
    let address = |_| GuestAddress(STARTS[random.usize(..2)] + page(&mut random) as u64);
    (0..size.accesses).map(address).collect()
}

fn time(run: impl FnOnce()) -> f64 {
    let began = Instant::now();
    run();
    began.elapsed().as_nanos() as f64
}
