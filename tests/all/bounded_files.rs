//! Files under regions with a budget that become shorter or whose disk is full: no page reads as other bytes, and no
//! written page is lost.

use crate::bounded_writes::{BUDGET, PAGES, builder, moves_no_pages, pool, word};
use crate::inline_writes::{file, word_of};
use crate::waits::until;
use crate::{PAGE, SIGBUS, pattern, reason, touch};
use nix::libc::ENOSPC;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pagestitch::source::{FailureReason, FileSource, WritableFile};
use pagestitch::{AnyRegion, Budget, Chunk, ErrorKind, Inline, Region, Server};
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const LAST: usize = PAGES - 1;
/// More than the budget.
const OTHERS: usize = 2_000;

/// The number of bytes before a page.
const fn before(page: usize) -> u64 {
    (page * PAGE) as u64
}

#[test]
fn a_written_page_of_a_truncated_file_stays_in_memory_and_the_file_stays_as_short() {
    if moves_no_pages() {
        return;
    }
    for end in [before(LAST), before(LAST) + 100] {
        let (budget, (file, chunk)) = (Budget::bytes(BUDGET).unwrap(), file(&vec![0; PAGES * PAGE]));
        let told = Arc::new(Mutex::new(None));
        let tell = Arc::clone(&told);
        let builder = builder(&budget, chunk).on_page_failure(move |offset, failure| {
            tell.lock().unwrap().get_or_insert((offset, failure.reason()));
        });
        let region = builder.build_shared(&pool(1)).unwrap();
        region.write_at(before(LAST), &[7; PAGE]).unwrap();
        file.set_len(end).unwrap();
        // The page has to leave, because others need its room.
        until(|| {
            (0..OTHERS).for_each(|page| assert_eq!(word(&region, page).load(Ordering::Relaxed), 0));
            told.lock().unwrap().is_some()
        });
        assert_eq!(*told.lock().unwrap(), Some((before(LAST), FailureReason::Truncated)));
        let error = region.flush(..).unwrap_err();
        assert_eq!((error.kind(), reason(&error)), (ErrorKind::SourceFailed, FailureReason::Truncated));
        let mut bytes = [0; PAGE];
        region.read_at(before(LAST), &mut bytes).unwrap();
        assert!(bytes == [7; PAGE]);
        assert_eq!((file.metadata().unwrap().len(), budget.metrics().dirty_bytes), (end, PAGE as u64));
        file.set_len(before(PAGES)).unwrap();
        region.flush(..).unwrap();
        file.read_exact_at(&mut bytes, before(LAST)).unwrap();
        assert!(bytes == [7; PAGE]);
        assert_eq!(budget.metrics().dirty_bytes, 0);
    }
}

/// Has a page leave, and so many before it that the standby list has it no more.
fn leave(region: &AnyRegion, page: usize) {
    // A page whose fill has not ended stays.
    until(|| region.evict(before(page)..before(page + 1)).unwrap() > 0);
    for others in [0..page / 2, page / 2..page] {
        let others = before(others.start)..before(others.end);
        region.populate(others.clone()).unwrap();
        region.evict(others).unwrap();
    }
}

/// The page had its bytes, and comes back from its file.
#[test]
fn a_page_that_has_left_before_its_file_was_truncated_is_a_signal_and_never_zeros() {
    /// More than the standby list has, twice.
    const LAST: usize = 2 * (BUDGET as usize / PAGE / 6);
    let body = child::body(this_test!(), |case| {
        let [kind, end, first] = case.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let bytes = pattern(8, (LAST + 1) * PAGE);
        let file = File::from(memfd_create("file", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&bytes, 0).unwrap();
        let source = FileSource::try_from(file.try_clone().unwrap()).unwrap();
        let (pool, budget) = (pool(1), Budget::bytes(BUDGET).unwrap());
        let builder = Region::builder().chunk(source).budget(&budget);
        let (address, region): (_, Box<dyn Deref<Target = AnyRegion>>) = match kind {
            "slices" => {
                let region = builder.build(&pool).unwrap();
                (region.as_ptr().addr().get(), Box::new(region))
            }
            _ => {
                let server = if kind == "inline" { Server::from(Inline) } else { Server::from(&pool) };
                let region = builder.build_shared(server).unwrap();
                (region.as_ptr().addr().get(), Box::new(region))
            }
        };
        let [first_page, last_page] = [address, address + LAST * PAGE];
        assert_eq!(touch(last_page), bytes[LAST * PAGE]);
        leave(&region, LAST);
        file.set_len(before(LAST) + end.parse::<u64>().unwrap()).unwrap();
        if first == "call" {
            for _ in 0..2 {
                let error = region.populate(before(LAST)..).unwrap_err();
                assert_eq!(
                    (error.kind(), reason(&error)),
                    (ErrorKind::SourceFailed, FailureReason::Truncated)
                );
            }
        }
        assert_eq!(touch(first_page), bytes[0]);
        println!("the page cannot come back");
        println!("read {}", touch(last_page));
    });
    for kind in ["slices", "shared", "inline"] {
        for case in ["0 call", "100 touch"] {
            let ended = body.spawn(format!("{kind} {case}")).wait();
            let output = ended.output();
            assert_eq!(ended.signal(), Some(SIGBUS), "{kind} {case}: {output}");
            assert!(output.contains("the page cannot come back"), "{output}");
        }
    }
}

/// Mounts a tmpfs that this process alone sees, until it ends. Prints a line and returns `None` where that is not
/// permitted.
fn small_disk(test: &str, folder: &Path, mebibytes: usize) -> Option<()> {
    let mounted = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let options = format!("size={mebibytes}m");
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
    });
    let refused = |errno| println!("SKIPPED {test}: no file system can be mounted here ({errno})");
    mounted.map_err(refused).ok()
}

#[test]
fn a_flush_to_a_full_disk_is_an_error_and_loses_no_page() {
    let test = this_test!();
    let folder = tempfile::tempdir().unwrap();
    let body = child::body(test, |folder| {
        let folder = Path::new(folder);
        if moves_no_pages() || small_disk(test, folder, 14).is_none() {
            return;
        }
        for server in [Server::from(&pool(2)), Server::from(Inline)] {
            flush_to_a_full_disk(folder, server);
        }
    });
    let end = body.spawn(folder.path()).wait();
    end.expect_pass();
    // The line begins with the name of the test.
    let output = end.output();
    output
        .find("SKIPPED")
        .and_then(|at| output[at..].lines().next())
        .into_iter()
        .for_each(|line| println!("{line}"));
}

/// The disk has room for two thirds of the written pages, until the other file goes.
fn flush_to_a_full_disk(folder: &Path, server: Server) {
    const WRITTEN: usize = (12 << 20) / PAGE;
    let (path, other) = (folder.join("file"), folder.join("other"));
    File::create(&path).unwrap().set_len(before(PAGES)).unwrap();
    fs::write(&other, vec![1; 6 << 20]).unwrap();
    let budget = Budget::bytes(BUDGET).unwrap();
    let source = WritableFile::open(&path).unwrap();
    let region = builder(&budget, Chunk::writable(Arc::new(source))).build_shared(server).unwrap();
    let value = |page: usize| if page < WRITTEN { page as u64 + 1 } else { 0 };
    (0..WRITTEN).for_each(|page| word(&region, page).store(value(page), Ordering::Relaxed));
    let error = region.flush(..).unwrap_err();
    assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::SourceFailed, Some(ENOSPC)));
    (0..WRITTEN).for_each(|page| assert_eq!(word(&region, page).load(Ordering::Relaxed), value(page)));
    assert_eq!(region.flush(..).unwrap_err().raw_os_error(), Some(ENOSPC));
    let metrics = budget.metrics();
    assert!(metrics.dirty_bytes >= 3 << 20 && metrics.resident_bytes <= BUDGET, "{metrics:?}");
    fs::remove_file(&other).unwrap();
    region.flush(..).unwrap();
    assert_eq!(budget.metrics().dirty_bytes, 0);
    let file = File::open(&path).unwrap();
    (0..PAGES).for_each(|page| assert_eq!(word_of(&file, page), value(page)));
    region.finish().unwrap();
    fs::remove_file(&path).unwrap();
}
