//! Conversions from and to the `userfaultfd` crate: the feature `userfaultfd`.

use crate::{PAGE, own_memory, pattern};
use pagestitch::{AdoptedMemory, ErrorKind, Pool, Process, Region};
use pagestitch_kernel::{AddressRange, Outcome, PageSize, Uffd};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use std::ffi::c_void;
use std::thread;
use userfaultfd::Event;

const BYTES: usize = 64 * PAGE;

/// The userfaultfd of a guest in this process, for the crate; the start of its only range.
fn of_the_crate(guest: &Guest) -> (userfaultfd::Uffd, usize) {
    let ours = Uffd::adopt_own(guest.uffd().try_clone_to_owned().unwrap(), own_memory()).unwrap();
    (userfaultfd::Uffd::from(ours), guest.ranges()[0].0)
}

#[test]
fn memory_that_the_userfaultfd_crate_has_registered_is_served() {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let (uffd, start) = of_the_crate(&guest);
    let address: *mut c_void = std::ptr::with_exposed_provenance_mut(start);
    uffd.unregister(address, BYTES).unwrap();
    uffd.register(address, BYTES).unwrap();

    let memory = AdoptedMemory::try_from((uffd, own_memory())).unwrap().range(start, BYTES);
    let memory = memory.owner(Process::open(std::process::id()).unwrap());
    let bytes = pattern(3, BYTES);
    let region = Region::builder().chunk(bytes.clone()).build_adopted(memory, &Pool::new().unwrap()).unwrap();
    assert!((0..BYTES).step_by(101).all(|at| guest.read(at) == bytes[at]));
    region.finish().unwrap();
}

#[test]
fn a_fault_of_adopted_memory_is_read_with_the_userfaultfd_crate_and_filled_with_ours() {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let (start, _) = guest.ranges()[0];
    let theirs = userfaultfd::Uffd::from(guest.memory_without_ranges().unwrap());
    scope(|scope| {
        let reader = scope.spawn(|| guest.read(5 * PAGE + 7));
        let touched = loop {
            match theirs.read_event().unwrap() {
                Some(Event::Pagefault { addr, .. }) => break addr.addr(),
                _ => thread::yield_now(),
            }
        };
        assert_eq!(touched, start + 5 * PAGE);
        let ours = Uffd::try_from((theirs, own_memory())).unwrap();
        let page = AddressRange::new(touched, PAGE, PageSize::system()).unwrap();
        assert_eq!(ours.copy(page, &pattern(4, PAGE)), Outcome::Done);
        assert_eq!(reader.join().unwrap(), pattern(4, PAGE)[7]);
    });
}

#[test]
fn memory_of_this_process_is_not_adopted_from_the_userfaultfd_crate_without_a_promise() {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let error = AdoptedMemory::try_from(of_the_crate(&guest).0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OwnMemory, "{error}");
}
