//! A region in threads that the program has anyway. Each thread serves faults between its own jobs.
//! `cargo run --example embed_thread_pool`.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pagestitch::{Manual, Region};
use std::error::Error;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

fn main() -> Result<(), Box<dyn Error>> {
    let manuals = Manual::group(2)?;
    let region = Region::builder().name("shared").chunk(vec![7_u8; 8 << 20]).build(&manuals[0])?;

    let (jobs, queue) = channel::<Job>();
    let (queue, stop) = (Arc::new(Mutex::new(queue)), Arc::new(AtomicBool::new(false)));
    let workers: Vec<_> = manuals
        .into_iter()
        .map(|manual| {
            let (queue, stop) = (Arc::clone(&queue), Arc::clone(&stop));
            thread::spawn(move || work(manual, &queue, &stop))
        })
        .collect();

    // Jobs of the program. A job must not touch the region, because its own thread may have to
    // serve the fault.
    let (done, finished) = channel();
    for number in 0..100 {
        let done = done.clone();
        jobs.send(Box::new(move || done.send(number).expect("the main thread waits")))?;
    }
    // This thread serves no faults, so it may read the region.
    let sum: u64 = region.as_slice().iter().map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, 7 * (8 << 20));
    assert_eq!(finished.iter().take(100).sum::<u32>(), 99 * 100 / 2);
    drop(region); // before its servers
    stop.store(true, Ordering::Relaxed);
    let faults: usize = workers.into_iter().map(|worker| worker.join().expect("a worker")).sum();
    println!("100 jobs done and {faults} faults served by two threads of the program's own");
    Ok(())
}

/// Serves faults first, because threads wait for them; then runs a job. Without both, it waits a
/// little for faults.
fn work(mut manual: Manual, queue: &Mutex<Receiver<Job>>, stop: &AtomicBool) -> usize {
    let mut faults = 0;
    while !stop.load(Ordering::Relaxed) {
        faults += manual.serve_ready(64);
        let job = queue.lock().expect("no worker panics").try_recv();
        match job {
            Ok(job) => job(),
            Err(_) => {
                let mut ready = [PollFd::new(manual.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut ready, PollTimeout::from(1_u8));
            }
        }
    }
    faults
}
