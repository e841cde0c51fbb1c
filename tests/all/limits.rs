//! Limits of the process: without userfaultfd, addresses, descriptors, threads or mappings, the
//! error is one clear line.

use crate::machine::{MAPPINGS_MAX, allows_too_many_mappings};
use crate::zero_copy::memfd;
use crate::{become_ordinary_user, pattern};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::source::{FileSource, SharedFile};
use pagestitch::{BuildOption, Chunk, Error, ErrorKind, Limit, Pool, Region, Support};
use pagestitch_kernel::Errno;
use pagestitch_kernel::Features;
use pagestitch_kernel::capabilities::Verdict;
use pagestitch_kernel::limits::descriptors_left;
use pagestitch_kernel::memfd::UnsealedMemfd;
use pagestitch_kernel::{Access, Page, PageSize, Uffd, View};
use pagestitch_testkit::deny::deny_userfaultfd;
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::time::Duration;

fn build(chunk: Chunk) -> Result<Region, Error> {
    Region::builder().name("limited").chunk(chunk).build(&Pool::builder().workers(1).start()?)
}

#[test]
fn without_userfaultfd_the_error_names_the_remedy() {
    let test = this_test!();
    let end = |errno| child::spawn(test, errno, without_userfaultfd).wait();
    end("EPERM").expect_pass();
    end("ENOSYS").expect_pass();
}

/// The answer of a container's seccomp profile, or of an old runtime.
fn without_userfaultfd(errno: &str) {
    let denied = if errno == "EPERM" { Errno::EPERM } else { Errno::ENOSYS };
    deny_userfaultfd(denied);
    let error = build(vec![1u8].into()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoUserfaultfd, "{error}");
    assert_eq!(error.raw_os_error(), Some(denied.raw()), "{error}");
    let support = Support::probe();
    assert!(support.features().is_err());
    let no = |verdict| matches!(verdict, Verdict::No { .. });
    assert!(support.capabilities().into_iter().all(|capability| no(capability.verdict)));
}

#[test]
#[cfg_attr(sanitized, ignore = "the sanitizer maps memory of its own, which does not fit the limit")]
fn a_region_past_rlimit_as_is_refused_with_the_limit() {
    let end = child::run(this_test!(), || {
        setrlimit(Resource::RLIMIT_AS, 1 << 32, 1 << 32).unwrap();
        let error = build(Chunk::hole(1 << 33)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
        assert_eq!(error.limit(), Some(Limit::AddressSpace(1 << 32)), "{error}");
        assert_eq!(build(vec![7u8; 10].into()).unwrap().as_slice(), [7; 10], "a small region still fits");
    });
    end.expect_pass();
}

#[test]
fn running_out_of_descriptors_is_an_error_at_each_step() {
    let end = child::run(this_test!(), || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let mut refused = 0;
        for limit in 3..40 {
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
            match build(vec![7u8; 10].into()) {
                Ok(region) => assert_eq!(region.as_slice(), [7; 10]),
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.kind(), ErrorKind::LimitReached, "{limit}: {error}");
                    assert_eq!(error.limit(), Some(Limit::Descriptors(limit)), "{limit}: {error}");
                }
            }
        }
        assert!(refused > 2, "the limits were met");
    });
    end.expect_pass();
}

/// The limit grows from the address space in use: a region that does not fit names the limit, and
/// one that fits shows its bytes. The threads start first, because a Rust program without addresses
/// for a signal stack is aborted.
#[test]
#[cfg_attr(sanitized, ignore = "the sanitizer maps memory of its own, which does not fit the limit")]
fn running_out_of_addresses_is_an_error_at_each_step() {
    let end = child::run(this_test!(), || {
        let (mut refused, mut built) = (0, 0);
        let pool = Pool::builder().workers(2).start().unwrap();
        let chunks = || [Chunk::from(vec![7u8; 100_000]), Chunk::from(memfd(&[9; 300]))];
        let chunks: Vec<_> = (0..200).map(|_| chunks()).collect();
        // Freed memory serves small allocations, because a Rust program without memory for them is
        // aborted.
        let mut small: Vec<_> = (0..10_000).map(|_| vec![1u8; 1000]).collect();
        small.drain(..9_999);
        for (kibibytes, chunks) in (0..).step_by(4).zip(chunks) {
            let limit = address_space() + kibibytes * 1024;
            setrlimit(Resource::RLIMIT_AS, limit, getrlimit(Resource::RLIMIT_AS).unwrap().1).unwrap();
            match Region::builder().chunks(chunks).build(&pool) {
                Ok(region) => {
                    built += 1;
                    let (copied, shown) = region.as_slice().split_at(100_000);
                    assert!(copied == [7; 100_000] && shown == [9; 300]);
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.kind(), ErrorKind::LimitReached, "{kibibytes}: {error}");
                    assert_eq!(error.limit(), Some(Limit::AddressSpace(limit)), "{kibibytes}: {error}");
                }
            }
        }
        assert!(refused > 2 && built > 2, "{refused} refused, {built} built: the limit was met, and passed");
    });
    end.expect_pass();
}

/// Writable memory counts against RLIMIT_DATA. A region that is only read counts too, unless the
/// hardware write-protects it.
#[test]
#[cfg_attr(sanitized, ignore = "the sanitizer maps memory of its own, which does not fit the limit")]
fn a_region_past_rlimit_data_is_refused_unless_hardware_read_only() {
    let end = child::run(this_test!(), || {
        let hard = getrlimit(Resource::RLIMIT_DATA).unwrap().1;
        setrlimit(Resource::RLIMIT_DATA, 1 << 32, hard).unwrap();
        let pool = Pool::builder().workers(1).start().unwrap();
        let chunks = || [Chunk::from(vec![7u8; 100]), Chunk::hole(1 << 33)];
        let error = Region::builder().name("limited").writable().chunks(chunks()).build(&pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
        assert_eq!(error.limit(), Some(Limit::Data(1 << 32)), "{error}");
        let region = Region::builder().hardware_read_only().chunks(chunks()).build(&pool).unwrap();
        assert_eq!(region.as_slice()[..101], [&[7; 100][..], &[0]].concat());
    });
    end.expect_pass();
}

/// The probe answers for this user, and not for root.
#[test]
fn event_fork_is_offered_to_a_privileged_process_only() {
    let end = child::run(this_test!(), || {
        become_ordinary_user();
        let support = Support::probe();
        let capability = |name| support.capabilities().into_iter().find(|one| one.name == name).unwrap();
        let may = Uffd::open(Features::EVENT_FORK).is_ok();
        assert_eq!(capability("EVENT_FORK").verdict == Verdict::Yes, may);
        assert_eq!(capability("POISON").verdict == Verdict::Yes, support.has(Features::POISON));
    });
    end.expect_pass();
}

/// Not as root, because RLIMIT_NPROC does not bind root.
#[test]
fn running_out_of_threads_is_an_error_at_each_step() {
    let end = child::run(this_test!(), || {
        become_ordinary_user();
        let mut refused = 0;
        let (_, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
        // Threads of other processes of the same user count too, and come and go.
        for limit in 0.. {
            setrlimit(Resource::RLIMIT_NPROC, limit, hard).unwrap();
            let started = Pool::builder().workers(3).warn_after(Duration::from_secs(9)).start();
            match started.and_then(|pool| Region::builder().chunk(vec![7u8; 10]).build(&pool)) {
                Ok(region) => {
                    assert_eq!(region.as_slice(), [7; 10]);
                    break;
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.kind(), ErrorKind::LimitReached, "{limit}: {error}");
                    assert_eq!(error.limit(), Some(Limit::Threads(limit)), "{limit}: {error}");
                }
            }
        }
        assert!(refused > 2, "the limit was met {refused} times");
    });
    end.expect_pass();
}

/// A region locks no memory.
#[test]
fn rlimit_memlock_of_zero_is_enough() {
    let end = child::run(this_test!(), || {
        become_ordinary_user();
        setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).unwrap();
        let chunks = [Chunk::from(vec![7u8; 100_000]), Chunk::from(memfd(&[9; 5000]))];
        let region = Region::builder().chunks(chunks).build(&Pool::new().unwrap()).unwrap();
        assert!(region.as_slice()[..100_000] == [7; 100_000]);
        assert!(region.as_slice()[100_000..] == [9; 5000]);
    });
    end.expect_pass();
}

/// With `vm.unprivileged_userfaultfd` an ordinary user serves system calls too; without it,
/// everything else.
#[test]
fn an_ordinary_user_is_served_under_each_unprivileged_userfaultfd_setting() {
    let test = this_test!();
    let path = "/proc/sys/vm/unprivileged_userfaultfd";
    let before = if child::is_child(test) { None } else { fs::read_to_string(path).ok() };
    let before = before.filter(|before| fs::write(path, before.trim()).is_ok());
    // A user that may not write the setting tests the current one.
    for setting in if before.is_some() { &["0", "1"][..] } else { &[""] } {
        if before.is_some() {
            fs::write(path, setting).unwrap();
        }
        let end = child::spawn(test, setting, |setting| {
            become_ordinary_user();
            let region = build(vec![7u8; 10_000].into()).unwrap();
            match setting {
                "0" => assert!(!region.serves_system_calls()),
                "1" => assert!(region.serves_system_calls()),
                _ => {}
            }
            if region.serves_system_calls() {
                // write(2) reads a page that no thread has touched.
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&region.as_slice()[4096..]).unwrap();
            }
            assert!(region.as_slice() == [7; 10_000]);
        })
        .wait();
        if let Some(before) = &before {
            fs::write(path, before.trim()).unwrap();
        }
        end.expect_pass();
    }
}

/// The mapped bytes of this process.
fn address_space() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_region_larger_than_the_address_space_is_refused() {
    for bytes in [1 << 50, u64::MAX - 4096, u64::MAX] {
        let error = build(Chunk::hole(bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    }
    assert_eq!(Region::builder().build(&Pool::new().unwrap()).unwrap_err().kind(), ErrorKind::NoChunks);
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "the sanitizer maps memory of its own, which does not fit the limit"
)]
fn a_region_is_served_and_dropped_at_max_map_count() {
    let test = this_test!();
    if allows_too_many_mappings(test) {
        return;
    }
    let end = child::run(test, || {
        let memfd = UnsealedMemfd::create("every", 3 * 4096).unwrap().seal().unwrap();
        let shown = pagestitch::source::Memfd::from(
            pagestitch_kernel::memfd::SealedMemfd::try_from(memfd.as_fd().try_clone_to_owned().unwrap())
                .unwrap(),
        );
        let pages = (0..50).map(|i| Chunk::from(shown.clone()).range(i % 2 * 8192..i % 2 * 8192 + 4096));
        let region =
            Region::builder().chunks(pages).chunk(vec![7u8; 100_000]).build(&Pool::new().unwrap()).unwrap();
        // Maps every other page of a large range, until the process has no mappings left.
        let pages = NonZeroUsize::new(2 * MAPPINGS_MAX).unwrap();
        let (_reservation, mut view) = View::reserve(pages, PageSize::system(), Access::ReadOnly).unwrap();
        let all = (0..MAPPINGS_MAX).all(|i| view.map(Page(i * 2).span(), &memfd, 0).is_ok());
        assert!(!all, "a mapping is left");
        assert_eq!(region.as_slice()[60 * 4096], 7);
        drop(region);
    });
    end.expect_pass();
}

/// The default number of shards depends on it.
#[test]
fn each_open_descriptor_is_one_less_that_is_left() {
    let end = child::run(this_test!(), || {
        let (most, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // The folder is open itself while its entries are counted.
        let open = || fs::read_dir("/proc/self/fd").unwrap().count() - 1;
        assert_eq!(descriptors_left() as u64, most - open() as u64);
        let opened: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        assert_eq!(descriptors_left() as u64, most - open() as u64);
        setrlimit(Resource::RLIMIT_NOFILE, open() as u64, hard).unwrap();
        assert_eq!(descriptors_left(), 0);
        drop(opened);
        assert_eq!(descriptors_left(), 20);
    });
    end.expect_pass();
}

#[test]
fn a_pool_name_with_a_nul_byte_is_an_error() {
    let error = Pool::builder().name("a\0b").start().unwrap_err();
    assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Name)));
}

#[test]
fn a_region_of_many_mapped_files_takes_few_descriptors() {
    let test = this_test!();
    let end = child::run(test, || {
        const FILES: usize = 300;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        if hard < 2 * FILES as u64 {
            return println!("SKIPPED: no more than {hard} descriptors are allowed here");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |number: usize| folder.path().join(number.to_string());
        (0..FILES).for_each(|number| fs::write(path(number), pattern(number as u64, 5000)).unwrap());
        // As by default, because programs with select(2) need a low soft limit.
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let mapped = (0..FILES).map(|number| SharedFile::open(path(number), Access::ReadOnly).unwrap());
        let builder =
            Region::builder().page_aligned().chunks(mapped).require_zero_copy().max_mappings(2 * FILES);
        let region = builder.build_shared(&Pool::new().unwrap()).unwrap();
        let open = fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(open < 64, "{open} descriptors are open");
        let mut seen = vec![0; 5000];
        for number in 0..FILES {
            region.read_at(region.offset_of(number).unwrap(), &mut seen).unwrap();
            assert!(seen == pattern(number as u64, 5000), "file {number}");
        }
        assert!(region.plan().to_string().contains(&format!("{}", path(7).display())), "{}", region.plan());
        let read: Vec<_> = (0..FILES).map(|number| FileSource::open(path(number)).unwrap()).collect();
        let expected: Vec<u8> = (0..FILES).flat_map(|number| pattern(number as u64, 5000)).collect();
        let region = Region::builder().chunks(read).build(&Pool::new().unwrap()).unwrap();
        assert!(region.as_slice() == expected);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    });
    end.expect_pass();
}
