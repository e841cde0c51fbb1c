//! The protocol of systemd: socket activation, and the states of a service.

use super::{PAGES, folder, live};
use pagestitch_testkit::{child, this_test};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Starts a handler as systemd does: with a descriptor as number 3, and its variables.
fn activated(folder: &Path, passed: OwnedFd, notified: &OsStr, more: &str) -> Child {
    let command = format!(
        "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec {} serve firecracker --memory memory {more}",
        env!("CARGO_BIN_EXE_pagestitch")
    );
    Command::new("sh")
        .args(["-c", &command])
        .current_dir(folder)
        .env("NOTIFY_SOCKET", notified)
        .stdin(Stdio::from(passed))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn terminate(process: &Child) {
    assert!(Command::new("kill").arg(process.id().to_string()).status().unwrap().success());
}

#[test]
fn handlers_share_a_socket_of_systemd_and_report_their_states() {
    // The connection of a guest may wait for a handler.
    let guest = child::body(this_test!(), |socket| live(socket, 0..PAGES, |_| ()));
    let folder = folder();
    let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
    let path = folder.path().join("notify");
    let name = format!("@pagestitch-notify-{}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&name[1..]).unwrap();
    let next = |notified: &UnixDatagram| {
        let mut message = [0; 200];
        let bytes = notified.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..bytes]).into_owned()
    };
    // The second handler finds the socket as the first one has left it. The service manager may be
    // told at a path, or at an abstract address.
    for (address, notified) in [
        (path.as_os_str(), UnixDatagram::bind(&path).unwrap()),
        (OsStr::new(&name), UnixDatagram::bind_addr(&abstract_address).unwrap()),
    ] {
        notified.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let early = guest.spawn(folder.path().join("socket"));
        let mut handler = activated(folder.path(), listener.try_clone().unwrap().into(), address, "--json");
        early.wait().expect_pass();
        assert_eq!(next(&notified), "READY=1\nSTATUS=serving no guest\n");
        assert_eq!(next(&notified), "STATUS=serving 1 guest\n");
        assert_eq!(next(&notified), "STATUS=serving 0 guests\n");
        terminate(&handler);
        assert_eq!(next(&notified), "STOPPING=1\n");
        assert!(handler.wait().unwrap().success());
        let output = handler.wait_with_output().unwrap();
        let (lines, said) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr));
        let socket = format!("\"socket\":\"{}/socket\"", folder.path().display());
        assert!(lines.lines().next().unwrap().contains(&socket), "{lines}");
        assert_eq!((lines.lines().count(), said.unwrap().as_str()), (3, ""), "{lines}");
        assert!(folder.path().join("socket").exists());
    }
}

#[test]
fn an_unusable_socket_of_systemd_is_an_error_line() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let unix = || OwnedFd::from(UnixListener::bind(path("socket")).unwrap());
    let refused = |passed: OwnedFd, more: &str, status: i32| {
        let output = activated(folder.path(), passed, folder.path().join("notify").as_os_str(), more)
            .wait_with_output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let _ = fs::remove_file(path("socket"));
        assert_eq!((output.status.code(), said.lines().count()), (Some(status), 1), "{said}");
        said
    };
    let connection = UnixStream::pair().unwrap().0;
    for wrong in [
        OwnedFd::from(fs::File::open(path("memory")).unwrap()),
        UnixDatagram::unbound().unwrap().into(),
        connection.into(),
        TcpListener::bind("127.0.0.1:0").unwrap().into(),
    ] {
        let said = refused(wrong, "", 1);
        assert!(said.contains("no listening UNIX stream socket") && said.contains("Accept=no"), "{said}");
    }
    assert!(refused(unix(), "--socket other", 2).contains("omit --socket, or the socket unit"));
    assert!(refused(unix(), "--socket-mode 0660", 2).contains("set SocketMode= and SocketGroup="));
    // The variables of another process mean nothing.
    let alone = Command::new(env!("CARGO_BIN_EXE_pagestitch"))
        .args(["serve", "firecracker", "--memory", "memory"])
        .current_dir(folder.path())
        .envs([("LISTEN_PID", "1"), ("LISTEN_FDS", "1")])
        .output()
        .unwrap();
    let said = String::from_utf8(alone.stderr).unwrap();
    assert!(alone.status.code() == Some(2) && said.contains("no socket to listen at"), "{said}");
    let two = Command::new("sh")
        .args([
            "-c",
            "export LISTEN_PID=$$ LISTEN_FDS=99999999; exec \"$0\" serve firecracker --memory memory",
        ])
        .arg(env!("CARGO_BIN_EXE_pagestitch"))
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8(two.stderr).unwrap();
    assert!(two.status.code() == Some(1) && said.contains("passes 99999999 sockets"), "{said}");
}

#[test]
fn a_warning_is_an_object_with_json() {
    let folder = folder();
    let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
    let mut handler = activated(folder.path(), listener.into(), OsStr::new("nowhere"), "--json");
    let mut lines = BufReader::new(handler.stderr.take().unwrap()).lines();
    let warning: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    terminate(&handler);
    assert!(handler.wait().unwrap().success());
    assert_eq!((&warning["level"], &warning["socket"]), (&"warn".into(), &"\"nowhere\"".into()));
    assert!(warning["message"].as_str().unwrap().contains("NOTIFY_SOCKET"), "{warning}");
    assert!(
        warning["error"].as_str().unwrap().contains("begins neither") && warning["time"].is_string(),
        "{warning}"
    );
    // The shutdown is another state that nothing receives.
    assert!(lines.all(|line| serde_json::from_str::<Value>(&line.unwrap()).is_ok()));
}
