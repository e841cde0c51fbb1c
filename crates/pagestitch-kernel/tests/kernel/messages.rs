//! The full text of each error of the kernel crate, once: all other tests check the values.

use pagestitch_kernel::limits::{Limit, ReserveError};
use pagestitch_kernel::pages::{Pages, PagesError};
use pagestitch_kernel::physical::{PhysicalError, Refusal};
use pagestitch_kernel::shared::AliasError;
use pagestitch_kernel::uffd::{AdoptError, OpenError};
use pagestitch_kernel::{Errno, PageSize};

fn check<E: std::fmt::Display>(cases: impl IntoIterator<Item = (E, &'static str)>) {
    let (said, expected): (Vec<_>, Vec<_>) =
        cases.into_iter().map(|(error, text)| (error.to_string(), text)).unzip();
    assert_eq!(said, expected);
}

#[test]
fn a_limit_is_named_with_its_value_and_the_remedy() {
    let reserve = |limit| ReserveError { bytes: 1 << 33, errno: Errno::ENOMEM, limit };
    check([
        (
            reserve(Limit::AddressSpace(1 << 32)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; this process is limited to 4294967296 (RLIMIT_AS): raise it with ulimit -v",
        ),
        (
            reserve(Limit::Data(1 << 32)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; writable memory of this process is limited to 4294967296 (RLIMIT_DATA): raise it with ulimit -d; a region that is only read is not counted if it is built hardware_read_only()",
        ),
        (
            reserve(Limit::Locked(65_536)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; this process locks what it maps (mlockall), and may lock 65536 (RLIMIT_MEMLOCK): raise it with ulimit -l, or build before mlockall(MCL_FUTURE)",
        ),
        (
            reserve(Limit::Commit),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; vm.overcommit_memory=2 charges writable memory in full: set it to 1, or raise vm.overcommit_ratio; a region that is only read is not counted if it is built hardware_read_only()",
        ),
        (
            reserve(Limit::Descriptors(1024)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; this process may open 1024 descriptors (RLIMIT_NOFILE): raise it with ulimit -n",
        ),
        (
            reserve(Limit::Threads(100)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; this user may have 100 threads (RLIMIT_NPROC): raise it with ulimit -u, or pids.max of the cgroup",
        ),
        (
            reserve(Limit::Tasks),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; no more threads may run: raise pids.max of the cgroup, or kernel.threads-max",
        ),
        (
            reserve(Limit::FileSize(1 << 20)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; a file may have 1048576 bytes (RLIMIT_FSIZE): raise it with ulimit -f",
        ),
        (
            reserve(Limit::AvailableMemory(1 << 30)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; the machine has 1073741824 bytes of memory available: free some, or make the region smaller",
        ),
        (
            reserve(Limit::CgroupMemory(1 << 30)),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; the cgroup may use 1073741824 bytes (memory.max): raise its limit (docker run --memory), or make the region smaller",
        ),
        (
            reserve(Limit::Other),
            "cannot reserve 8589934592 bytes of addresses: ENOMEM: Out of memory; make the region smaller, or raise vm.max_map_count",
        ),
    ]);
    let named =
        [Limit::AddressSpace(7), Limit::Commit, Limit::Other].map(|limit| (limit.name(), limit.value()));
    assert_eq!(named, [(Some("RLIMIT_AS"), Some(7)), (Some("vm.overcommit_memory"), None), (None, None)]);
}

#[test]
fn a_userfaultfd_that_is_not_opened_or_adopted_is_named_with_the_remedy() {
    let open = |system_call| OpenError { device: Errno::ENOENT, system_call };
    check([
        (
            open(Errno::ENOSYS),
            "no userfaultfd: the system call answers ENOSYS: Function not implemented, /dev/userfaultfd ENOENT: No such file or directory; boot a kernel built with CONFIG_USERFAULTFD, or let the container's seccomp profile pass it",
        ),
        (
            open(Errno::EPERM),
            "no userfaultfd: the system call answers EPERM: Operation not permitted, /dev/userfaultfd ENOENT: No such file or directory; let the container's seccomp profile pass userfaultfd, hand it /dev/userfaultfd, or on Linux before 5.11 set vm.unprivileged_userfaultfd=1",
        ),
        (
            open(Errno::EMFILE),
            "no userfaultfd: the system call answers EMFILE: Too many open files, /dev/userfaultfd ENOENT: No such file or directory; raise the limit on open files (ulimit -n): a region takes one",
        ),
        (
            OpenError { device: Errno::EMFILE, system_call: Errno::EPERM },
            "no userfaultfd: the system call answers EPERM: Operation not permitted, /dev/userfaultfd EMFILE: Too many open files; raise the limit on open files (ulimit -n): a region takes one",
        ),
        (
            open(Errno::EINVAL),
            "no userfaultfd: the system call answers EINVAL: Invalid argument, /dev/userfaultfd ENOENT: No such file or directory; use Linux 4.11 or newer: this kernel does not know the UFFD_API handshake",
        ),
    ]);
    check([
        (
            AdoptError::NotUserfaultfd(String::from("/dev/null")),
            "the descriptor is no userfaultfd but /dev/null: send the one that the memory is registered with",
        ),
        (AdoptError::Refused(Errno::EACCES), "the descriptor cannot be adopted: EACCES: Permission denied"),
        (
            AdoptError::OwnMemory,
            "the userfaultfd fills memory of this process, not of another: to fill it, make the promise of OwnMemory",
        ),
        (
            AdoptError::NotReady,
            "the userfaultfd has no memory yet: call UFFDIO_API and register memory before it is handed over",
        ),
    ]);
}

#[test]
fn pages_that_cannot_be_made_are_named_with_their_number() {
    check([
        (Pages::new(0).unwrap_err(), "pages need at least one byte: ask for 1 or more"),
        (
            PagesError { bytes: 8192, errno: Errno::ENOMEM },
            "cannot map 8192 bytes of pages: ENOMEM: Out of memory",
        ),
    ]);
}

#[test]
fn an_alias_that_is_refused_is_named_with_its_address_and_the_remedy() {
    check([
        (
            AliasError::Unaligned { start: 0x1001, bytes: 100, page: PageSize::system() },
            "100 bytes at 0x1001 are not whole pages of 4 KiB: an alias has whole pages; copy the edges",
        ),
        (
            AliasError::Private { address: 0x1000 },
            "the memory at 0x1000 is private to this process and cannot be mapped twice: donate it (Pages), have it copied (Memory), or allocate it in a memfd",
        ),
        (
            AliasError::Huge { address: 0x1000 },
            "the memory at 0x1000 is in huge pages of hugetlbfs, or a device's, and cannot be mapped twice a page at a time: show its descriptor (SharedFile, Memfd, Physical)",
        ),
        (
            AliasError::Unmapped { address: 0x1000 },
            "nothing is mapped at 0x1000: make the alias of mapped memory only",
        ),
        (
            AliasError::Refused { start: 0x1000, bytes: 4096, errno: Errno::EPERM },
            "cannot map 4096 bytes at 0x1000 a second time: EPERM: Operation not permitted",
        ),
    ]);
}

#[test]
fn physical_memory_that_is_refused_is_named_with_the_remedy() {
    let name = || String::from("physical 0x0..0x1000");
    let refused = |refusal| PhysicalError { name: name(), refusal };
    check([
        (
            refused(Refusal::NoNode(String::from("/dev/mem"))),
            "physical 0x0..0x1000: there is no /dev/mem: use a kernel with CONFIG_DEVMEM, and in a container give it the node (c 1 1)",
        ),
        (
            refused(Refusal::NoPermission(String::from("/dev/mem"))),
            "physical 0x0..0x1000: /dev/mem may not be opened: become root, or a member of its group",
        ),
        (
            refused(Refusal::NoCapability("CAP_SYS_RAWIO")),
            "physical 0x0..0x1000: this process lacks CAP_SYS_RAWIO: become root, or grant it (setcap; root of a container: --cap-add)",
        ),
        (
            refused(Refusal::Lockdown),
            "physical 0x0..0x1000: the kernel is locked down (Secure Boot, lockdown=): boot it without lockdown",
        ),
        (
            refused(Refusal::NotWholePages),
            "physical 0x0..0x1000: not whole pages, or none: align its start and its end to the page size",
        ),
        (
            refused(Refusal::SystemRam(String::from("System RAM"))),
            "physical 0x0..0x1000: it is the kernel's own memory (System RAM), which CONFIG_STRICT_DEVMEM forbids: reserve it at boot (memmap=SIZE$START), or use a kernel without that option",
        ),
        (
            refused(Refusal::Claimed(String::from("IOAPIC 0"))),
            "physical 0x0..0x1000: IOAPIC 0 has claimed it: unbind the driver, use the device's resource file, or boot with iomem=relaxed",
        ),
        (
            refused(Refusal::OtherCaching),
            "physical 0x0..0x1000: it is mapped with other caching already: use the same caching",
        ),
        (
            refused(Refusal::Ports),
            "physical 0x0..0x1000: it cannot be mapped: I/O ports, or claimed by a driver; choose a memory resource",
        ),
        (
            refused(Refusal::NotDecoding),
            "physical 0x0..0x1000: the device does not decode memory: write 1 to the file `enable` beside it",
        ),
        (
            refused(Refusal::NoPin(Errno::ENOSYS)),
            "physical 0x0..0x1000: its pages cannot be pinned, because io_uring is off: allow it (kernel.io_uring_disabled, seccomp)",
        ),
        (
            refused(Refusal::NoPin(Errno::ENOMEM)),
            "physical 0x0..0x1000: its pages cannot be pinned: past the limit on locked memory (ulimit -l), or out of memory",
        ),
        (refused(Refusal::Moved(7)), "physical 0x0..0x1000: page 7 has moved to another frame: try again"),
    ]);
}
