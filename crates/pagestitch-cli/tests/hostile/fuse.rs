//! A file system in user space whose daemon never answers a `close(2)`: just enough of the protocol
//! to open one file.

use crate::signal::{self, Receiver};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pagestitch_testkit::child::{self, ChildTest};
use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const DAEMON: &str = "fuse::a_deaf_daemon";

/// Mounts the file system and serves it until the receiver at the path `end` is dropped. Needs a process
/// of its own, because a process that holds a file of its own daemon cannot end.
#[test]
fn a_deaf_daemon() {
    if child::is_child(DAEMON) {
        child::spawn(DAEMON, "", |paths| {
            let (folder, end) = paths.split_once(' ').unwrap();
            let mounted = mount_and_serve(Path::new(folder));
            signal::send(&mounted_path(Path::new(folder)), mounted.map_or("no FUSE here", |()| ""));
            signal::wait_for_drop(Path::new(end), Duration::from_secs(60));
            let _ = umount2(folder, MntFlags::MNT_DETACH);
        });
    }
}

/// Starts a daemon, whose files are in the folder. It ends with the receiver at the path `end`.
pub(crate) fn start(folder: &Path, end: &Path) -> Result<ChildTest, Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let mounted = Receiver::bind(mounted_path(folder));
    let paths = format!("{} {}", folder.display(), end.display());
    let mut daemon = child::spawn(DAEMON, &paths, |_| unreachable!("the child's body is above"));
    if mounted.receive(Duration::from_secs(10)).is_some_and(|refused| refused.is_empty()) {
        return Ok(daemon);
    }
    daemon.kill();
    Err("no file system of FUSE can be mounted here".into())
}

/// The path at which the daemon reports that it has mounted its file system.
fn mounted_path(folder: &Path) -> PathBuf {
    folder.with_extension("mounted")
}

fn mount_and_serve(path: &Path) -> Result<(), Box<dyn Error>> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    mount(Some("deaf"), path, Some("fuse"), MsFlags::empty(), Some(options.as_str()))?;
    thread::spawn(move || serve(&device));
    Ok(())
}

/// Answers requests until the device is gone.
fn serve(mut device: &File) {
    let mut buffer = vec![0; 1 << 20];
    while let Ok(length) = device.read(&mut buffer) {
        let word = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().expect("four bytes"));
        let (opcode, unique) = (word(4), buffer[8..16].to_vec());
        if length < 40 {
            continue;
        }
        let answer = match opcode {
            INIT => init(),
            LOOKUP => entry(),
            GETATTR => attributes(16, u64::from(word(16))),
            OPEN => vec![0; 16],
            // The daemon never answers these.
            FLUSH | RELEASE | FORGET => continue,
            _ => vec![],
        };
        let error = if answer.is_empty() { -38_i32 } else { 0 };
        let mut message = ((answer.len() + 16) as u32).to_ne_bytes().to_vec();
        message.extend(error.to_ne_bytes());
        message.extend(unique);
        message.extend(answer);
        let _ = device.write_all(&message);
    }
}

/// `fuse_init_out`: version 7.31 with the required fields only.
fn init() -> Vec<u8> {
    let mut out = vec![0; 64];
    out[..4].copy_from_slice(&7_u32.to_ne_bytes());
    out[4..8].copy_from_slice(&31_u32.to_ne_bytes());
    out[20..24].copy_from_slice(&(1_u32 << 16).to_ne_bytes());
    out
}

/// `fuse_entry_out`: the node of the file.
fn entry() -> Vec<u8> {
    let mut out = vec![0; 40];
    out[..8].copy_from_slice(&2_u64.to_ne_bytes());
    out.extend(&attributes(0, 2));
    out
}

/// `before` bytes of zeros, then the `fuse_attr` of a node: node 1 is the folder, others are the file.
fn attributes(before: usize, node: u64) -> Vec<u8> {
    let mut attributes = vec![0; 88];
    let mode: u32 = if node == 1 { 0o040_755 } else { 0o100_644 };
    attributes[..8].copy_from_slice(&node.to_ne_bytes());
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64..68].copy_from_slice(&1_u32.to_ne_bytes());
    [vec![0; before], attributes].concat()
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
