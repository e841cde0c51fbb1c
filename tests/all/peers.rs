//! Hostile peers of the Firecracker handler, one attack a test. A peer may harm its own guest, and
//! nothing else.

use crate::firecracker::{
    PAGES, bound, connect, describe, expected, snapshot_in, start, start_impatient, start_with,
};
use crate::handler::{Refusal, Reported, RunningHandler, Seen};
use crate::{HANG, PAGE, SIGKILL, comes_true, signal_of_lost_page, until};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use pagestitch::OnUnavailable;
use pagestitch_firecracker::{Error, Handler, OnStop, Snapshot};
use pagestitch_kernel::fd_passing;
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::{child, this_test};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A guest that reads a byte of each page.
fn innocent(path: &str) {
    let (guest, _stream) = connect(path);
    let expected = expected();
    (0..PAGES).for_each(|page| assert_eq!(guest.read(page * PAGE), expected[page * PAGE]));
}

/// A TCP socket whose last `close(2)` waits as long as the other end lives, because it does not
/// read.
fn lingering(port: &str) -> OwnedFd {
    let mut socket = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[7; 1 << 16]).is_ok() {}
    // close(2) of a non-blocking socket does not linger.
    socket.set_nonblocking(false).unwrap();
    setsockopt(&socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 1000 }).unwrap();
    socket.into()
}

/// Sends descriptors that the handler reads and others that it closes unread, and ends, so that the
/// handler holds the last copy of each.
fn sends_lingering_sockets(argument: &str) {
    let (path, port) = argument.split_once(' ').unwrap();
    for _ in 0..2 {
        let stream = UnixStream::connect(path).unwrap();
        let (read, unread) = (lingering(port), lingering(port));
        fd_passing::send(&stream, b"[", &[read.as_fd()]).unwrap();
        fd_passing::send(&stream, b"no list", &[unread.as_fd()]).unwrap();
        // The exit of a process does not linger in close(2).
        std::mem::forget((stream, read, unread));
    }
}

/// Runs a handler from the time that the file `run` exists until the file `stop` exists.
fn serves_beside_lingering_sockets(folder: &Path) {
    let (files, temporary) = (snapshot_in(folder), tempfile::tempdir().unwrap());
    let handler = bound(folder, &files, OnUnavailable::Poison, OnStop::Finish);
    File::create(folder.join("bound")).unwrap();
    until(|| folder.join("run").exists());
    let mut running = RunningHandler::run(temporary, handler);
    until(|| folder.join("stop").exists());
    running.stop();
    let refused = |seen: &Seen| matches!(seen, Seen::Refused { reason: Refusal::NotUserfaultfd(kind), .. } if kind.starts_with("socket:"));
    assert!(running.reported(refused) > 0, "{:?}", running.events());
}

/// The handler runs in a process of its own that starts no child. A child inherits a descriptor
/// that the handler has just received, and the `execve(2)` of the child, which is then its last
/// close, waits for the peer.
#[test]
fn a_descriptor_whose_close_hangs_delays_no_guest() {
    let body = child::body(this_test!(), |argument| match argument.split_once(' ') {
        Some(("handler", folder)) => serves_beside_lingering_sockets(Path::new(folder)),
        Some(("guest", path)) => innocent(path),
        _ => sends_lingering_sockets(argument),
    });
    let deaf = TcpListener::bind("127.0.0.1:0");
    // A bind succeeds also where the loopback device is down.
    let Some(deaf) = deaf.ok().filter(|deaf| TcpStream::connect(deaf.local_addr().unwrap()).is_ok()) else {
        return println!("SKIPPED {}: the loopback network is down", this_test!());
    };
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (path, port) = (file("socket").display().to_string(), deaf.local_addr().unwrap().port());
    let handler = body.spawn(format!("handler {}", folder.path().display()));
    until(|| file("bound").exists());
    body.spawn(format!("{path} {port}")).wait().expect_pass();
    File::create(file("run")).unwrap();
    let mut guest = body.spawn(format!("guest {path}"));
    let ended = until_ended(&mut guest);
    File::create(file("stop")).unwrap();
    handler.wait_at_most(HANG).expect_pass();
    assert!(ended, "the guest hangs");
    guest.wait().expect_pass();
}

/// Starts a process with this pid, if the kernel lets the pid be chosen.
fn process_with(pid: u32) -> Option<Child> {
    for _ in 0..200 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = Command::new("sleep").arg("60").spawn().ok()?;
        if child.id() == pid {
            return Some(child);
        }
        child.kill().ok()?;
        child.wait().ok()?;
    }
    None
}

#[test]
#[cfg_attr(sanitized = "thread", ignore = "the handler closes the connection before")]
fn a_process_with_the_reused_pid_of_a_peer_is_neither_killed_nor_named() {
    // Connects, hands the connection over, and ends.
    let body = child::body(this_test!(), |paths| {
        let (handler, heir) = paths.split_once(' ').unwrap();
        let (stream, heir) = (UnixStream::connect(handler).unwrap(), UnixStream::connect(heir).unwrap());
        fd_passing::send(&heir, b"yours", &[stream.as_fd()]).unwrap();
    });
    let running = start_with(OnUnavailable::Kill, OnStop::Finish);
    let heir = running.folder.path().join("heir");
    let listener = UnixListener::bind(&heir).unwrap();
    let paths = format!("{} {}", running.socket().display(), heir.display());
    let peer = body.spawn(&paths);
    let pid = peer.id();
    let (_, mut fds) = fd_passing::receive(listener.accept().unwrap().0, &mut [0; 10]).unwrap();
    peer.wait().expect_pass();
    let Some(mut innocent) = process_with(pid) else {
        println!(
            "SKIPPED: the number of the next process cannot be chosen here (/proc/sys/kernel/ns_last_pid)"
        );
        return;
    };
    let stream = UnixStream::from(fds.pop().unwrap());
    let guest = Guest::new(&[100 * PAGE], false).unwrap();
    fd_passing::send(&stream, guest.handshake().as_bytes(), &[guest.uffd()]).unwrap();
    running.until_refused(|_| true);
    let named = |seen: &Seen| matches!(seen, Seen::Refused { pid: Some(named), .. } if *named == pid);
    assert!(running.reported(named) == 0, "{:?}", running.events());
    assert!(innocent.try_wait().unwrap().is_none(), "killed");
    innocent.kill().unwrap();
    innocent.wait().unwrap();
}

#[test]
fn a_log_line_is_short_for_each_message_of_a_peer() {
    let mut running = start();
    let hostile = "A\n\u{1b}[31m".repeat(90_000);
    let text = serde_json::to_string(&hostile).unwrap();
    for message in [format!("[{text}]"), format!("[{{\"size\":{text}}}]"), format!("[{{{text}:1}}]")] {
        let mut stream = UnixStream::connect(running.socket()).unwrap();
        let _ = stream.write_all(message.as_bytes());
        let _ = stream.read(&mut [0; 1]);
    }
    let file = running.folder.path().join("n\nl".repeat(80));
    let stream = UnixStream::connect(running.socket()).unwrap();
    fd_passing::send(&stream, b"[", &[File::create(&file).unwrap().as_fd()]).unwrap();
    let list = format!(r#"{{"base_host_virt_addr":4096,"size":{},"offset":0}}]"#, PAGES * PAGE);
    let _ = fd_passing::send(&stream, list.as_bytes(), &[]);
    let _ = (&stream).read(&mut [0; 1]);
    until(|| running.events().len() == 4);
    running.stop();
    for Reported { line, .. } in running.events() {
        assert!(line.len() < 400 && !line.contains(['\n', '\u{1b}']), "{} bytes: {:.300}", line.len(), line);
    }
}

#[test]
fn a_draining_handler_leaves_the_socket_of_its_successor() {
    let mut running = start();
    let path = running.socket();
    fs::remove_file(&path).unwrap();
    let snapshot = Snapshot::open([running.folder.path().join("base")]).unwrap();
    let successor = Handler::builder(snapshot).bind(&path).unwrap();
    running.stop();
    assert!(path.exists(), "removed");
    drop(successor);
}

#[test]
fn a_successor_does_not_wait_at_a_full_backlog() {
    let folder = tempfile::tempdir().unwrap();
    snapshot_in(folder.path());
    let path = folder.path().join("socket");
    let _stopped = listener_with_a_small_backlog(&path);
    let mut waiting = Vec::new();
    while let Ok(stream) = connect_at_once(&path) {
        waiting.push(stream);
    }
    let (answer, answered) = mpsc::channel();
    let snapshot = Snapshot::open([folder.path().join("base")]).unwrap();
    let bind = path.clone();
    thread::spawn(move || answer.send(Handler::builder(snapshot).bind(bind).unwrap_err()));
    let error = answered.recv_timeout(HANG).expect("bind() returns");
    assert!(matches!(error, Error::InUse(_)), "{error}");
}

/// The backlog of a [`UnixListener`] may have more places than this process has descriptors.
fn listener_with_a_small_backlog(path: &Path) -> OwnedFd {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(1).unwrap()).unwrap();
    fd
}

/// Connects, or fails where a connect would wait.
fn connect_at_once(path: &Path) -> nix::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// The message that a guest sends in place of its handshake.
fn wrong_handshake(guest: &Guest, what: &str) -> Vec<u8> {
    match what {
        "garbage" => b"HELO".to_vec(),
        "incomplete" => b"[".to_vec(),
        "gap" => guest.handshake().replace("\"offset\":0", "\"offset\":4096").into(),
        _ => guest.handshake().into(),
    }
}

/// A refused guest gets the declared signal, and no page makes it wait forever.
#[test]
fn a_refused_guest_gets_a_signal() {
    let body = child::body(this_test!(), |argument| {
        let (what, path) = argument.split_once(' ').unwrap();
        let pages = if what == "larger" { 20 * PAGES } else { 100 };
        let guest = Guest::new(&[pages * PAGE], false).unwrap();
        let stream = UnixStream::connect(path).unwrap();
        fd_passing::send(&stream, &wrong_handshake(&guest, what), &[guest.uffd()]).unwrap();
        println!("read a byte: {}", guest.read((pages - 1) * PAGE));
    });
    for (loss, signal) in [(OnUnavailable::Poison, signal_of_lost_page()), (OnUnavailable::Kill, SIGKILL)] {
        // The incomplete handshake times out.
        let running = start_impatient(loss);
        let start =
            |what: &str| (what.to_owned(), body.spawn(format!("{what} {}", running.socket().display())));
        let guests: Vec<_> = ["garbage", "incomplete", "gap", "smaller", "larger"].map(start).into();
        for (what, mut guest) in guests {
            let end = until_ended(&mut guest);
            let died = end.then(|| guest.wait().signal()).flatten();
            let larger = what == "larger" && died == Some(SIGKILL);
            assert!(larger || died == Some(signal), "{what} with {loss:?}: {died:?}, {:?}", running.events());
        }
    }
}

/// A thread that waits at a protected page continues, as one that waits at a poison marker does: no thread reads
/// the messages of a refused guest. A missing page is a signal, also if it is protected (Linux 6.4).
#[test]
fn a_thread_that_waits_in_a_refused_guest_continues() {
    let body = child::body(this_test!(), |path| {
        let guest = Guest::protectable(&[100 * PAGE]).unwrap();
        guest.fill_first();
        guest.protect().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| guest.write(0, 7));
            until(|| guest.has_waiters());
            let stream = UnixStream::connect(path).unwrap();
            fd_passing::send(&stream, b"HELO", &[guest.uffd()]).unwrap();
            assert_eq!((&stream).read(&mut [0]).unwrap_or(0), 0, "the handler closes the connection");
        });
        assert_eq!(guest.read(0), 7);
        println!("read a byte: {}", guest.read(PAGE));
    });
    let running = start();
    let mut guest = body.spawn(running.socket());
    let ended = until_ended(&mut guest);
    let end = guest.wait();
    assert!(ended && end.signal() == Some(signal_of_lost_page()), "{ended}, {}", end.output());
}

/// True if a child ends. Kills it if it hangs.
fn until_ended(child: &mut child::ChildTest) -> bool {
    let stat = format!("/proc/{}/stat", child.id());
    let ended = comes_true(|| fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z ")));
    if !ended {
        child.kill();
    }
    ended
}

/// The handler is told to stop before it has accepted the connection.
#[test]
fn a_guest_in_the_backlog_is_served_by_a_stopping_handler() {
    let body = child::body(this_test!(), |path| {
        let (guest, _stream) = connect(path);
        println!("ready");
        fs::write(format!("{path}.ready"), "").unwrap();
        let expected = expected();
        (0..PAGES).for_each(|page| assert_eq!(guest.read(page * PAGE), expected[page * PAGE]));
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let handler = bound(folder.path(), &snapshot_in(folder.path()), OnUnavailable::Poison, OnStop::Finish);
    let mut guest = body.spawn(&path);
    until(|| folder.path().join("socket.ready").exists());
    handler.shutdown_handle().shutdown();
    handler.run(|_| {}).unwrap();
    let ended = until_ended(&mut guest);
    let end = guest.wait();
    assert!(ended && end.passed(), "{}", end.output());
}

#[test]
fn each_handshake_timeout_is_accepted() {
    let body = child::body(this_test!(), innocent);
    for patience in [Duration::MAX, Duration::from_secs(u64::MAX / 1000), Duration::ZERO] {
        let folder = tempfile::tempdir().unwrap();
        let files = snapshot_in(folder.path());
        let mut running = RunningHandler::start(folder, describe(&files).handshake_timeout(patience));
        if patience > Duration::ZERO {
            body.spawn(running.socket()).wait().expect_pass();
        } else {
            let _silent = UnixStream::connect(running.socket()).unwrap();
            running.until_refused(|reason| matches!(reason, Refusal::TimedOut { after: Duration::ZERO, .. }));
        }
        running.stop();
    }
}
