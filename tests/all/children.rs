//! Forked children that inherit a region: each child has its own pages, filled from the same
//! sources.

use crate::machine::rounds;
use crate::{HANG, PAGE, SetOnDrop, cannot_inherit, discard, pattern, touch, until};
use nix::sys::signal::Signal;
use nix::unistd::getpid;
use pagestitch::{Chunk, Error, ErrorKind, Inline, Manual, Pool, Process, Readahead, Region, Source};
use pagestitch_kernel::fork_window::ForkWindow;
use pagestitch_kernel::uffd::RegisterMode;
use pagestitch_kernel::{Batch, PageSize, Uffd, View};
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test, wait};
use std::fs;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

/// A region that children inherit, or `None` where this process or this kernel cannot.
fn built(bytes: &[u8]) -> Option<Region> {
    let pool = Pool::builder().workers(2).start().unwrap();
    match Region::builder().chunk(bytes.to_vec()).readahead(Readahead::None).inherit_on_fork().build(&pool) {
        Ok(region) => Some(region),
        Err(error) => refused(&error),
    }
}

fn refused(error: &Error) -> Option<Region> {
    assert!(cannot_inherit(error), "{error}");
    None
}

fn forked(body: impl FnOnce() -> i32) -> ForkedChild {
    ForkedChild::start(body)
}

fn passes(child: ForkedChild) {
    let ended = child.wait();
    assert!(ended.success(), "{ended}");
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_forked_child_has_the_bytes_of_its_parent_in_pages_of_its_own() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(1, 500 * PAGE + 77);
        let Some(region) = built(&bytes) else { return };
        assert!(region.as_slice()[..100 * PAGE] == bytes[..100 * PAGE]);
        let child = forked(|| {
            let mut read = vec![0; 9 * PAGE];
            let done =
                region.read_at(300 * PAGE as u64, &mut read).is_ok() && read == bytes[300 * PAGE..309 * PAGE];
            i32::from(!done || region.as_slice() != bytes)
        });
        assert!(region.as_slice() == bytes);
        passes(child);
        until(|| region.metrics().children == 1);
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_write_of_the_parent_is_not_seen_by_its_child() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(2, 64 * PAGE);
        let builder = Region::builder().chunk(bytes.clone()).writable().inherit_on_fork();
        let mut region = match builder.build(&Pool::new().unwrap()) {
            Ok(region) => region,
            Err(error) => return drop(refused(&error)),
        };
        let (mut in_child, mut in_parent) = UnixStream::pair().unwrap();
        let child = forked(|| {
            in_child.read_exact(&mut [0]).unwrap();
            i32::from(region.as_slice() != bytes)
        });
        region.as_mut_slice().unwrap().fill(0xee);
        in_parent.write_all(&[1]).unwrap();
        passes(child);
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn grandchildren_are_served() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(3, 200 * PAGE);
        let Some(region) = built(&bytes) else { return };
        let right = |pages: std::ops::Range<usize>| {
            let range = pages.start * PAGE..pages.end * PAGE;
            region.as_slice()[range.clone()] == bytes[range]
        };
        let child = forked(|| {
            let before = right(0..50);
            let grandchild = forked(|| {
                let great = forked(|| i32::from(!right(0..200)));
                i32::from(!right(25..175) || !great.succeeds())
            });
            i32::from(!before || !right(50..200) || !grandchild.succeeds())
        });
        passes(child);
        assert!(right(0..200));
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn forks_beside_threads_that_fault_and_discard() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(4, 300 * PAGE);
        let Some(region) = built(&bytes) else { return };
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        let (before, done) = (descriptors(), AtomicBool::new(false));
        scope(|scope| {
            for first in 0..3 {
                let (region, bytes, done) = (&region, &bytes, &done);
                scope.spawn(move || {
                    let start = region.as_ptr().expose_provenance().get();
                    while !done.load(Ordering::SeqCst) {
                        discard(start + first * 100 * PAGE, 100 * PAGE);
                        assert!(region.as_slice() == bytes);
                    }
                });
            }
            for _ in 0..rounds(30) {
                passes(forked(|| i32::from(region.as_slice() != bytes)));
            }
            done.store(true, Ordering::SeqCst);
        });
        until(|| region.metrics().children == rounds(30));
        assert!(descriptors() < before + 5, "descriptors of ended children are closed");
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_whose_parent_drops_the_region_gets_a_signal_and_not_zeros() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(5, 300 * PAGE);
        let Some(region) = built(&bytes) else { return };
        let address = region.as_ptr().expose_provenance().get();
        assert_eq!(touch(address), bytes[0]);
        let (mut in_child, mut in_parent) = UnixStream::pair().unwrap();
        let child = forked(|| {
            if touch(address) != bytes[0] || touch(address + 7 * PAGE) != bytes[7 * PAGE] {
                return 1;
            }
            in_child.write_all(&[1]).unwrap();
            in_child.read_exact(&mut [0]).unwrap();
            // Filled pages stay, and unfilled pages are no zeros.
            if touch(address) != bytes[0] || touch(address + 7 * PAGE) != bytes[7 * PAGE] {
                return 2;
            }
            i32::from(touch(address + 200 * PAGE)) + 100
        });
        // The child has touched its pages.
        in_parent.read_exact(&mut [0]).unwrap();
        drop(region);
        in_parent.write_all(&[1]).unwrap();
        let ended = child.wait();
        assert_eq!(ended.signal(), Some(Signal::SIGBUS as i32), "{ended}");
    });
    end.expect_pass();
}

/// A fork meets the drop of a region at any moment: the child reads bytes or gets a signal, and no
/// thread hangs.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn forks_beside_regions_that_are_built_and_dropped() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(9, 40 * PAGE);
        if built(&bytes).is_none() {
            return;
        }
        let (address, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let region = built(&bytes).unwrap();
                    address.store(region.as_ptr().expose_provenance().get(), Ordering::SeqCst);
                    assert_eq!(region.as_slice()[3 * PAGE], bytes[3 * PAGE]);
                    address.store(0, Ordering::SeqCst);
                }
            });
            let _done = SetOnDrop(&done);
            for _ in 0..100 {
                let ended = forked(|| match address.load(Ordering::SeqCst) {
                    0 => 0,
                    start => i32::from(touch(start + 17 * PAGE) != bytes[17 * PAGE]),
                })
                .wait();
                let signals = [Signal::SIGBUS, Signal::SIGSEGV].map(|signal| Some(signal as i32));
                assert!(ended.success() || signals.contains(&ended.signal()), "{ended}");
            }
        });
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_that_waits_when_the_region_is_dropped_gets_a_signal() {
    let end = child::run(this_test!(), || {
        // A source that answers only at the end.
        let (hold, held) = (Arc::new(Barrier::new(2)), Arc::new(AtomicBool::new(false)));
        let source = Arc::new(Held(Arc::clone(&hold), Arc::clone(&held)));
        let builder =
            Region::builder().chunk(Chunk::source(source)).readahead(Readahead::None).inherit_on_fork();
        let region = match builder.build(&Pool::builder().workers(2).start().unwrap()) {
            Ok(region) => region,
            Err(error) => return drop(refused(&error)),
        };
        let address = region.as_ptr().expose_provenance().get();
        let (mut in_child, mut in_parent) = UnixStream::pair().unwrap();
        // The child waits for its source.
        let child = forked(|| {
            in_child.read_exact(&mut [0]).unwrap();
            i32::from(touch(address + PAGE)) + 100
        });
        in_parent.write_all(&[1]).unwrap();
        until(|| held.load(Ordering::SeqCst));
        scope(|scope| {
            let dropping = scope.spawn(move || drop(region));
            hold.wait();
            dropping.join().unwrap();
        });
        // The drop waited for the answer, which is an error.
        let ended = child.wait();
        assert_eq!(ended.signal(), Some(Signal::SIGBUS as i32), "{ended}");
    });
    end.expect_pass();
}

/// A source that waits and then fails.
struct Held(Arc<Barrier>, Arc<AtomicBool>);

impl Source for Held {
    fn size(&self) -> u64 {
        3 * PAGE as u64
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        self.1.store(true, Ordering::SeqCst);
        self.0.wait();
        Err(io::Error::other("too late"))
    }
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn descriptors_of_children_that_exec_are_closed() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(7, 100 * PAGE);
        let Some(region) = built(&bytes) else { return };
        let before = fs::read_dir("/proc/self/fd").unwrap().count();
        for _ in 0..20 {
            // A hook before exec makes the library call fork(2), whose child does not share memory,
            // instead of vfork(2).
            let mut command = Command::new("/proc/self/exe");
            assert!(with_fork(command.arg("--help").stdout(Stdio::null())).status().unwrap().success());
        }
        until(|| region.metrics().children == 20);
        assert!(fs::read_dir("/proc/self/fd").unwrap().count() < before + 5);
        assert!(region.as_slice() == bytes);
    });
    end.expect_pass();
}

#[expect(unsafe_code, reason = "a hook before exec is unsafe")]
fn with_fork(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: the hook does nothing.
    unsafe { command.pre_exec(|| Ok(())) }
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_without_a_free_descriptor_gets_a_signal_and_no_thread_hangs() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(8, 100 * PAGE);
        let Some(region) = built(&bytes) else { return };
        let taken: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
        assert!(taken.len() > 10);
        for _ in 0..3 {
            let ended = forked(|| i32::from(region.as_slice() != bytes)).wait();
            assert_eq!(ended.signal(), Some(Signal::SIGBUS as i32), "{ended}");
        }
        drop(taken);
        passes(forked(|| i32::from(region.as_slice() != bytes)));
        assert!(region.as_slice() == bytes);
    });
    end.expect_pass();
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn regions_that_children_cannot_inherit_are_refused_with_the_reason() {
    let bytes = vec![1u8; 10];
    let error =
        Region::builder().name("inline").chunk(bytes.clone()).inherit_on_fork().build(Inline).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsuitableServer);
    let manual = Manual::new().unwrap();
    let error = Region::builder().chunk(bytes).inherit_on_fork().build(&manual).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsuitableServer);
    // Donated pages are moved in when the region is built.
    let mut pages = pagestitch::source::Pages::new(3 * PAGE).unwrap();
    pages.fill(7);
    match Region::builder().chunk(Chunk::from(pages)).inherit_on_fork().build(&Pool::new().unwrap()) {
        Ok(region) => {
            assert_eq!(region.metrics().pages_in_place, 3);
            passes(forked(|| i32::from(region.as_slice() != [7; 3 * PAGE])));
        }
        Err(error) => drop(refused(&error)),
    }
}

/// Starts a process that builds a region and forks a child, and kills the process. The child writes
/// the answer of `body` once its parent has ended. Returns the pid of the child, or `None` where
/// children cannot inherit regions.
fn orphan(test: &str, folder: &Path, body: impl FnOnce(&Region) -> String) -> Option<i32> {
    let mut parent = child::spawn(test, folder.to_str().unwrap(), |folder| {
        let note = |name: &str, text: &str| note(folder, name, text);
        let Some(region) = built(&pattern(7, 64 * PAGE)) else { return note("skipped", "") };
        assert_ne!(region.as_slice()[0], 0);
        let child = forked(|| {
            note("child", &getpid().to_string());
            until(|| Path::new(folder).join("ended").exists());
            note("touches", "");
            note("said", &body(&region));
            0
        });
        passes(child);
    });
    until(|| ["child", "skipped"].iter().any(|name| folder.join(name).exists()));
    let child = fs::read_to_string(folder.join("child")).ok();
    if child.is_some() {
        // Not the parent of its child, because that changes before the process has ended.
        let process = Process::open(parent.id()).unwrap();
        parent.kill();
        assert!(wait::readable(&process, HANG));
        fs::write(folder.join("ended"), "").unwrap();
    } else {
        println!("SKIPPED {test}: children cannot be served here");
    }
    // No wait for the end of the process, because the child holds its output open too.
    Some(child?.parse().unwrap())
}

/// True if a process waits in a page fault.
fn waits_for_a_page(process: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}")).unwrap_or_default();
    // No event reports that a thread waits in a fault, and `/proc` may hide the wait channel. A process that stays
    // asleep for 20 looks waits in a fault, because it waits for nothing else.
    (0..20).all(|_| {
        thread::sleep(Duration::from_millis(1));
        read("stat").contains(") S ") && ["handle_userfault", "0", ""].contains(&read("wchan").as_str())
    })
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_of_a_killed_parent_waits_and_reads_no_zeros() {
    let test = this_test!();
    let folder = tempfile::tempdir().unwrap();
    let touches = |region: &Region| touch(region.as_ptr().addr().get() + 30 * PAGE).to_string();
    let Some(process) = orphan(test, folder.path(), touches) else { return };
    until(|| folder.path().join("touches").exists());
    until(|| folder.path().join("said").exists() || waits_for_a_page(process));
    let said = fs::read_to_string(folder.path().join("said")).ok();
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), Signal::SIGKILL);
    assert_eq!(said, None, "a byte of {} was expected", pattern(7, 64 * PAGE)[30 * PAGE]);
}

/// Writes a file of a folder at once.
fn note(folder: &str, name: &str, text: &str) {
    let path = Path::new(folder).join(name);
    fs::write(path.with_extension("new"), text).unwrap();
    fs::rename(path.with_extension("new"), path).unwrap();
}

/// As a daemon: a child that closes the descriptors that it does not know, and forks.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn grandchildren_of_a_child_that_closes_descriptors_are_served() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(9, 8 * PAGE);
        let Some(region) = built(&bytes) else { return };
        for _ in 0..rounds(300) {
            passes(forked(|| {
                (3..200).for_each(|fd| {
                    let _ = nix::unistd::close(fd);
                });
                let grandchild = forked(|| i32::from(region.as_slice() != bytes));
                i32::from(!grandchild.wait().success())
            }));
        }
    });
    end.expect_pass();
}

/// True if a process has ended: it is gone, or a zombie.
fn has_ended(process: i32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// The kernel lets a child run once its event is read, and the thread that has read the event may not have
/// kept the child's userfaultfd open yet.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_that_kills_its_parent_at_once_reads_no_zeros() {
    let (test, bytes) = (this_test!(), pattern(7, 64 * PAGE));
    let (mut waiting, mut signalled) = (0, 0);
    for _ in 0..rounds(100) {
        let folder = tempfile::tempdir().unwrap();
        let parent = child::spawn(test, folder.path().to_str().unwrap(), |folder| {
            let note = |name: &str, text: &str| note(folder, name, text);
            let Some(region) = built(&bytes) else { return note("skipped", "") };
            let server = Process::open(std::process::id()).unwrap();
            passes(forked(|| {
                server.kill().unwrap();
                note("child", &getpid().to_string());
                until(|| server.has_ended());
                note("touches", "");
                note("said", &touch(region.as_ptr().addr().get() + 30 * PAGE).to_string());
                0
            }));
        });
        let noted = |name: &str| folder.path().join(name).exists();
        until(|| noted("touches") || noted("skipped"));
        if noted("skipped") {
            return println!("SKIPPED {test}: children cannot be served here");
        }
        let child: i32 = fs::read_to_string(folder.path().join("child")).unwrap().parse().unwrap();
        until(|| noted("said") || has_ended(child) || waits_for_a_page(child));
        let said = fs::read_to_string(folder.path().join("said")).ok();
        *(if has_ended(child) { &mut signalled } else { &mut waiting }) += 1;
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), Signal::SIGKILL);
        assert_eq!(said, None, "a byte of {} was expected", bytes[30 * PAGE]);
        drop(parent);
    }
    println!("{waiting} children waited, and {signalled} got a signal");
}

/// As above, with a server that always ends between the two steps.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn a_child_whose_server_ends_before_it_keeps_the_userfaultfd_gets_a_signal() {
    let test = this_test!();
    for inside in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let server = child::spawn(test, &format!("{inside} {}", folder.path().display()), |argument| {
            let (inside, folder) = argument.split_once(' ').unwrap();
            serve_until_a_fork(inside == "true", |name, text| note(folder, name, text));
        });
        let noted = |name: &str| folder.path().join(name).exists();
        until(|| noted("child") || noted("skipped"));
        if noted("skipped") {
            return println!("SKIPPED {test}: EVENT_FORK takes CAP_SYS_PTRACE");
        }
        let child = fs::read_to_string(folder.path().join("child")).unwrap().parse().unwrap();
        until(|| noted("said") || has_ended(child));
        let said = fs::read_to_string(folder.path().join("said")).ok();
        // The kernel gives zeros to a child that nothing holds back.
        assert_eq!(said.as_deref(), (!inside).then_some("0"), "inside: {inside}");
        drop(server);
    }
}

/// Forks a child, and kills this process when the child's event is read: while the child waits, or after.
fn serve_until_a_fork(inside: bool, note: impl Fn(&str, &str)) {
    let page = PageSize::system();
    let Ok(uffd) = Uffd::open(pagestitch_kernel::Features::EVENT_FORK) else { return note("skipped", "") };
    let (range, _view) = View::reserve(NonZeroUsize::MIN, page, pagestitch_kernel::Access::Writable).unwrap();
    uffd.register(&range, RegisterMode::MISSING).unwrap();
    let this = Process::open(std::process::id()).unwrap();
    let window = Arc::new(ForkWindow::new(Some(Process::open(this.pid()).unwrap().into_fd())).unwrap());
    range.inherit_on_fork(Arc::clone(&window)).unwrap();
    // The C library holds its allocator during the fork.
    let (mut batch, [begins, returned]) = (Batch::with_capacity(4), [2, 2].map(Barrier::new));
    scope(|scope| {
        scope.spawn(|| {
            begins.wait();
            loop {
                let in_window = window.enter();
                batch.read(&uffd, page).unwrap();
                let has_forked = !batch.is_empty();
                let in_window = Some(in_window).filter(|_| inside);
                if has_forked {
                    // Killed before fork(2) returns, a process has no child.
                    returned.wait();
                    this.kill().unwrap();
                }
                drop(in_window);
            }
        });
        begins.wait();
        let child = forked(|| {
            note("child", &getpid().to_string());
            until(|| this.has_ended());
            note("said", &touch(range.range().start()).to_string());
            0
        });
        returned.wait();
        passes(child);
    });
}

#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn read_at_and_populate_in_a_child_of_a_killed_parent_are_errors() {
    let test = this_test!();
    let folder = tempfile::tempdir().unwrap();
    let asks = |region: &Region| {
        let mut read = [0];
        let first = region.read_at(0, &mut read).map(|()| read[0]);
        format!(
            "{first:?} {:?}",
            region.populate(30 * PAGE as u64..40 * PAGE as u64).map_err(|error| error.kind())
        )
    };
    if orphan(test, folder.path(), asks).is_none() {
        return;
    }
    until(|| folder.path().join("said").exists());
    let said = fs::read_to_string(folder.path().join("said")).unwrap();
    let first = pattern(7, PAGE)[0];
    assert_eq!(said, format!("Ok({first}) Err({:?})", ErrorKind::ServerStopped));
}

/// Descriptors of ended children are closed, and those of many live children are kept.
#[test]
#[cfg_attr(
    sanitized = "thread",
    ignore = "fork(2) waits for a thread that waits for the sanitizer, which waits for fork(2)"
)]
fn more_children_than_fit_into_one_socket_are_served() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(8, 8 * PAGE);
        let Some(region) = built(&bytes) else { return };
        // One after the other, so that no descriptor may be left behind.
        for _ in 0..rounds(300) {
            passes(forked(|| i32::from(region.as_slice() != bytes)));
        }
        let (receiver, sender) = nix::unistd::pipe().unwrap();
        let all: Vec<_> = (0..200)
            .map(|_| {
                forked(|| {
                    let _ = nix::unistd::read(&receiver, &mut [0]);
                    i32::from(region.as_slice() != bytes)
                })
            })
            .collect();
        nix::unistd::write(&sender, &[1; 200]).unwrap();
        all.into_iter().for_each(passes);
    });
    end.expect_pass();
}
