//! A slow source that fails at times, and that several regions share: at most four requests run at
//! once, a failed request is repeated, and each block is read once.
//! `cargo run --example shared_source`.

use pagestitch::source::{Cached, Limited, Retrying};
use pagestitch::{Chunk, Region, Retry, Source, best_server};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const SIZE: u64 = 4 << 20;

/// An image in a remote store, which drops one request of ten.
#[derive(Default)]
struct Remote {
    requests: AtomicU64,
}

impl Source for Remote {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        thread::sleep(Duration::from_millis(1));
        if self.requests.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        into.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = (at % 251) as u8);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("remote image")
    }

    /// A request of 64 KiB takes as long as one of a page.
    fn granularity(&self) -> u64 {
        64 << 10
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let remote = Arc::new(Remote::default());
    let retry = Retry::times(5).pause(Duration::from_millis(1), Duration::from_millis(20));
    let reliable = Retrying::new(Limited::new(Arc::clone(&remote), 4), retry);
    let image = Arc::new(Cached::new(reliable, 8 << 20));

    let server = best_server()?;
    let build = |_| Region::builder().chunk(Chunk::source(Arc::clone(&image))).build(&server);
    let regions = (0..8).map(build).collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        for region in &regions {
            scope.spawn(|| {
                assert!(region.as_slice().iter().zip(0u64..).all(|(is, at)| *is == (at % 251) as u8))
            });
        }
    });
    println!("8 regions of {} blocks: {} requests", SIZE >> 16, remote.requests.load(Ordering::Relaxed));
    Ok(())
}
