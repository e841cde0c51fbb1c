//! The socket of a handler. A handler takes over the socket file of a dead handler, and removes its
//! own file only. A socket of a service manager stays as it is.
//!
//! Both happen under a lock on the folder, so that two handlers that start or stop at the same time
//! see each other's changes.

use crate::Error;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, shutdown, socket,
};
use nix::unistd::{Gid, fchownat, geteuid};
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// A listening socket, with its path.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// The file of the socket, held open, so that no other file can get its inode number. None if
    /// the socket belongs to a service manager.
    file: Option<File>,
}

/// The processes that may connect to a socket: those that may write its file.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SocketAccess {
    /// The permission bits of the file; none leaves them to the umask.
    pub(crate) mode: Option<u32>,
    /// The group of the file; none leaves the group of this process.
    pub(crate) group: Option<u32>,
}

impl Socket {
    /// Listens at a path. A socket at which no process listens any more is replaced.
    pub(crate) fn bind(path: PathBuf, access: SocketAccess) -> Result<Self, Error> {
        let failed = |source| Error::Listen { path: path.clone(), source };
        let _alone = lock_folder(&path);
        make_room(&path)?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let listener = listener.map_err(|errno| failed(errno.into()))?;
        let bound = UnixAddr::new(&path).and_then(|address| bind(listener.as_raw_fd(), &address));
        bound.map_err(|errno| failed(errno.into()))?;
        let file =
            File::options().read(true).custom_flags(nix::libc::O_PATH | nix::libc::O_NOFOLLOW).open(&path);
        let file = Some(file.map_err(failed)?);
        let socket = Self { listener: listener.into(), path, file };
        socket.admit(access).inspect_err(|_| socket.remove())?;
        Ok(socket)
    }

    /// Takes over a listening socket of a service manager, which keeps its own descriptor.
    pub(crate) fn inherit(listener: UnixListener) -> Result<Self, Error> {
        let path = listener.local_addr().map(|address| name_of(&address)).unwrap_or_default();
        let done = listener.set_nonblocking(true);
        done.map_err(|source| Error::Listen { path: path.clone(), source })?;
        Ok(Self { listener, path, file: None })
    }

    /// Sets the access, and listens. No process can connect before that.
    fn admit(&self, access: SocketAccess) -> Result<(), Error> {
        let path = || self.path.clone();
        if let Some(file) = &self.file {
            access.set(file).map_err(|source| Error::SocketAccess { path: path(), source })?;
        }
        let listens = listen(&self.listener, Backlog::MAXCONN);
        listens.map_err(|errno| Error::Listen { path: path(), source: errno.into() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts a connection, if there is one.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// True if the socket belongs to a service manager. Connections that wait there are left to
    /// the next handler.
    pub(crate) const fn is_inherited(&self) -> bool {
        self.file.is_none()
    }

    /// Accepts no connection made after this call, and frees the path for another handler.
    pub(crate) fn close(&self) {
        if self.is_inherited() {
            return;
        }
        let alone = lock_folder(&self.path);
        self.remove();
        drop(alone);
        // Without this, the kernel would close pending connections with the listener, in this
        // thread, and the descriptors in them may block.
        let _ = shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// Removes the file of the socket, unless another socket has replaced it. The caller has locked
    /// the folder.
    fn remove(&self) {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let ours = self.file.as_ref().and_then(|file| file.metadata().ok()).map(identity);
        let there = fs::symlink_metadata(&self.path).ok().map(identity);
        if ours.is_some() && ours == there {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl SocketAccess {
    /// Sets the access to the file of a socket, through a descriptor, because another process may
    /// replace the path. A file that has replaced the socket before the descriptor was opened is
    /// refused.
    fn set(self, file: &File) -> io::Result<()> {
        if self.group.or(self.mode).is_none() {
            return Ok(());
        }
        let found = file.metadata()?;
        if !found.file_type().is_socket() || found.nlink() != 1 || found.uid() != geteuid().as_raw() {
            return Err(io::Error::other("another file has replaced the socket"));
        }
        if let Some(group) = self.group {
            fchownat(file, OsStr::new(""), None, Some(Gid::from_raw(group)), AtFlags::AT_EMPTY_PATH)?;
        }
        let Some(mode) = self.mode else { return Ok(()) };
        // fchmod(2) refuses descriptors that are opened with O_PATH.
        fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), Permissions::from_mode(mode))
    }
}

/// The path of an address, or `@NAME` for a name that no file has.
fn name_of(address: &SocketAddr) -> PathBuf {
    let path = address.as_pathname().map(Path::to_owned);
    let hidden = || address.as_abstract_name().map(|name| OsStr::from_bytes(&[b"@", name].concat()).into());
    path.or_else(hidden).unwrap_or_default()
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Locks the folder of a path against other handlers. Gives up after a second, because a process
/// that holds the lock must not keep a handler from its work.
fn lock_folder(path: &Path) -> Option<Flock<File>> {
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut folder = File::open(folder).ok()?;
    let started = Instant::now();
    while started.elapsed() < LOCKED {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((_, errno)) if errno != Errno::EWOULDBLOCK => return None,
            Err((again, _)) => folder = again,
        }
        thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Removes a socket that a dead handler has left.
fn make_room(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Listen { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(there) if !there.file_type().is_socket() => return Err(Error::NotASocket(path.into())),
        Ok(_) => {}
    }
    match knock(path) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(failed),
        // The backlog is full, so the handler is stopped or busy.
        Ok(()) | Err(Errno::EAGAIN) => Err(Error::InUse(path.into())),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Connects without waiting for room in the backlog.
fn knock(path: &Path) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

/// The longest wait for the lock on the folder.
const LOCKED: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(path: &Path) -> Socket {
        Socket::bind(path.into(), SocketAccess::default()).unwrap()
    }

    #[test]
    fn a_socket_file_gets_its_mode_and_group() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let group = nix::unistd::getgid().as_raw();
        for mode in [0o600, 0o666, 0o660] {
            let access = SocketAccess { mode: Some(mode), group: Some(group) };
            let socket = Socket::bind(path.clone(), access).unwrap();
            let file = fs::symlink_metadata(&path).unwrap();
            assert_eq!((file.permissions().mode() & 0o7777, file.gid()), (mode, group));
            UnixStream::connect(&path).unwrap();
            socket.close();
        }
    }

    #[test]
    fn a_file_that_has_replaced_the_socket_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("socket"), folder.path().join("link"));
        let access = SocketAccess { mode: Some(0o666), group: None };
        let file = File::create(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(access.set(&file).is_err());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A hard link to a socket: its name is elsewhere.
        fs::remove_file(&path).unwrap();
        let socket = bound(&path);
        fs::hard_link(&path, &link).unwrap();
        assert!(access.set(socket.file.as_ref().unwrap()).is_err());
        socket.close();
    }

    #[test]
    fn a_refused_group_leaves_no_socket_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // No group has this number, even for root.
        let access = SocketAccess { mode: None, group: Some(u32::MAX - 1) };
        match Socket::bind(path.clone(), access) {
            Ok(socket) => socket.close(),
            Err(error) => assert!(matches!(error, Error::SocketAccess { .. }), "{error}"),
        }
        assert!(!path.exists());
    }

    #[test]
    fn a_close_leaves_an_inherited_socket_to_the_next_handler() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let manager = UnixListener::bind(&path).unwrap();
        let first = Socket::inherit(manager.try_clone().unwrap()).unwrap();
        assert!(first.is_inherited() && first.path() == path);
        let client = UnixStream::connect(&path).unwrap();
        first.close();
        drop(first);
        let next = Socket::inherit(manager).unwrap();
        assert!(path.exists() && UnixStream::connect(&path).is_ok());
        assert_eq!(next.accept().unwrap().peer_addr().unwrap().as_pathname(), None);
        drop(client);
    }

    #[test]
    fn closing_keeps_a_socket_file_of_another_handler() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = bound(&path);
        fs::remove_file(&path).unwrap();
        let second = bound(&path);
        first.close();
        assert!(path.exists());
        second.close();
        assert!(!path.exists());
    }

    #[test]
    fn a_connection_made_before_the_close_is_accepted_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = bound(&folder.path().join("socket"));
        let _client = UnixStream::connect(socket.path()).unwrap();
        let path = socket.path().to_owned();
        socket.close();
        assert!(UnixStream::connect(path).is_err());
        socket.accept().unwrap();
        assert!(socket.accept().is_err());
    }

    #[test]
    fn a_lock_that_another_process_holds_delays_a_handler_by_a_second_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _held = lock_folder(&path).unwrap();
        drop(bound(&path));
    }
}
