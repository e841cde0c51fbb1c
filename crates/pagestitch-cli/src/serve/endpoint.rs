//! The socket of a handler: made at a path, or passed by a service manager.

use super::systemd;
use crate::usage::Usage;
use clap::Args;
use nix::unistd::Group;
use pagestitch_firecracker::{Builder, Handler};
use std::error::Error;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The options that name the socket.
#[derive(Debug, Args)]
pub(super) struct SocketOptions {
    /// The path to listen at: the "backend_path" of PUT /snapshot/load. Without it, the socket that
    /// systemd passes (a .socket unit with one ListenStream=)
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The permission bits of the socket, in octal; a client needs write permission [default: those
    /// that the umask leaves, or 0660 with --socket-group]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    socket_mode: Option<u32>,
    /// The group of the socket, by name or number [default: the group of this process]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
}

impl SocketOptions {
    /// The path at which the handler makes the socket.
    pub(super) fn path(&self) -> Option<&Path> {
        self.socket.as_deref()
    }
}

/// The socket at which a handler listens.
#[derive(Debug)]
pub(super) enum Endpoint {
    /// A socket that the handler makes.
    Path { path: PathBuf, mode: Option<u32>, group: Option<u32> },
    /// A socket that a service manager has made.
    Inherited(UnixListener),
}

impl Endpoint {
    /// The socket that the options or the service manager name.
    pub(super) fn of(options: &SocketOptions) -> Result<Self, Box<dyn Error>> {
        let SocketOptions { socket, socket_mode: mode, socket_group: group } = options;
        let inherited = systemd::inherited_socket()?;
        let wrong = match (socket, inherited) {
            (Some(path), None) => {
                let group = group.as_deref().map(find_group).transpose()?;
                return Ok(Self::Path { path: path.clone(), mode: mode.or(group.map(|_| 0o660)), group });
            }
            (None, Some(listener)) if mode.is_none() && group.is_none() => {
                return Ok(Self::Inherited(listener));
            }
            (None, Some(_)) => {
                "systemd has made the socket: instead of --socket-mode and --socket-group, set SocketMode= and SocketGroup= in the socket unit"
            }
            (Some(_), Some(_)) => {
                "systemd passes a socket, so --socket would be unused: omit --socket, or the socket unit"
            }
            (None, None) => {
                "no socket to listen at: name one with --socket PATH, or start the command by a systemd socket unit"
            }
        };
        Err(Usage(wrong.to_owned()).into())
    }

    /// Listens at the socket.
    pub(super) fn open(self, builder: Builder) -> Result<Handler, pagestitch_firecracker::Error> {
        match self {
            Self::Inherited(listener) => builder.listen(listener),
            Self::Path { path, mode, group } => {
                let builder = mode.into_iter().fold(builder, Builder::socket_mode);
                let builder = group.into_iter().fold(builder, Builder::socket_group);
                builder.bind(path)
            }
        }
    }
}

/// Parses permission bits in octal, with or without a zero in front.
pub(super) fn mode(text: &str) -> Result<u32, String> {
    let octal = text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| octal && mode <= 0o777);
    mode.ok_or_else(|| String::from("say permission bits in octal, up to 0777: --socket-mode 0660"))
}

/// The id of a group, which is named or numbered.
fn find_group(text: &str) -> Result<u32, String> {
    // The largest number stands for no group in chown(2).
    if let Some(id) = text.parse().ok().filter(|&id| id < u32::MAX) {
        return Ok(id);
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(format!(
            "no group '{text}' on this machine: name one that `getent group` lists, or a number: --socket-group 1000"
        )),
        Err(errno) => Err(format!("cannot look up the group '{text}': {errno}: give its number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!(["0660", "660", "0", "777"].map(mode), [Ok(0o660), Ok(0o660), Ok(0), Ok(0o777)]);
        for bad in ["", "rw", "0o660", "888", "1777", "-1", "+660", "99999999999"] {
            assert!(mode(bad).is_err_and(|error| error.contains("0660")), "{bad}");
        }
    }

    #[test]
    fn a_group_is_a_name_or_a_number() {
        assert_eq!((find_group("root"), find_group("1234")), (Ok(0), Ok(1234)));
        for bad in ["", "no-such-group", "-1", "4294967295"] {
            assert!(find_group(bad).is_err_and(|error| error.contains("--socket-group 1000")), "{bad}");
        }
    }
}
