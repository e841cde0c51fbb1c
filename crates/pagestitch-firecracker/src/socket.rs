//! The socket of a handler. A handler takes over the socket file of a dead handler, and removes its
//! own file only.
//!
//! Both happen under a lock on the folder, so that two handlers that start or stop at the same time
//! see each other's changes.

use crate::Error;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, shutdown, socket};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// A listening socket, with its path.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// The file of the socket, held open, so that no other file can get its inode number.
    file: File,
}

impl Socket {
    /// Listens at a path. A socket at which no process listens any more is replaced.
    pub(crate) fn bind(path: PathBuf) -> Result<Self, Error> {
        let failed = |source| Error::Listen { path: path.clone(), source };
        let _alone = lock_folder(&path);
        make_room(&path)?;
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let file =
            File::options().read(true).custom_flags(nix::libc::O_PATH | nix::libc::O_NOFOLLOW).open(&path);
        let file = file.map_err(failed)?;
        Ok(Self { listener, path, file })
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

    /// Accepts no connection made after this call, and frees the path for another handler.
    pub(crate) fn close(&self) {
        self.remove();
        // Without this, the kernel would close pending connections with the listener, in this
        // thread, and the descriptors in them may block.
        let _ = shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// Removes the file of the socket, unless another socket has replaced it.
    fn remove(&self) {
        let _alone = lock_folder(&self.path);
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (ours, there) = (self.file.metadata(), fs::symlink_metadata(&self.path));
        if let (Ok(ours), Ok(there)) = (ours, there)
            && identity(ours) == identity(there)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
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

    #[test]
    fn closing_keeps_a_socket_file_of_another_handler() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = Socket::bind(path.clone()).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Socket::bind(path.clone()).unwrap();
        first.close();
        assert!(path.exists());
        second.close();
        assert!(!path.exists());
    }

    #[test]
    fn a_connection_made_before_the_close_is_accepted_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Socket::bind(folder.path().join("socket")).unwrap();
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
        drop(Socket::bind(path).unwrap());
    }
}
