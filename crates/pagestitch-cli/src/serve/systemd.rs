//! The protocol of a service manager: the socket that it passes (`sd_listen_fds(3)`), and the states
//! that it is told (`sd_notify(3)`).

use crate::output::count;
use listenfd::ListenFd;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::time::Duration;

/// Takes the socket that a service manager has passed to this process, if it has passed one.
pub(super) fn inherited_socket() -> Result<Option<UnixListener>, String> {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    // The variables of another process may have been inherited.
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS").unwrap_or(0) {
        0 => return Ok(None),
        1 => {}
        sockets => {
            return Err(format!(
                "systemd passes {sockets} sockets, but serve listens at one: keep one ListenStream= in the socket unit"
            ));
        }
    }
    let passed = ListenFd::from_env().take_unix_listener(0);
    let listens = passed.ok().flatten().filter(|socket| getsockopt(socket, AcceptConn) == Ok(true));
    let refused = "the socket that systemd passes is no listening UNIX stream socket: give the socket unit ListenStream=/PATH and Accept=no";
    listens.map(Some).ok_or_else(|| refused.to_owned())
}

/// Reports that guests can connect.
pub(super) fn ready() {
    notify("READY=1\nSTATUS=serving no guest\n");
}

/// Reports the number of guests.
pub(super) fn serving(guests: usize) {
    notify(&format!("STATUS=serving {}\n", count(guests, "guest")));
}

/// Reports the shutdown, which may take as long as the memory of all guests takes to fill.
pub(super) fn stopping() {
    notify("STOPPING=1\n");
}

/// Sends states to the socket of the service manager, if there is one.
fn notify(states: &str) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, states) {
        tracing::warn!(%error, ?socket, "systemd was not told the state of this service: see NOTIFY_SOCKET");
    }
}

/// Sends a message to a datagram socket: at a path, or at an abstract address, which `@` begins.
fn send(socket: &OsStr, message: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => {
            let what = "the address begins neither with / nor with @";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
    };
    let sender = UnixDatagram::unbound()?;
    // A service manager that reads nothing must not keep the service from its guests.
    sender.set_write_timeout(Some(PATIENCE))?;
    let sent = sender.send_to_addr(message.as_bytes(), &address)?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The longest wait for room in the socket of the service manager.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_sent_to_a_path_or_to_an_abstract_address() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("notify");
        let name = format!("@pagestitch-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        for (socket, listener) in [
            (path.as_os_str(), UnixDatagram::bind(&path).unwrap()),
            (OsStr::new(&name), UnixDatagram::bind_addr(&abstract_address).unwrap()),
        ] {
            send(socket, "READY=1\n").unwrap();
            let mut received = [0; 20];
            let bytes = listener.recv(&mut received).unwrap();
            assert_eq!(&received[..bytes], b"READY=1\n", "{socket:?}");
        }
        for bad in ["", "relative", "vsock:2:1234"] {
            let error = send(OsStr::new(bad), "READY=1\n").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad}: {error}");
        }
    }
}
