//! A source that does not answer, as docs/debugging.md looks at it. `cargo run --example hung_fault -- 600` hangs for
//! ten minutes; without a number, for a second.

use pagestitch::{Chunk, Meter, Pool, Region, Source};
use std::sync::Arc;
use std::time::Duration;
use std::{env, io, process, thread};

struct Hung(Duration);

impl Source for Hung {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        thread::sleep(self.0);
        into.fill(7);
        Ok(())
    }

    fn name(&self) -> String {
        String::from("hung store")
    }
}

/// The numbers of a region, and the fault that has waited longest.
fn print_faults(meter: &Meter) {
    let (in_flight, oldest) = (meter.in_flight(), meter.oldest());
    println!("region {:?}: faults in flight: {in_flight}, oldest (offset, age): {oldest:?}", meter.region());
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    let seconds = env::args().nth(1).map_or(Ok(1), |argument| argument.parse())?;

    let pool = Pool::builder().warn_after(Duration::from_millis(200)).start()?;
    let region = Region::builder()
        .name("example")
        .chunk(Chunk::source(Arc::new(Hung(Duration::from_secs(seconds)))))
        .build(&pool)?;
    println!("process {}, region at {:p}", process::id(), region.as_slice().as_ptr());

    let meter = region.meter();
    thread::scope(|scope| {
        thread::Builder::new().name("reader".into()).spawn_scoped(scope, || region.as_slice()[5 << 12])?;
        thread::sleep(Duration::from_millis(500));
        print_faults(&meter);
        Ok::<_, io::Error>(())
    })?;
    print_faults(&meter);
    Ok(())
}
