//! Memory of guests, in this process or in another one, as adopted memory.

use crate::{PAGE, SIGBUS, SIGKILL};
use pagestitch::{AdoptedMemory, Process};
use pagestitch_kernel::{Features, Support, fd_passing};
use pagestitch_testkit::guest::Guest;
use std::os::unix::net::UnixStream;

/// Adopts the memory of a guest in this process, which stands for a part of the program that does
/// not know pagestitch.
pub(crate) fn adopt(guest: &Guest) -> AdoptedMemory {
    guest.memory().unwrap().owner(Process::open(std::process::id()).unwrap())
}

/// Receives the handshake of a guest in another process and adopts its memory.
pub(crate) fn receive(stream: &UnixStream) -> AdoptedMemory {
    let mut message = vec![0; 4096];
    let (bytes, mut fds) = fd_passing::receive(stream, &mut message).unwrap();
    let ranges: serde_json::Value = serde_json::from_slice(&message[..bytes]).unwrap();
    let memory = AdoptedMemory::new(fds.pop().expect("a descriptor")).unwrap();
    let memory = ranges.as_array().unwrap().iter().fold(memory, |memory, range| {
        let number = |name: &str| range[name].as_u64().unwrap() as usize;
        memory.range(number("base_host_virt_addr"), number("size"))
    });
    memory.owner(Process::peer(stream).unwrap())
}

/// Fails unless the guest's memory shows all expected bytes, and zeros in the discarded pages.
pub(crate) fn assert_shows(guest: &Guest, expected: &[u8], discarded: &[usize]) {
    for (page, expected) in expected.chunks(PAGE).enumerate() {
        let mut seen = [0; PAGE];
        guest.copy_to(page * PAGE, &mut seen);
        let expected = if discarded.contains(&page) { &[0; PAGE] } else { expected };
        assert!(seen == expected, "page {page}");
    }
}

/// The signal that the owner of adopted memory gets for an unavailable page: SIGBUS at the touch
/// or, before Linux 6.6, which has no poison markers, SIGKILL.
pub(crate) fn signal_of_lost_page() -> i32 {
    let features = pagestitch_kernel::uffd::handshake_probe().expect("a userfaultfd");
    if features.contains(Features::POISON) { SIGBUS } else { SIGKILL }
}

/// True, with a line that says so, where the kernel has no poison markers (before Linux 6.6): a
/// drop of adopted memory then kills its owner, and here the owner is the test process.
pub(crate) fn lacks_poison(test: &str) -> bool {
    let lacks = !Support::current().has(Features::POISON);
    if lacks {
        println!("SKIPPED {test}: this kernel has no poison markers (Linux 6.6)");
    }
    lacks
}
