//! The reasons why physical memory is refused. Some are certain before the kernel is asked; the
//! others come from its own tables afterwards.

use crate::errno::Errno;
use crate::page::PageSize;
use std::ops::Range;
use std::path::Path;
use std::{fmt, fs};

/// A range of physical memory is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhysicalError {
    /// The name of the range.
    pub name: String,
    /// The reason.
    pub refusal: Refusal,
}

/// The reason why physical memory is refused. `Display` adds the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The file does not exist.
    NoNode(String),
    /// This process may not open the file.
    NoPermission(String),
    /// `CAP_SYS_RAWIO` is missing (`/dev/mem`), or `CAP_SYS_ADMIN` (frame numbers).
    NoCapability(&'static str),
    /// The kernel is locked down.
    Lockdown,
    /// The range begins or ends inside a page, or is empty.
    NotWholePages,
    /// The range is the kernel's own memory, and the kernel has `CONFIG_STRICT_DEVMEM`.
    SystemRam(String),
    /// A driver has claimed the range.
    Claimed(String),
    /// The range is mapped with other caching already.
    OtherCaching,
    /// The range is I/O ports and not memory.
    Ports,
    /// The device does not answer to its memory addresses.
    NotDecoding,
    /// The kernel cannot pin the pages.
    NoPin(Errno),
    /// A page moved to another frame although it was pinned.
    Moved(usize),
    /// Another errno.
    Other(Errno),
}

/// The refusals that are certain before `/dev/mem` is opened.
pub(super) fn before_dev_mem(name: &str) -> Result<(), PhysicalError> {
    let refusal = if !Path::new(DEV_MEM).exists() {
        Refusal::NoNode(DEV_MEM.to_owned())
    } else if is_locked_down() {
        Refusal::Lockdown
    } else if !has_capability(CAP_SYS_RAWIO) {
        Refusal::NoCapability("CAP_SYS_RAWIO")
    } else {
        return Ok(());
    };
    Err(PhysicalError { name: name.to_owned(), refusal })
}

/// The refusals that are certain before a PCI resource is mapped.
pub(super) fn before_pci(name: &str, path: &Path, bytes: u64) -> Result<(), PhysicalError> {
    // Bit 1 of the command register, at byte 4 of the configuration space: the device decodes
    // memory addresses.
    let config = path.parent().and_then(|device| fs::read(device.join("config")).ok());
    let decoding = config.and_then(|config| config.get(4).map(|command| command & 2 != 0));
    let refusal = if is_locked_down() {
        Refusal::Lockdown
    } else if bytes < PageSize::system().bytes() as u64 && is_ports(path) {
        Refusal::Ports
    } else if decoding == Some(false) {
        Refusal::NotDecoding
    } else {
        return Ok(());
    };
    Err(PhysicalError { name: name.to_owned(), refusal })
}

pub(super) fn of_open(name: &str, path: &Path, errno: Errno) -> PhysicalError {
    let path = path.display().to_string();
    let refusal = match errno {
        Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => Refusal::NoNode(path),
        Errno::EACCES => Refusal::NoPermission(path),
        // A process with the capability is refused by lockdown alone, whether or not securityfs is
        // mounted.
        Errno::EPERM if has_capability(CAP_SYS_RAWIO) => Refusal::Lockdown,
        Errno::EPERM => Refusal::NoCapability("CAP_SYS_RAWIO"),
        errno => Refusal::Other(errno),
    };
    PhysicalError { name: name.to_owned(), refusal }
}

/// The reason why the kernel refused to map a range, from its own tables.
pub(super) fn of_mapping(name: &str, range: &Range<u64>, dev_mem: bool, errno: Errno) -> PhysicalError {
    let table = fs::read_to_string("/proc/iomem").unwrap_or_default();
    let refusal = match errno {
        // The answer to a writer of /dev/mem is EAGAIN, or EINVAL before Linux 6.9.
        Errno::EAGAIN => Refusal::OtherCaching,
        Errno::EPERM | Errno::EINVAL if is_locked_down() => Refusal::Lockdown,
        Errno::EPERM | Errno::EINVAL if dev_mem => match owners(&table, range).as_slice() {
            [ram, ..] if ram == "System RAM" => Refusal::SystemRam(ram.clone()),
            [.., owner] => Refusal::Claimed(owner.clone()),
            [] => Refusal::Other(errno),
        },
        // A resource file has no other reason for EPERM.
        Errno::EPERM => Refusal::Lockdown,
        Errno::EINVAL => Refusal::Ports,
        errno => Refusal::Other(errno),
    };
    PhysicalError { name: name.to_owned(), refusal }
}

/// The owners of a range in `/proc/iomem`, outermost first.
fn owners(table: &str, range: &Range<u64>) -> Vec<String> {
    let owner = |line: &str| {
        let (addresses, owner) = line.trim_start().split_once(" : ")?;
        let (start, last) = addresses.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let last = u64::from_str_radix(last, 16).ok()?;
        (start < range.end && range.start <= last).then(|| owner.to_owned())
    };
    table.lines().filter_map(owner).collect()
}

/// True if a resource file is one of I/O ports, according to bit 8 of the flags in the device's
/// table.
fn is_ports(path: &Path) -> bool {
    let number =
        path.file_name().and_then(|name| name.to_str()?.strip_prefix("resource")?.parse::<usize>().ok());
    let table = path.parent().and_then(|device| fs::read_to_string(device.join("resource")).ok());
    let flags = number.zip(table).and_then(|(number, table)| {
        let flags = table.lines().nth(number)?.split_whitespace().nth(2)?;
        u64::from_str_radix(flags.trim_start_matches("0x"), 16).ok()
    });
    flags.is_some_and(|flags| flags & 0x100 != 0)
}

fn is_locked_down() -> bool {
    fs::read_to_string("/sys/kernel/security/lockdown")
        .is_ok_and(|modes| modes.contains("[integrity]") || modes.contains("[confidentiality]"))
}

pub(super) fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // If the file cannot be read, the kernel decides later.
    effective.is_none_or(|mask| mask & 1 << number != 0)
}

pub(super) const DEV_MEM: &str = "/dev/mem";
const CAP_SYS_RAWIO: u32 = 17;
pub(super) const CAP_SYS_ADMIN: u32 = 21;

impl fmt::Display for PhysicalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.refusal)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNode(path) if path == DEV_MEM => f.write_str(
                "there is no /dev/mem: use a kernel with CONFIG_DEVMEM, and in a container give it the node (c 1 1)",
            ),
            Self::NoNode(path) => write!(f, "there is no {path}"),
            Self::NoPermission(path) => write!(f, "{path} may not be opened: become root, or a member of its group"),
            Self::NoCapability(name) => write!(f, "this process lacks {name}: become root, or grant it (setcap; root of a container: --cap-add)"),
            Self::Lockdown => f.write_str("the kernel is locked down (Secure Boot, lockdown=): boot it without lockdown"),
            Self::NotWholePages => f.write_str("not whole pages, or none: align its start and its end to the page size"),
            Self::SystemRam(_) => f.write_str(
                "it is the kernel's own memory (System RAM), which CONFIG_STRICT_DEVMEM forbids: reserve it at boot \
                 (memmap=SIZE$START), or use a kernel without that option",
            ),
            Self::Claimed(owner) => write!(
                f,
                "{owner} has claimed it: unbind the driver, use the device's resource file, or boot with iomem=relaxed"
            ),
            Self::OtherCaching => f.write_str("it is mapped with other caching already: use the same caching"),
            Self::Ports => f.write_str("it cannot be mapped: I/O ports, or claimed by a driver; choose a memory resource"),
            Self::NotDecoding => f.write_str("the device does not decode memory: write 1 to the file `enable` beside it"),
            Self::NoPin(Errno::ENOSYS | Errno::EPERM) => f.write_str(
                "its pages cannot be pinned, because io_uring is off: allow it (kernel.io_uring_disabled, seccomp)",
            ),
            Self::NoPin(Errno::ENOMEM) => f.write_str(
                "its pages cannot be pinned: past the limit on locked memory (ulimit -l), or out of memory",
            ),
            Self::NoPin(errno) => write!(f, "its pages cannot be pinned: {errno}"),
            Self::Moved(page) => write!(f, "page {page} has moved to another frame: try again"),
            Self::Other(errno) => write!(f, "{errno}"),
        }
    }
}

impl std::error::Error for PhysicalError {}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "00000000-00000fff : Reserved\n\
                         00100000-07ffffff : System RAM\n\
                         \x20 01000000-01ffffff : Kernel code\n\
                         fea00000-febfffff : PCI Bus 0000:00\n\
                         \x20 feb00000-febfffff : 0000:00:04.0\n\
                         \x20   feb00000-febfffff : some-driver\n";

    #[test]
    fn the_owners_of_a_range_are_found() {
        assert_eq!(owners(TABLE, &(0x10_0000..0x10_1000)), ["System RAM"]);
        assert_eq!(
            owners(TABLE, &(0xfeb0_0000..0xfeb0_1000)),
            ["PCI Bus 0000:00", "0000:00:04.0", "some-driver"]
        );
        assert!(owners(TABLE, &(0x800_0000..0x900_0000)).is_empty());
    }

    #[test]
    fn a_missing_resource_file_is_named() {
        let path = Path::new("/sys/bus/pci/devices/none/resource2");
        let said = of_open("PCI resource none", path, Errno::ENOENT).to_string();
        assert_eq!(said, "PCI resource none: there is no /sys/bus/pci/devices/none/resource2");
    }
}
