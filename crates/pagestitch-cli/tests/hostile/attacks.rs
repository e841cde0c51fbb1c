//! The attacks of a hostile peer. An attack goes on until its process is killed.

use crate::fuse;
use crate::snapshot::{BYTES, PAGE};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use pagestitch_kernel::fd_passing;
use pagestitch_testkit::child;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::{fs, thread};

/// An attack on a handler at a socket. It calls back once it has begun, and fails if it is
/// impossible here.
type Attack = fn(&Path, &dyn Fn()) -> Result<(), Box<dyn Error>>;

pub(crate) const ATTACKS: [(&str, Attack); 12] = [
    ("makes-its-userfaultfd-blocking", makes_blocking),
    ("sends-sockets-that-linger", sends_lingering_sockets),
    ("sends-files-of-a-silent-fuse-daemon", sends_fuse_files),
    ("ends-and-leaves-its-connection-to-another-process", leaves_its_connection),
    ("connects-and-disconnects-in-a-loop", floods),
    ("discards-its-memory-in-a-loop", discards),
    ("moves-unannounced-memory", moves),
    ("has-memory-on-a-full-tmpfs", fills_a_tmpfs),
    ("sends-endless-and-long-messages", sends_long_messages),
    ("aborts-again-and-again", dies),
    ("starts-handlers-at-the-same-socket", takes_the_socket_over),
    ("is-refused-again-and-again", is_refused),
];

fn loop_in_threads(threads: usize, work: impl Fn() + Sync, ready: &dyn Fn()) -> ! {
    scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    work();
                }
            });
        }
        ready();
    });
    unreachable!("the threads go on forever")
}

fn guest(socket: &Path) -> (Guest, UnixStream) {
    let guest = Guest::new(&[BYTES], false).unwrap();
    let stream = guest.hand_over(socket).unwrap();
    (guest, stream)
}

fn touch(guest: &Guest, page: usize) {
    let _ = guest.read(page * PAGE);
}

fn makes_blocking(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let guests: Vec<_> = (0..4).map(|_| guest(socket)).collect();
    for (guest, _) in &guests {
        let _ = guest.read(0);
        guest.make_blocking()?;
    }
    loop_in_threads(
        1,
        || guests.iter().for_each(|(guest, _)| drop(guest.balloon(0, PAGE).map(|()| guest.read(0)))),
        ready,
    )
}

fn sends_lingering_sockets(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let deaf = TcpListener::bind("127.0.0.1:0")?;
    let address = deaf.local_addr()?;
    let send = || -> Result<(), Box<dyn Error>> {
        let mut tcp = TcpStream::connect(address)?;
        tcp.set_nonblocking(true)?;
        while tcp.write(&[7; 1 << 16]).is_ok() {}
        tcp.set_nonblocking(false)?;
        setsockopt(&tcp, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 10 })?;
        let stream = UnixStream::connect(socket)?;
        fd_passing::send(&stream, b"[", &[tcp.as_fd()])?;
        let _ = fd_passing::send(&stream, b"[", &[tcp.as_fd()]);
        // The last close of this descriptor blocks, so a thread does it.
        thread::spawn(move || drop(tcp));
        Ok(())
    };
    for _ in 0..12 {
        send()?;
    }
    ready();
    loop {
        thread::park();
    }
}

fn sends_fuse_files(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let folder = socket.with_file_name("fuse");
    let _daemon = fuse::start(&folder, &socket.with_file_name("end"))?;
    for _ in 0..6 {
        let file = fs::File::open(folder.join("file"))?;
        let stream = UnixStream::connect(socket)?;
        fd_passing::send(&stream, b"[", &[file.as_fd()])?;
        std::mem::forget(file);
    }
    ready();
    loop {
        thread::park();
    }
}

const PEER: &str = "attacks::a_peer_that_ends";

/// Connects, leaves the connection to another process, and ends.
#[test]
fn a_peer_that_ends() {
    if child::is_child(PEER) {
        child::spawn(PEER, "", |paths| {
            let (handler, heir) = paths.split_once(' ').unwrap();
            let (stream, heir) = (UnixStream::connect(handler).unwrap(), UnixStream::connect(heir).unwrap());
            fd_passing::send(&heir, b"yours", &[stream.as_fd()]).unwrap();
        });
    }
}

fn leaves_its_connection(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let path = socket.with_file_name("heir");
    let _ = fs::remove_file(&path);
    let heir = UnixListener::bind(&path)?;
    let (wrong, right) = (Guest::new(&[100 * PAGE], false)?, Guest::new(&[BYTES], false)?);
    let work = || {
        let peer =
            child::spawn(PEER, &format!("{} {}", socket.display(), path.display()), |_| unreachable!());
        let (_, mut fds) = fd_passing::receive(heir.accept().unwrap().0, &mut [0; 10]).unwrap();
        peer.wait();
        for guest in [&wrong, &right] {
            let _ = fd_passing::send(fds.last().unwrap(), guest.handshake().as_bytes(), &[guest.uffd()]);
        }
        fds.clear();
    };
    loop_in_threads(1, work, ready)
}

fn floods(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    loop_in_threads(4, || drop(UnixStream::connect(socket)), ready)
}

fn discards(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let guest = Arc::new(guest(socket));
    loop_in_threads(64, || guest.0.balloon(0, BYTES).unwrap(), ready)
}

fn moves(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let guest = Guest::movable(&[BYTES])?;
    let _stream = guest.hand_over(socket)?;
    let mut more = guest.register_more(400 << 30)?;
    ready();
    loop {
        more = guest.move_more(more)?;
    }
}

fn fills_a_tmpfs(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let folder = socket.with_file_name("full");
    fs::create_dir_all(&folder)?;
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&folder).output()?;
    if !mounted.status.success() {
        return Err("no tmpfs can be mounted here".into());
    }
    let file =
        fs::File::options().read(true).write(true).create(true).truncate(true).open(folder.join("memory"))?;
    file.set_len(BYTES as u64)?;
    // The file outlives the mount, so that no mount is left behind.
    let _ = Command::new("umount").arg("-l").arg(&folder).output();
    let guest = Guest::in_file(&file, BYTES)?;
    let _stream = guest.hand_over(socket)?;
    scope(|scope| {
        for number in 0..16 {
            let guest = &guest;
            scope.spawn(move || {
                for page in 0.. {
                    touch(guest, (page * 16 + number) % 100_000);
                }
            });
        }
        ready();
    });
    Ok(())
}

fn sends_long_messages(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let text = "A\\n\\u001b[31m".repeat(60_000);
    let messages =
        [format!("[\"{text}\"]"), "[".repeat(1 << 20), " ".repeat(2 << 20), format!("[{{\"size\":\"{text}")];
    let work = || {
        for message in &messages {
            let Ok(mut stream) = UnixStream::connect(socket) else { continue };
            let _ = stream.write_all(message.as_bytes()).and_then(|()| stream.read(&mut [0; 1]));
        }
    };
    loop_in_threads(4, work, ready)
}

const MORTAL: &str = "attacks::a_guest_that_dies";

/// Touches its memory in two threads, and aborts meanwhile.
#[test]
fn a_guest_that_dies() {
    if child::is_child(MORTAL) {
        child::spawn(MORTAL, "", |socket| {
            let (guest, _stream) = guest(Path::new(socket));
            scope(|scope| {
                let touch = |first: usize| (first..1000).for_each(|page| touch(&guest, page));
                scope.spawn(move || touch(0));
                touch(500);
                std::process::abort();
            });
        });
    }
}

fn dies(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    loop_in_threads(
        2,
        || drop(child::spawn(MORTAL, socket.to_str().unwrap(), |_| unreachable!()).wait()),
        ready,
    )
}

fn takes_the_socket_over(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let folder = socket.parent().ok_or("a folder")?;
    let work = || {
        let handler = Command::new(env!("CARGO_BIN_EXE_pagestitch"))
            .current_dir(folder)
            .args(["serve", "firecracker", "--socket", "socket", "--memory", "memory"])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status();
        assert!(!handler.unwrap().success(), "two handlers at one socket");
    };
    loop_in_threads(2, work, ready)
}

fn is_refused(socket: &Path, ready: &dyn Fn()) -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(&[256 << 20], false)?;
    let work = || {
        for message in ["HELO".to_owned(), guest.handshake()] {
            let Ok(mut stream) = UnixStream::connect(socket) else { continue };
            let _ = fd_passing::send(&stream, message.as_bytes(), &[guest.uffd()]);
            let _ = stream.read(&mut [0; 1]);
        }
    };
    loop_in_threads(4, work, ready)
}
