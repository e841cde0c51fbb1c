//! Memory of another process, which registers a range and sends its userfaultfd. This process fills
//! the range on first touch. `cargo run --example adopt`. The other process is this program,
//! started again.

use pagestitch::{AdoptedMemory, Pool, Process, Region, Support};
use pagestitch_kernel::fd_passing;
use pagestitch_testkit::guest::Guest;
use std::error::Error;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::{env, fs, process};

const BYTES: usize = 16 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    match env::args().nth(1) {
        None => serve(),
        Some(socket) => own(&socket),
    }
}

/// Fills the memory of the process that connects.
fn serve() -> Result<(), Box<dyn Error>> {
    // Without a userfaultfd the other process ends, and this one would wait for its connection.
    Support::probe().features()?;
    let path = env::temp_dir().join(format!("pagestitch-adopt-{}", process::id()));
    let listener = UnixListener::bind(&path)?;
    let mut other = Command::new(env::current_exe()?).arg(&path).spawn()?;
    let (stream, _) = listener.accept()?;
    fs::remove_file(&path)?;

    let mut address = [0; 8];
    let (_, mut fds) = fd_passing::receive(&stream, &mut address)?;
    let memory = AdoptedMemory::new(fds.pop().ok_or("no descriptor")?)?
        .range(usize::from_ne_bytes(address), BYTES)
        .owner(Process::peer(&stream)?); // killed if bytes are unavailable and cannot be poisoned
    let region = Region::builder()
        .name("theirs")
        .chunks((0..16_u8).map(|i| vec![i + 1; 1 << 20]))
        .build_adopted(memory, &Pool::new()?)?;
    print!("{}", region.plan());

    assert!(other.wait()?.success());
    let metrics = region.close();
    println!("filled {} pages of another process, for {} faults", metrics.pages_installed(), metrics.faults);
    Ok(())
}

/// Registers memory, sends its userfaultfd, and touches it. Another program would call
/// `userfaultfd(2)`, `UFFDIO_API` and `UFFDIO_REGISTER` for that.
fn own(socket: &str) -> Result<(), Box<dyn Error>> {
    let memory = Guest::new(&[BYTES], false)?;
    let stream = UnixStream::connect(socket)?;
    let address = memory.ranges()[0].0.to_ne_bytes();
    fd_passing::send(&stream, &address, &[memory.uffd()])?;
    for offset in (0..BYTES).step_by(40_000) {
        assert_eq!(usize::from(memory.read(offset)), (offset >> 20) + 1);
    }
    Ok(())
}
