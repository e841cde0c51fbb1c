//! A region in an event loop of your own: faults are one kind of event among others.
//! `cargo run --example embed_epoll`.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use pagestitch::{Chunk, Manual, Region};
use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

const FAULTS: u64 = 0;
const CLIENT: u64 = 1;

fn main() -> Result<(), Box<dyn Error>> {
    let mut manual = Manual::new()?; // starts no thread
    let region = Region::builder()
        .name("store")
        .chunk((0..250_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
        .chunk(Chunk::hole(1 << 30))
        .build(&manual)?;

    let (mut server, client) = UnixStream::pair()?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&manual, EpollEvent::new(EpollFlags::EPOLLIN, FAULTS))?;
    epoll.add(&server, EpollEvent::new(EpollFlags::EPOLLIN, CLIENT))?;

    let (mut faults, mut requests) = (0, 0);
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        // Another thread reads the region, and sends requests to the loop.
        let region = &region;
        scope.spawn(move || reader(region, client));
        let mut ready = [EpollEvent::empty(); 8];
        loop {
            let count = epoll.wait(&mut ready, EpollTimeout::NONE)?;
            for event in &ready[..count] {
                match event.data() {
                    // A few faults at a time, so that no other event waits for long.
                    FAULTS => faults += manual.serve_ready(16),
                    _ => {
                        let mut request = [0; 4];
                        if server.read_exact(&mut request).is_err() {
                            return Ok(()); // the reader has closed its end
                        }
                        requests += 1;
                        server.write_all(&request)?;
                    }
                }
            }
        }
    })?;
    println!(
        "one loop: {requests} requests answered, {faults} faults served, {:?}",
        region.metrics().pages_installed()
    );
    assert_eq!(requests, 100);
    Ok(())
}

/// Sums the words of the region, and has the loop echo each sum.
fn reader(region: &Region, mut client: UnixStream) {
    let words = region.as_slice()[..1_000_000].as_chunks::<4>().0;
    for (number, part) in words.chunks(2_500).enumerate() {
        let sum: u32 = part.iter().map(|word| u32::from_le_bytes(*word)).fold(0, u32::wrapping_add);
        let mut echo = [0; 4];
        client
            .write_all(&sum.to_le_bytes())
            .and_then(|()| client.read_exact(&mut echo))
            .expect("the loop answers");
        assert_eq!(u32::from_le_bytes(echo), sum, "part {number}");
    }
}
