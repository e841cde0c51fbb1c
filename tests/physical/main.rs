//! Physical memory, in a guest with 16 MiB of reserved memory, an ivshmem device whose memory is a
//! file of the host, and a kernel module that lifts `CONFIG_STRICT_DEVMEM`.
//!
//! The tests are ignored elsewhere. `tests/guest/main.rs` boots the guest and plays the part of the
//! host.

#![cfg(target_arch = "x86_64")]

mod lifted;
mod lockdown;
mod ordinary_user;
mod stock;

use pagestitch::source::{Caching, Physical, PhysicalError};
use pagestitch::{Access, SharedRegion};
use std::fs;
use std::path::PathBuf;

const PAGE: u64 = 4096;
/// The memory that the guest's command line reserves: `memmap=16M$0x8000000`.
const RESERVED: u64 = 0x800_0000;

#[expect(unsafe_code, reason = "physical memory")]
fn dev_mem(start: u64, bytes: u64, access: Access, caching: Caching) -> Result<Physical, PhysicalError> {
    // SAFETY: a guest of our own. The memory is reserved for this test, or the kernel refuses it.
    unsafe { Physical::dev_mem(start..start + bytes, access, caching) }
}

#[expect(unsafe_code, reason = "physical memory")]
fn pci_resource(path: &PathBuf, access: Access) -> Result<Physical, PhysicalError> {
    // SAFETY: a guest of our own. The device is memory and nothing else.
    unsafe { Physical::pci_resource(path, access, Caching::Cached) }
}

/// The resource file of the device with this vendor and this number, and its physical addresses.
fn pci_device(vendor: &str, device: &str, resource: usize) -> (PathBuf, u64, u64) {
    let devices = fs::read_dir("/sys/bus/pci/devices").expect("a PCI bus").map(|entry| entry.unwrap().path());
    let is = |folder: &PathBuf, file: &str, id: &str| {
        fs::read_to_string(folder.join(file)).is_ok_and(|text| text.trim() == id)
    };
    let folder = devices.into_iter().find(|path| is(path, "vendor", vendor) && is(path, "device", device));
    let folder = folder.expect("the device");
    let table = fs::read_to_string(folder.join("resource")).unwrap();
    let line: Vec<u64> = table.lines().nth(resource).unwrap().split(' ').map(hexadecimal).collect();
    (folder.join(format!("resource{resource}")), line[0], line[1] + 1)
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

fn bytes_at(region: &SharedRegion, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    region.read_at(offset, &mut bytes).unwrap();
    bytes
}
