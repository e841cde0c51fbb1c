//! What the process may not do is one clear line: no userfaultfd, no address space, no descriptors.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::{Chunk, Error, ErrorKind, Pool, Region, Support};
use pagestitch_kernel::memfd::UnsealedMemfd;
use pagestitch_kernel::{Access, Page, PageSize, Reservation};
use pagestitch_testkit::child;
use pagestitch_testkit::deny::deny_userfaultfd;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;

fn build(chunk: Chunk) -> Result<Region, Error> {
    Region::builder().name("limited").chunk(chunk).build(&Pool::builder().workers(1).start()?)
}

#[test]
fn without_userfaultfd_the_error_names_the_remedy() {
    let end = child::run("limits::without_userfaultfd_the_error_names_the_remedy", || {
        deny_userfaultfd();
        let error = build(vec![1u8].into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoUserfaultfd);
        let said = error.to_string();
        assert!(said.starts_with("region limited: no userfaultfd: the system call answers EPERM"), "{said}");
        assert!(said.contains("let the container's seccomp profile pass userfaultfd"), "{said}");
        let support = Support::probe();
        assert!(support.features().is_err());
        let no = |verdict| matches!(verdict, pagestitch_kernel::support::Verdict::No { .. });
        assert!(support.capabilities().into_iter().all(|capability| no(capability.verdict)));
    });
    end.expect_pass();
}

#[test]
fn a_region_past_rlimit_as_is_refused_by_name() {
    let end = child::run("limits::a_region_past_rlimit_as_is_refused_by_name", || {
        setrlimit(Resource::RLIMIT_AS, 1 << 32, 1 << 32).unwrap();
        let error = build(Chunk::hole(1 << 33)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
        let said = error.to_string();
        assert!(
            said.contains("cannot reserve 8589934592 bytes") && said.contains("4294967296 (RLIMIT_AS)"),
            "{said}"
        );
        assert_eq!(build(vec![7u8; 10].into()).unwrap().as_slice(), [7; 10], "a small one still goes");
    });
    end.expect_pass();
}

#[test]
fn running_out_of_descriptors_is_an_error_at_whichever_step() {
    let end = child::run("limits::running_out_of_descriptors_is_an_error_at_whichever_step", || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let mut refused = 0;
        for limit in 3..40 {
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
            match build(vec![7u8; 10].into()) {
                Ok(region) => assert_eq!(region.as_slice(), [7; 10]),
                Err(error) => {
                    refused += 1;
                    let said = error.to_string();
                    assert!(said.contains("EMFILE") && said.contains("ulimit -n"), "{limit}: {said}");
                }
            }
        }
        assert!(refused > 2, "the limits were met");
    });
    end.expect_pass();
}

#[test]
fn more_bytes_than_addresses_is_refused() {
    for bytes in [1 << 50, u64::MAX - 4096, u64::MAX] {
        let error = build(Chunk::hole(bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    }
    assert_eq!(Region::builder().build(&Pool::new().unwrap()).unwrap_err().kind(), ErrorKind::NoChunks);
}

#[test]
fn a_region_is_served_and_dropped_when_there_are_no_mappings_left() {
    let end = child::run("limits::a_region_is_served_and_dropped_when_there_are_no_mappings_left", || {
        let memfd = UnsealedMemfd::create("every", 3 * 4096).unwrap().seal().unwrap();
        let shown = pagestitch::source::Memfd::from(
            pagestitch_kernel::memfd::SealedMemfd::try_from(memfd.as_fd().try_clone_to_owned().unwrap())
                .unwrap(),
        );
        let pages = (0..50).map(|i| Chunk::from(shown.clone()).range(i % 2 * 8192..i % 2 * 8192 + 4096));
        let region =
            Region::builder().chunks(pages).chunk(vec![7u8; 100_000]).build(&Pool::new().unwrap()).unwrap();
        // Every other page of a large range, until the kernel has no mappings left for this process.
        let pages = NonZeroUsize::new(200_000).unwrap();
        let (_reservation, mut view) = Reservation::new(pages, PageSize::system(), Access::ReadOnly).unwrap();
        let mapped = (0..100_000).take_while(|i| view.map(Page(i * 2).span(), &memfd, 0).is_ok()).count();
        assert!(mapped < 100_000, "vm.max_map_count is larger than this test thought of");
        assert_eq!(region.as_slice()[60 * 4096], 7);
        drop(region);
    });
    end.expect_pass();
}
