//! The protocol of a service manager: the socket that it passes (`sd_listen_fds(3)`), and the states
//! that it is told (`sd_notify(3)`).

use crate::output::count;
use listenfd::ListenFd;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use sd_notify::NotifyState::{self, Ready, Status, Stopping};
use std::env;
use std::os::unix::net::UnixListener;

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
    notify(&[Ready, Status("serving no guest")]);
}

/// Reports the number of guests.
pub(super) fn serving(guests: usize) {
    notify(&[Status(&format!("serving {}", count(guests, "guest")))]);
}

/// Reports the shutdown, which may take as long as the memory of all guests takes to fill.
pub(super) fn stopping() {
    notify(&[Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd was not told the state of this service: see NOTIFY_SOCKET");
    }
}
