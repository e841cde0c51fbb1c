//! A region in a tokio runtime: a task serves faults, and an async source fetches many pages at
//! once. `cargo run --example embed_tokio`.

use bytes::Bytes;
use pagestitch::{Manual, Readahead, Region};
use pagestitch_tokio::{AsyncSource, chunk, serve};
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// An object in a store that takes ten milliseconds for each answer.
struct Object {
    bytes: Bytes,
}

impl AsyncSource for Object {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    async fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Ok(self.bytes.slice(offset as usize..offset as usize + len))
    }

    fn name(&self) -> String {
        String::from("store://objects/1")
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let object = Arc::new(Object { bytes: (0..64 * 4096_u32).map(|i| (i / 4096) as u8).collect() });

    let manual = Manual::new()?; // starts no thread
    let region = Region::builder()
        .name("object")
        .chunk(chunk(object, runtime.handle(), 16)) // at most 16 fetches at once
        .readahead(Readahead::None)
        .build(&manual)?;
    println!("{}", region.plan());
    let server = runtime.spawn(serve(manual));

    // The threads of the runtime must not touch the region, but these threads may.
    let started = Instant::now();
    thread::scope(|scope| {
        for page in 0..64 {
            let region = &region;
            scope.spawn(move || assert_eq!(usize::from(region.as_slice()[page * 4096]), page));
        }
    });
    println!("64 pages, 10 ms each, 16 at once: {:?}", started.elapsed());

    drop(region); // before its server
    server.abort();
    Ok(())
}
