//! The names of reservations in `/proc/PID/maps`.

use nix::libc::{self, c_ulong};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use pagestitch_kernel::{Access, PageSize, Reservation, View};
use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;

#[test]
fn a_reservation_has_a_name_where_the_kernel_has_names() {
    let pages = NonZeroUsize::new(3).unwrap();
    let (reservation, _view) = View::reserve(pages, PageSize::system(), Access::Writable).unwrap();
    let named = kernel_has_names();
    assert_eq!(name_of(&reservation), named.then(|| String::from("[anon:pagestitch]")));
    reservation.set_name("a region");
    assert_eq!(name_of(&reservation), named.then(|| String::from("[anon:pagestitch:a region]")));
    reservation.set_name("[not allowed]");
    assert_eq!(name_of(&reservation), named.then(|| String::from("[anon:pagestitch:_not allowed_]")));
    if !named {
        let line = "SKIPPED a_reservation_has_a_name_where_the_kernel_has_names: no CONFIG_ANON_VMA_NAME\n";
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// The name of the mapping that holds the first address of a reservation. The kernel joins
/// neighbours of equal name, which belong to other tests.
fn name_of(reservation: &Reservation) -> Option<String> {
    let holds = |line: &&str| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        (start..end).contains(&reservation.range().start())
    };
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(holds).expect("the reservation is mapped");
    line.split_once('[').map(|(_, name)| format!("[{name}"))
}

/// Tries to name a mapping of its own.
#[expect(unsafe_code, reason = "prctl and mmap")]
fn kernel_has_names() -> bool {
    let bytes = NonZeroUsize::new(PageSize::system().bytes()).unwrap();
    // SAFETY: the kernel chooses the address of a new mapping, which replaces no other.
    let start = unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.unwrap();
    let (option, attribute) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME as c_ulong);
    let (address, len) = (start.addr().get() as c_ulong, bytes.get() as c_ulong);
    // SAFETY: the kernel reads the name, and changes no byte of the mapping.
    let answer = unsafe { libc::prctl(option, attribute, address, len, c"probe".as_ptr()) };
    // SAFETY: the mapping was made above, and no reference to it exists.
    unsafe { munmap(start, bytes.get()) }.unwrap();
    answer == 0
}
