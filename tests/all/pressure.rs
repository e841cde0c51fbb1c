//! A budget that is a share of a cgroup's memory gives some of it up while the kernel reports memory pressure.

use crate::{PAGE, pattern};
use pagestitch::source::Memory;
use pagestitch::{Budget, Chunk, Pool, Region};
use pagestitch_kernel::pressure::PressureTrigger;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process;

/// A memory cgroup of version 1 or 2, removed when it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> io::Result<Self> {
        let (first, second) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (parent, limit) =
            if first.is_dir() { (first, "memory.limit_in_bytes") } else { (second, "memory.max") };
        let cgroup = Self(parent.join(format!("pagestitch-pressure-{}", process::id())));
        fs::create_dir(&cgroup.0)?;
        fs::write(cgroup.0.join(limit), bytes.to_string())?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
#[cfg_attr(sanitized, ignore = "memory of the sanitizer takes the whole cgroup")]
fn a_share_of_a_cgroup_gives_memory_up_under_pressure() {
    let body = child::body(this_test!(), |folder| {
        let folder = Path::new(folder);
        if let Err(error) = fs::write(folder.join("cgroup.procs"), process::id().to_string()) {
            return println!("SKIPPED in part: the cgroup takes no process: {error}");
        }
        let budget = Budget::share_of_cgroup(0.5).unwrap();
        assert_eq!(budget.limit(), LIMIT / 2, "the limit of this process's cgroup");
        let pool = Pool::builder().workers(1).start().unwrap();
        let (part, parts) = (pattern(3, 1 << 20), LIMIT as usize >> 20);
        let source = Memory::from(part.clone());
        let chunks = (0..parts).map(|_| Chunk::from(source.clone()));
        let region = Region::builder().chunks(chunks).budget(&budget).build(&pool).unwrap();
        let is_right = || region.as_slice().chunks(1 << 20).all(|bytes| bytes == part);
        assert!(is_right());
        if !press(|| budget.metrics().pressure_reports > 0) {
            return println!("SKIPPED in part: no folder on a disk, or the kernel reported no pressure");
        }
        assert!(is_right(), "the pages come back with their bytes");
        let metrics = budget.metrics();
        assert!(metrics.resident_bytes <= budget.limit() && metrics.overruns == 0, "{metrics:?}");
        println!("{metrics:?}");
    });
    if let Err(error) = PressureTrigger::open() {
        return println!("SKIPPED {}: no reports of memory pressure: {error}", this_test!());
    }
    let cgroup = match Cgroup::new(LIMIT) {
        Ok(cgroup) => cgroup,
        Err(error) => return println!("SKIPPED {}: no cgroup can be made: {error}", this_test!()),
    };
    let end = body.spawn(&cgroup.0).wait();
    end.expect_pass();
    print!("{}", end.output());
}

/// Reads a file again and again that does not fit beside the budget, until there is a report. False if there
/// is none, or if there is no folder for the file: memory files are no pressure.
fn press(is_reported: impl Fn() -> bool) -> bool {
    let Ok(mut file) = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")) else { return false };
    let block = pattern(9, 1 << 20);
    (0..LIMIT >> 20).for_each(|_| file.write_all(&block).unwrap());
    file.sync_all().unwrap();
    let mut page = [0; PAGE];
    let mut round = |file: &mut File| {
        file.rewind().unwrap();
        while !is_reported() && file.read(&mut page).unwrap() > 0 {}
        is_reported()
    };
    (0..ROUNDS).any(|_| round(&mut file))
}

const LIMIT: u64 = 48 << 20;
/// A kernel that reads so often without a report has none.
const ROUNDS: usize = 20;
