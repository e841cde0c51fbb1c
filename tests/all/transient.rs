//! Answers of the kernel that may differ in a moment (no descriptor or memory is left). Each is an error
//! of the call that meets it, and no later call counts it as an ability that the kernel lacks.

use crate::{PAGE, own_memory};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pagestitch::{ErrorKind, Pool, Region, Support, best_server};
use pagestitch_firecracker::{Error, Handler, Snapshot};
use pagestitch_kernel::capabilities::Verdict;
use pagestitch_kernel::uffd::{AdoptError, FaultMode};
use pagestitch_kernel::{Errno, Features, Uffd, fd_passing};
use pagestitch_testkit::deny::{
    deny_copies, deny_kernel_faults, deny_memfds, deny_pidfds, deny_userfaultfd, deny_userfaultfd_call,
};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

/// Calls `act` while no descriptor is free.
pub(crate) fn without_descriptors<R>(act: impl FnOnce() -> R) -> R {
    with_descriptors(0, act)
}

/// Calls `act` while `free` descriptors are free.
fn with_descriptors<R>(free: u64, act: impl FnOnce() -> R) -> R {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let any = File::open("/dev/null").unwrap();
    // The kernel gives the lowest number, so all others below it are taken.
    setrlimit(Resource::RLIMIT_NOFILE, any.as_raw_fd() as u64 + 1 + free, hard).unwrap();
    let result = act();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
}

/// Calls `act` in a thread to which `deny` has denied system calls. The other threads may make them.
fn where_denied<R: Send>(deny: impl FnOnce() + Send, act: impl FnOnce() -> R + Send) -> R {
    let denied = || {
        deny();
        act()
    };
    thread::scope(|scope| scope.spawn(denied).join().unwrap())
}

#[test]
fn a_lack_of_descriptors_for_the_fallback_of_a_copy_is_no_refusal() {
    let end = child::run(this_test!(), || {
        let region = Region::builder().chunk(vec![1u8; PAGE]).writable();
        let region = region.build_shared(&Pool::new().unwrap()).unwrap();
        region.populate(..).unwrap();
        where_denied(
            || deny_copies(Errno::EPERM),
            || {
                let answers = without_descriptors(|| [region.write_at(0, &[2]), region.read_at(0, &mut [0])]);
                for error in answers.map(Result::unwrap_err) {
                    assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
                }
                region.write_at(0, &[2]).unwrap();
            },
        );
    });
    end.expect_pass();
}

/// A userfaultfd of this process that this library has not opened, so that it knows no answer of the
/// kernel yet.
fn opened_elsewhere() -> OwnedFd {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: userfaultfd(2) takes flags by value and touches no memory.
    #[expect(unsafe_code, reason = "the program opens a userfaultfd")]
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
    #[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // The version, the features, and the operations that the kernel writes.
    let mut handshake = [0xaa_u64, 0, 0];
    // SAFETY: the kernel reads and writes three words.
    #[expect(unsafe_code, reason = "the program makes the handshake")]
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, handshake.as_mut_ptr()) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
    fd
}

/// `UFFD_USER_MODE_ONLY`, which any user may open.
const USER_MODE_ONLY: i32 = 1;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;

/// True where this process opens userfaultfds through the device, so that it needs no system call.
fn has_device() -> bool {
    let has = File::options().read(true).write(true).open("/dev/userfaultfd").is_ok();
    if !has {
        println!("SKIPPED: /dev/userfaultfd is missing, or closed to this user");
    }
    has
}

#[test]
fn a_lack_of_descriptors_at_the_first_adoption_is_forgotten_when_there_are_some() {
    let end = child::run(this_test!(), || {
        let own = opened_elsewhere();
        let again = || own.try_clone().unwrap();
        let fd = again();
        let refused = without_descriptors(|| Uffd::adopt(fd).unwrap_err());
        assert_eq!(refused, AdoptError::Refused(Errno::EMFILE));
        assert_eq!(Uffd::adopt(again()).unwrap_err(), AdoptError::OwnMemory);
    });
    end.expect_pass();
}

/// Without memfds, only the answer to a move tells the memory of this process, since Linux 6.9.
#[test]
fn a_lack_of_descriptors_at_the_first_adoption_does_not_hide_the_answer_to_a_move() {
    let answer = |case| {
        let end = child::spawn(this_test!(), case, |case| {
            if !has_device() {
                return;
            }
            let own = opened_elsewhere();
            deny_userfaultfd_call(Errno::EPERM);
            deny_memfds(Errno::ENOSYS);
            let again = || own.try_clone().unwrap();
            if case == "lack" {
                let fd = again();
                let refused = without_descriptors(|| Uffd::adopt(fd).unwrap_err());
                assert_eq!(refused, AdoptError::Refused(Errno::EMFILE));
            }
            println!("answer: {:?}", Uffd::adopt(again()).unwrap_err());
        });
        let end = end.wait();
        end.expect_pass();
        end.output().lines().find_map(|line| line.strip_prefix("answer: ").map(String::from))
    };
    assert_eq!(answer("lack"), answer("none"));
}

/// The first adoption needs only a part of the answers. The preparation asks for the others, too.
#[test]
fn a_preparation_that_cannot_ask_for_the_features_is_refused_and_tries_again() {
    let end = child::run(this_test!(), || {
        let own = opened_elsewhere();
        let again = || own.try_clone().unwrap();
        // The answer to a move takes no memfd. Other answers ask for the features already.
        let answer = where_denied(|| deny_memfds(Errno::ENOSYS), || Uffd::adopt(again()).unwrap_err());
        if answer != AdoptError::OwnMemory {
            assert_eq!(answer, AdoptError::Refused(Errno::ENOSYS));
            return println!("SKIPPED: a move does not tell the memory of this process");
        }
        let refused = where_denied(|| deny_userfaultfd(Errno::ENOMEM), Uffd::prepare_adoption);
        assert_eq!(refused, Err(Errno::ENOMEM));
        Uffd::prepare_adoption().unwrap();
        let fd = again();
        assert_eq!(without_descriptors(|| Uffd::adopt(fd).unwrap_err()), AdoptError::OwnMemory);
    });
    end.expect_pass();
}

/// A process that may open a userfaultfd, and one that may not.
#[test]
fn a_prepared_adoption_takes_no_descriptor() {
    for case in ["allowed", "denied"] {
        let end = child::spawn(this_test!(), case, |case| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let other = ForkedChild::start(|| {
                fd_passing::send(&theirs, &[0], &[opened_elsewhere().as_fd()]).unwrap();
                i32::from((&theirs).read(&mut [0]).unwrap() != 1)
            });
            drop(theirs);
            let fd = fd_passing::receive(&ours, &mut [0]).unwrap().1.pop().unwrap();
            if case == "denied" {
                deny_userfaultfd(Errno::EPERM);
            }
            Uffd::prepare_adoption().unwrap();
            let adopted = without_descriptors(|| Uffd::adopt(fd)).unwrap();
            let known = case == "denied" || adopted.features() == Support::current().features().unwrap();
            assert!(known, "{:?}", adopted.features());
            (&ours).write_all(&[0]).unwrap();
            assert!(other.succeeds());
        });
        end.wait().expect_pass();
    }
}

#[test]
fn an_adoption_that_a_forked_child_has_prepared_takes_no_descriptor() {
    let end = child::run(this_test!(), || {
        let refused = || {
            let own = opened_elsewhere();
            Uffd::prepare_adoption().unwrap();
            assert_eq!(without_descriptors(|| Uffd::adopt(own).unwrap_err()), AdoptError::OwnMemory);
        };
        refused();
        let child = ForkedChild::start(|| {
            refused();
            let grandchild = ForkedChild::start(|| {
                refused();
                0
            });
            i32::from(!grandchild.succeeds())
        });
        assert!(child.succeeds());
    });
    end.expect_pass();
}

#[test]
fn a_lack_of_descriptors_is_an_error_of_the_best_server_and_not_a_reason_for_eager() {
    let end = child::run(this_test!(), || {
        if !has_device() {
            return;
        }
        deny_userfaultfd_call(Errno::EPERM);
        let error = without_descriptors(|| best_server().unwrap_err());
        assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
        assert_eq!(error.raw_os_error(), Some(Errno::EMFILE.raw()), "{error}");
        let server = best_server().unwrap();
        assert!(server.pool().is_some(), "{server}");
    });
    end.expect_pass();
}

/// The device makes a userfaultfd of all faults, and takes one more descriptor than the system call.
#[test]
fn a_lack_of_descriptors_does_not_leave_a_region_without_the_faults_of_system_calls() {
    let end = child::run(this_test!(), || {
        if !has_device() {
            return;
        }
        deny_kernel_faults(Errno::EPERM);
        assert_eq!(Uffd::open(Features::NONE).unwrap().mode(), FaultMode::All);
        let error = with_descriptors(1, || Uffd::open(Features::NONE).unwrap_err());
        assert_eq!((error.device, error.system_call), (Errno::EMFILE, Errno::EPERM));
        assert_eq!(error.transient(), Some(Errno::EMFILE));
    });
    end.expect_pass();
}

#[test]
fn the_abilities_of_a_process_without_descriptors_are_probed_again() {
    let end = child::run(this_test!(), || {
        without_descriptors(|| assert!(Support::current().features().is_err()));
        assert!(Support::current().features().is_ok());
    });
    end.expect_pass();
}

#[test]
fn a_lack_of_descriptors_does_not_hide_the_events_of_forks() {
    let end = child::run(this_test!(), || {
        let forks = |support: &Support| {
            let all = support.capabilities();
            all.into_iter().find(|row| row.name == "EVENT_FORK").unwrap().verdict == Verdict::Yes
        };
        let expected = forks(&Support::probe());
        let probed = (0..8).map(|free| with_descriptors(free, Support::probe));
        let probed: Vec<_> = probed.filter(|support| support.features().is_ok()).collect();
        assert!(!probed.is_empty());
        assert!(probed.iter().all(|support| forks(support) == expected));
    });
    end.expect_pass();
}

#[test]
fn a_region_whose_children_cannot_learn_the_end_of_its_server_for_now_is_not_built() {
    let end = child::run(this_test!(), || {
        let build = || {
            let builder = Region::builder().chunk(vec![7; PAGE]).inherit_on_fork();
            builder.build(&Pool::new().unwrap())
        };
        if let Err(error) = build() {
            println!("SKIPPED: {error}");
            return;
        }
        for (errno, kind) in
            [(Errno::ENOMEM, ErrorKind::OutOfMemory), (Errno::EMFILE, ErrorKind::LimitReached)]
        {
            let error = where_denied(|| deny_pidfds(errno), || build().unwrap_err());
            assert_eq!((error.kind(), error.raw_os_error()), (kind, Some(errno.raw())), "{error}");
        }
        // A kernel or a container without the call.
        for errno in [Errno::ENOSYS, Errno::EPERM] {
            let region = where_denied(|| deny_pidfds(errno), || build().unwrap());
            assert_eq!(region.as_slice(), [7; PAGE]);
        }
    });
    end.expect_pass();
}

fn handler(folder: &Path) -> Result<Handler, Error> {
    let base = folder.join("base");
    fs::write(&base, [7; PAGE]).unwrap();
    Handler::builder(Snapshot::open([&base]).unwrap()).own_memory(own_memory()).bind(folder.join("socket"))
}

/// A host that refuses executable memfds (`vm.memfd_noexec`), for one.
#[test]
fn a_handler_starts_where_an_adoption_cannot_be_prepared() {
    let end = child::run(this_test!(), || {
        let folder = tempfile::tempdir().unwrap();
        let refused = where_denied(|| deny_memfds(Errno::EACCES), Uffd::prepare_adoption);
        assert_eq!(refused, Err(Errno::EACCES));
        where_denied(|| deny_memfds(Errno::EACCES), || handler(folder.path()).unwrap());
    });
    end.expect_pass();
}

#[test]
fn a_handler_does_not_start_while_the_kernel_cannot_be_asked() {
    let end = child::run(this_test!(), || {
        let folder = tempfile::tempdir().unwrap();
        let denials: [fn(Errno); 2] = [deny_userfaultfd, deny_memfds];
        for deny in denials {
            let error = where_denied(|| deny(Errno::ENOMEM), || handler(folder.path()).unwrap_err());
            let Error::Poll(error) = error else { panic!("{error}") };
            assert_eq!(error.raw_os_error(), Some(Errno::ENOMEM.raw()));
        }
        handler(folder.path()).unwrap();
    });
    end.expect_pass();
}
