//! A distribution's kernel as it is: reserved memory and devices can be shown, and other memory is
//! refused with a reason.

use crate::{PAGE, RESERVED, bytes_at, dev_mem, hexadecimal, pci_device, pci_resource};
use pagestitch::source::{Caching, Physical};
use pagestitch::{Access, Chunk, ErrorKind, Method, Pool, Region};
use pagestitch_kernel::physical::Refusal;
use pagestitch_testkit::wait;
use std::fs;
use std::sync::Arc;

#[test]
#[ignore = "needs the guest with reserved memory"]
fn shuffled_pages_of_reserved_memory_are_one_region_without_a_copy() {
    let memory = Arc::new(dev_mem(RESERVED, 8 * PAGE, Access::Writable, Caching::Cached).unwrap());
    for page in 0..8 {
        memory.write_at(page * PAGE, &[page as u8 + 1; PAGE as usize]).unwrap();
    }
    let order = [5, 0, 7, 2, 2];
    let region = Region::builder()
        .chunks(order.map(|page: u64| Chunk::from(Arc::clone(&memory)).range(page * PAGE..(page + 1) * PAGE)))
        .writable()
        .require_zero_copy()
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    for (place, page) in order.iter().enumerate() {
        assert_eq!(bytes_at(&region, place as u64 * PAGE + 77, 1), [*page as u8 + 1]);
    }
    region.write_at(3 * PAGE - 2, b"seam").unwrap();
    let mut seen = [0; 2];
    memory.read_at(8 * PAGE - 2, &mut seen).unwrap();
    assert_eq!(&seen, b"se", "the end of page 7");
    memory.read_at(2 * PAGE, &mut seen).unwrap();
    assert_eq!(&seen, b"am", "the start of page 2");
    assert_eq!(bytes_at(&region, 4 * PAGE, 2), b"am", "page 2 is shown twice");
    let seen = region.close();
    assert_eq!((seen.pages_in_place, seen.faults, seen.bytes_copied), (5, 0, 0));
}

#[test]
#[ignore = "needs the guest with reserved memory"]
fn unaligned_physical_memory_is_copied_at_the_first_touch() {
    let memory = dev_mem(RESERVED + (1 << 20), 4 * PAGE, Access::Writable, Caching::Cached).unwrap();
    memory.write_at(0, &[8; 4 * PAGE as usize]).unwrap();
    let region = Region::builder()
        .chunk(vec![1u8; 10])
        .chunk(Chunk::from(memory).range(5..3 * PAGE))
        .chunk(vec![2u8; 10])
        .build_shared(&Pool::new().unwrap())
        .unwrap();
    assert_eq!(region.plan().runs()[1].method, Method::Buffered);
    let all = bytes_at(&region, 0, region.len());
    assert!(all == [vec![1; 10], vec![8; 3 * PAGE as usize - 5], vec![2; 10]].concat());
}

#[test]
#[ignore = "needs the guest with an ivshmem device"]
fn device_memory_is_the_same_through_dev_mem_its_resource_and_the_host() {
    let (path, start, end) = pci_device("0x1af4", "0x1110", 2);
    let pool = Pool::new().unwrap();
    let show = |physical: Physical| {
        Region::builder().chunk(physical).writable().require_zero_copy().build_shared(&pool).unwrap()
    };
    let by_address = show(dev_mem(start, end - start, Access::Writable, Caching::Cached).unwrap());
    let by_file = show(pci_resource(&path, Access::Writable).unwrap());
    assert_eq!(bytes_at(&by_address, 0, 14), b"from the host!");
    by_address.write_at(PAGE, b"through /dev/mem").unwrap();
    assert_eq!(bytes_at(&by_file, PAGE, 16), b"through /dev/mem");
    // The host answers n at 0x2000 with n + 1 at 0x2008, as long as the guest runs.
    for n in (1..100_u64).step_by(7) {
        by_file.write_at(2 * PAGE, &n.to_le_bytes()).unwrap();
        // A change of memory wakes no thread.
        let answered = || bytes_at(&by_address, 2 * PAGE + 8, 8) == (n + 1).to_le_bytes();
        wait::until("the host answers", answered);
    }
    by_file.write_at(by_file.len() as u64 - 15, b"from the guest!").unwrap();
    assert_eq!(by_file.close().faults + by_address.close().faults, 0);
}

#[test]
#[ignore = "needs the guest's stock kernel"]
fn the_kernels_own_memory_is_refused() {
    let error = dev_mem(16 << 20, PAGE, Access::ReadOnly, Caching::Cached).unwrap_err();
    assert!(matches!(error.refusal, Refusal::SystemRam(_)), "{error:?}");
    assert_eq!(error.name, "physical 0x1000000..0x1001000");
}

#[test]
#[ignore = "needs the guest's stock kernel"]
fn memory_claimed_by_a_driver_is_refused_with_the_name_of_the_driver() {
    let table = fs::read_to_string("/proc/iomem").unwrap();
    let line = table.lines().find(|line| line.contains("IOAPIC")).expect("an I/O APIC");
    let start = hexadecimal(line.trim_start().split('-').next().unwrap());
    let error = dev_mem(start, PAGE, Access::ReadOnly, Caching::Uncached).unwrap_err();
    assert_eq!(error.refusal, Refusal::Claimed(String::from("IOAPIC 0")), "{error}");
}

#[test]
#[ignore = "needs the guest with reserved memory"]
fn a_second_mapping_with_other_caching_is_refused() {
    let start = RESERVED + (2 << 20);
    let cached = dev_mem(start, PAGE, Access::ReadOnly, Caching::Cached).unwrap();
    let region = Region::builder().chunk(cached).build_shared(&Pool::new().unwrap()).unwrap();
    let error = dev_mem(start, PAGE, Access::ReadOnly, Caching::Uncached).unwrap_err();
    assert_eq!(error.refusal, Refusal::OtherCaching, "{error}");
    drop(region);
    dev_mem(start, PAGE, Access::ReadOnly, Caching::Uncached).unwrap();
}

#[test]
#[ignore = "needs the guest with reserved memory"]
fn memory_opened_for_reading_refuses_writes() {
    let start = RESERVED + (3 << 20);
    let build = |builder: pagestitch::Builder| builder.build_shared(&Pool::new().unwrap());
    let memory = || dev_mem(start, PAGE, Access::ReadOnly, Caching::Cached).unwrap();
    let error = build(Region::builder().chunk(memory()).writable()).unwrap_err();
    assert_eq!((error.kind(), error.chunk()), (ErrorKind::UnusableFile, Some(0)), "{error}");
    let region = build(Region::builder().chunk(memory())).unwrap();
    assert!(region.write_at(0, b"no").is_err());
}

#[test]
#[ignore = "needs the guest with reserved memory"]
fn partial_pages_and_io_ports_are_refused() {
    let error = dev_mem(RESERVED + 1, PAGE, Access::ReadOnly, Caching::Cached).unwrap_err();
    assert_eq!(error.refusal, Refusal::NotWholePages);
    // The disk controller of the emulated chip set: resource 4 is its I/O ports.
    let (path, ..) = pci_device("0x8086", "0x7010", 4);
    let error = pci_resource(&path, Access::ReadOnly).unwrap_err();
    assert_eq!(error.refusal, Refusal::Ports, "{error}");
}
