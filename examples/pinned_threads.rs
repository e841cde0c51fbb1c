//! Threads that are pinned to CPUs, as those of a virtual machine or of a database with a thread for
//! each core: each works in a shard of its own, on the CPU of that shard's worker.
//! `cargo run --release --example pinned_threads`.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use pagestitch::{Placement, Pool, Readahead, Region};
use std::error::Error;
use std::thread;
use std::time::Instant;

const PAGE: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // One worker for each CPU, and one shard for each worker.
    let pool = Pool::builder().placement(Placement::PerCpu).start()?;
    let bytes = vec![7u8; pool.workers() * (8 << 20)];
    let builder = Region::builder().chunk(bytes).readahead(Readahead::None).shards(pool.workers());
    let region = builder.build(&pool)?;

    thread::scope(|scope| {
        for shard in region.shards() {
            let part = &region.as_slice()[shard.range.start as usize..shard.range.end as usize];
            scope.spawn(move || {
                if let Some(cpu) = shard.cpu {
                    pin_to(cpu);
                }
                let started = Instant::now();
                let sum: u64 = part.iter().step_by(PAGE).map(|&byte| u64::from(byte)).sum();
                let each = started.elapsed() / (part.len() / PAGE) as u32;
                println!("bytes {:?} on CPU {:?}: {each:?} a page, sum {sum}", shard.range, shard.cpu);
            });
        }
    });
    Ok(())
}

/// Pins this thread. Without it, the thread is served all the same, from another CPU.
fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).is_err() {
        println!("not pinned to CPU {cpu}");
    }
}
