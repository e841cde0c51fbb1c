//! Memory runs out while pages are filled: an error with the reason or the end of the process, but
//! never zeros and never a hang.

use crate::guests::receive;
use crate::{PAGE, SIGKILL, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pagestitch::{Chunk, ErrorKind, Pool, Region};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use tempfile::TempDir;

const TOTAL: usize = 32 << 20;
const LIMIT: u64 = 16 << 20;

/// A memory control group with a limit. Version 1, because only there the kernel can refuse memory
/// without a kill.
struct Group {
    folder: PathBuf,
    mounted: Option<TempDir>,
}

impl Group {
    fn new(name: &str, kills: bool) -> Option<Self> {
        let made = Self::make(name, kills);
        made.inspect_err(|why| {
            println!("SKIPPED: no memory control group of version 1 can be made here ({why})")
        })
        .ok()
    }

    fn make(name: &str, kills: bool) -> io::Result<Self> {
        let (root, mounted) = hierarchy()?;
        let folder = root.join(format!("pagestitch-{name}-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let group = Self { folder, mounted };
        group.limit(LIMIT)?;
        if !kills {
            fs::write(group.folder.join("memory.oom_control"), "1")?;
        }
        Ok(group)
    }

    fn limit(&self, bytes: u64) -> io::Result<()> {
        // Swap space is limited too, where it is counted. The limit with swap must never be below
        // the limit without.
        let swap =
            |bytes: u64| drop(fs::write(self.folder.join("memory.memsw.limit_in_bytes"), bytes.to_string()));
        swap(bytes);
        fs::write(self.folder.join("memory.limit_in_bytes"), bytes.to_string())?;
        swap(bytes);
        Ok(())
    }

    fn path(&self) -> &str {
        self.folder.to_str().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !thread::panicking() {
            // The process in the group has just ended.
            until(|| fs::remove_dir(&self.folder).is_ok());
        }
        if let Some(folder) = &self.mounted {
            let _ = umount2(folder.path(), MntFlags::MNT_DETACH);
        }
    }
}

/// The mount point of the memory control groups. It is mounted for the lifetime of the folder, if
/// it was not before.
fn hierarchy() -> io::Result<(PathBuf, Option<TempDir>)> {
    let there = Path::new("/sys/fs/cgroup/memory");
    if there.join("memory.limit_in_bytes").exists() {
        return Ok((there.to_owned(), None));
    }
    let folder = tempfile::tempdir()?;
    mount(Some("cgroup"), folder.path(), Some("cgroup"), MsFlags::empty(), Some("memory"))?;
    Ok((folder.path().to_owned(), Some(folder)))
}

fn join(group: &str) {
    fs::write(Path::new(group).join("cgroup.procs"), "0").unwrap();
}

/// A process that reaches its limit is killed: it does not read on past its last page.
#[test]
fn a_process_past_its_memory_limit_is_killed_and_reads_no_zeros() {
    let test = this_test!();
    let Some(group) = group_of(test, "own", true) else { return };
    let child = child::spawn(test, group.as_ref().map_or("", Group::path), |group| {
        join(group);
        let source = Arc::new(Scripted::new(TOTAL as u64));
        let region = Region::builder().chunk(Chunk::source(source)).build(&Pool::new().unwrap()).unwrap();
        let zeros = region.as_slice().iter().enumerate().find(|(at, byte)| **byte != byte_at(*at as u64));
        println!("read all of it: {zeros:?}");
    });
    let end = child.wait();
    assert!(!end.output().contains("read all of it"), "{}", end.output());
    assert!(matches!(end.signal(), Some(SIGKILL | crate::SIGBUS)), "{}", end.output());
}

/// The limit of another process is reached: its pages fail until the limit is raised, and a retry
/// then fills them.
#[test]
#[cfg_attr(sanitized = "thread", ignore = "the limit counts memory of the sanitizer")]
fn adopted_memory_past_its_limit_is_an_error_and_is_filled_by_a_retry() {
    let test = this_test!();
    let Some(group) = group_of(test, "adopted", false) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let argument = format!("{}\n{}", path.display(), group.as_ref().map_or("", Group::path));
    let process = child::spawn(test, &argument, |argument| {
        let (socket, group) = argument.split_once('\n').unwrap();
        let guest = Guest::new(&[TOTAL], false).unwrap();
        join(group);
        let mut stream = guest.hand_over(socket.as_ref()).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        for at in 0..TOTAL / PAGE {
            let at = at * PAGE + at % PAGE;
            assert_eq!(guest.read(at), byte_at(at as u64), "byte {at}");
        }
    });
    let group = group.expect("only the child has none");
    let (mut stream, region) = adopt(&listener);
    let error = region.populate(..).unwrap_err();
    if crate::signal_of_lost_page() == SIGKILL {
        // Without poison markers, the drop kills the owner.
        drop(region);
        return assert_eq!(process.wait().signal(), Some(SIGKILL));
    }
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    let bad = region.failures().len();
    assert!((1..=4).contains(&bad), "{bad}: one failed page for each filling thread");
    let some = region.metrics().pages_installed() * PAGE as u64;
    assert!((LIMIT / 2..LIMIT).contains(&some), "{some} bytes of {LIMIT}");
    group.limit(2 * TOTAL as u64).unwrap();
    region.retry_failed(..).unwrap();
    let metrics = region.finish().unwrap();
    assert_eq!(metrics.pages_installed(), (TOTAL / PAGE) as u64);
    stream.write_all(b"!").unwrap();
    process.wait().expect_pass();
}

/// `Some(None)` in the child, which gets the path of the group from its parent.
fn group_of(test: &str, name: &str, kills: bool) -> Option<Option<Group>> {
    if child::is_child(test) { Some(None) } else { Group::new(name, kills).map(Some) }
}

fn adopt(listener: &UnixListener) -> (UnixStream, pagestitch::AdoptedRegion) {
    let (stream, _) = listener.accept().unwrap();
    let memory = receive(&stream);
    let source = Chunk::source(Arc::new(Scripted::new(TOTAL as u64)));
    (stream, Region::builder().chunk(source).build_adopted(memory, &Pool::new().unwrap()).unwrap())
}
