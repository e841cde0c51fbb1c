//! Writing a file as a whole: a reader, and a machine that crashes, find either the old bytes or
//! the new ones.
//!
//! ```text
//!   PATH ── a regular file, or nothing ──▶ a file without a name, written, then PATH.PID.part, renamed to PATH
//!        │                                 (to the target of a symbolic link)
//!        └─ a pipe, a device ────────────▶ written to as it is: a rename would replace it
//! ```
//!
//! A process that is killed leaves no file without a name. A file system that has no such files,
//! NFS for example, keeps the bytes in PATH.PID.part from the beginning.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Replaces the bytes of a file, or creates it. An existing file keeps its permissions.
///
/// # Errors
///
/// The errors of the file system. The old file is unchanged then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let replacement = Replacement::create(path)?;
    replacement.file().write_all(bytes)?;
    replacement.commit()
}

/// Checks that [`replace`] can work before long work begins: creates its temporary file and removes
/// it.
///
/// # Errors
///
/// As [`replace`], as far as they can be foreseen.
pub fn can_replace(path: &Path) -> io::Result<()> {
    match Destination::of(path)? {
        // A pipe without a reader cannot be opened yet.
        Destination::Special => Ok(()),
        Destination::Regular(regular) => Replacement::of_regular(regular).map(drop),
    }
}

/// A file that takes the place of another one when it is complete. Dropped before, it leaves
/// nothing.
#[derive(Debug)]
pub struct Replacement {
    file: File,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A pipe or a device, which receives the bytes as they are written.
    Special,
    /// A file without a name.
    Unnamed(Regular),
    /// A temporary file.
    Named(Regular),
}

impl Replacement {
    /// Creates the file that will replace the one at a path, with the permissions of that file. A
    /// pipe or a device is opened.
    ///
    /// # Errors
    ///
    /// The errors of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        match Destination::of(path)? {
            Destination::Special => {
                Ok(Self { file: OpenOptions::new().write(true).open(path)?, kind: Kind::Special })
            }
            Destination::Regular(regular) => Self::of_regular(regular),
        }
    }

    fn of_regular(regular: Regular) -> io::Result<Self> {
        let unnamed = regular.create_unnamed()?;
        let named = unnamed.is_none();
        let file = unnamed.map_or_else(|| create(&regular.part), Ok)?;
        let permissions = regular.permissions.clone();
        let kind = if named { Kind::Named(regular) } else { Kind::Unnamed(regular) };
        let created = Self { file, kind };
        permissions.map_or(Ok(()), |permissions| created.file.set_permissions(permissions))?;
        Ok(created)
    }

    /// The file to write to.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The temporary file that a killed process leaves, if there is one. A program that ends without
    /// dropping this value removes it.
    #[must_use]
    pub fn left_by_a_kill(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Named(regular) => Some(&regular.part),
            Kind::Special | Kind::Unnamed(_) => None,
        }
    }

    /// Puts the written bytes in place of the old ones.
    ///
    /// # Errors
    ///
    /// The errors of the file system. The old file is unchanged then.
    pub fn commit(self) -> io::Result<()> {
        let regular = match &self.kind {
            Kind::Special => return Ok(()),
            Kind::Unnamed(regular) | Kind::Named(regular) => regular,
        };
        // The bytes must reach the disk before the rename does.
        self.file.sync_data()?;
        if matches!(self.kind, Kind::Unnamed(_)) {
            regular.name(&self.file)?;
        }
        fs::rename(&regular.part, &regular.file).inspect_err(|_| drop(fs::remove_file(&regular.part)))
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Kind::Named(regular) = &self.kind {
            // After the rename there is none.
            let _ = fs::remove_file(&regular.part);
        }
    }
}

/// The destination of the bytes.
enum Destination {
    /// A pipe or a device.
    Special,
    Regular(Regular),
}

/// A regular file, which may exist.
#[derive(Debug)]
struct Regular {
    file: PathBuf,
    /// Its temporary name, in the same folder, because a rename stays in one file system.
    part: PathBuf,
    /// Those of the file that exists.
    permissions: Option<Permissions>,
}

impl Destination {
    fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(there) if there.is_dir() => Err(Errno::EISDIR.into()),
            Ok(there) if there.is_file() => {
                Regular::new(fs::canonicalize(path)?, Some(&there)).map(Self::Regular)
            }
            Ok(_) => Ok(Self::Special),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Regular::new(target(path), None).map(Self::Regular)
            }
            Err(error) => Err(error),
        }
    }
}

impl Regular {
    fn new(file: PathBuf, there: Option<&Metadata>) -> io::Result<Self> {
        // A path without a file name is empty, or ends in `..`.
        let mut part: OsString = file.file_name().ok_or(io::ErrorKind::NotFound)?.to_owned();
        part.push(format!(".{}.part", std::process::id()));
        let part = file.with_file_name(part);
        Ok(Self { file, part, permissions: there.map(Metadata::permissions) })
    }

    /// Creates a file without a name in the folder. None if the file system has no such files, or
    /// procfs, by which the file gets its name, is absent.
    fn create_unnamed(&self) -> io::Result<Option<File>> {
        let folder = match self.file.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let flags = OFlag::O_TMPFILE.bits();
        match OpenOptions::new().write(true).custom_flags(flags).open(folder) {
            Ok(file) => Ok(Some(file).filter(|file| descriptor(file).symlink_metadata().is_ok())),
            // An old kernel ignores the new bit of the flag: the folder is opened for writing.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::IsADirectory) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives the temporary name to a file without a name.
    fn name(&self, file: &File) -> io::Result<()> {
        let _ = fs::remove_file(&self.part);
        linkat(AT_FDCWD, &descriptor(file), AT_FDCWD, &self.part, AtFlags::AT_SYMLINK_FOLLOW)?;
        Ok(())
    }
}

/// The path of an open file in procfs.
fn descriptor(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// The target of a dangling symbolic link, or else the path itself.
fn target(path: &Path) -> PathBuf {
    let link = fs::read_link(path);
    link.map_or_else(
        |_| path.to_owned(),
        |target| path.parent().unwrap_or_else(|| Path::new("")).join(target),
    )
}

fn create(part: &Path) -> io::Result<File> {
    // A file of this name is a left-over of an earlier process with the same id, so this process
    // may replace it.
    OpenOptions::new().write(true).create(true).truncate(true).open(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of the test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("pagestitch-{test}-{}", std::process::id()));
            fs::create_dir(&folder).unwrap();
            Self(folder)
        }

        fn names(&self) -> Vec<OsString> {
            let mut names: Vec<_> =
                fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_created_and_replaced_with_its_permissions_and_nothing_else_is_left() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("replace");
        let path = folder.0.join("file");
        can_replace(&path).unwrap();
        assert!(folder.names().is_empty(), "a trial leaves nothing");
        replace(&path, b"old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(folder.names(), ["file"]);
    }

    fn unnamed(path: &Path) -> Replacement {
        Replacement::create(path).unwrap()
    }

    /// A replacement that has a temporary name from the beginning, as on NFS.
    fn named(path: &Path) -> Replacement {
        let Ok(Destination::Regular(regular)) = Destination::of(path) else { panic!("a regular file") };
        let file = create(&regular.part).unwrap();
        Replacement { file, kind: Kind::Named(regular) }
    }

    #[test]
    fn a_replacement_that_is_not_committed_leaves_the_old_file_and_nothing_else() {
        let folder = Folder::new("uncommitted");
        let path = folder.0.join("file");
        fs::write(&path, b"old").unwrap();
        let part = format!("file.{}.part", std::process::id());
        for (create, seen) in [(unnamed as fn(&Path) -> _, vec!["file"]), (named, vec!["file", &part])] {
            let replacement: Replacement = create(&path);
            replacement.file().write_all(b"new").unwrap();
            assert_eq!(folder.names(), seen);
            assert_eq!(replacement.left_by_a_kill().is_some(), seen.len() == 2);
            drop(replacement);
            assert_eq!((folder.names(), fs::read(&path).unwrap()), (vec!["file".into()], b"old".to_vec()));
        }
    }

    #[test]
    fn a_file_with_a_temporary_name_is_committed_over_a_left_over() {
        let folder = Folder::new("left-over");
        let path = folder.0.join("file");
        for (nth, create) in [unnamed, named].into_iter().enumerate() {
            fs::write(folder.0.join(format!("file.{}.part", std::process::id())), b"of an earlier process")
                .unwrap();
            let replacement = create(&path);
            replacement.file().write_all(&[nth as u8]).unwrap();
            replacement.commit().unwrap();
            assert_eq!((folder.names(), fs::read(&path).unwrap()), (vec!["file".into()], vec![nth as u8]));
        }
    }

    #[test]
    fn replace_keeps_a_symbolic_link() {
        let folder = Folder::new("link");
        let link = folder.0.join("link");
        std::os::unix::fs::symlink("file", &link).unwrap();
        for bytes in ["old", "new"] {
            replace(&link, bytes.as_bytes()).unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            assert_eq!(fs::read_to_string(folder.0.join("file")).unwrap(), bytes);
        }
        assert_eq!(folder.names(), ["file", "link"]);
    }

    #[test]
    fn an_impossible_path_is_refused_by_the_check_too() {
        let folder = Folder::new("impossible");
        fs::write(folder.0.join("file"), "").unwrap();
        for (path, kind) in [
            (folder.0.clone(), io::ErrorKind::IsADirectory),
            (folder.0.join("no/where"), io::ErrorKind::NotFound),
            (folder.0.join("file/below"), io::ErrorKind::NotADirectory),
            (PathBuf::new(), io::ErrorKind::NotFound),
        ] {
            assert_eq!(can_replace(&path).unwrap_err().kind(), kind, "{}", path.display());
            assert_eq!(replace(&path, b"").unwrap_err().kind(), kind, "{}", path.display());
        }
        assert_eq!(folder.names(), ["file"]);
    }

    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        can_replace(Path::new("/dev/null")).unwrap();
        replace(Path::new("/dev/null"), b"bytes").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let full = replace(Path::new("/dev/full"), b"bytes");
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
