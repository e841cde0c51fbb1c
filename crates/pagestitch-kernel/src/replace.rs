//! Writing a file as a whole: a reader, and a machine that crashes, find either the old bytes or
//! the new ones.
//!
//! ```text
//!   PATH ── a regular file, or nothing ──▶ PATH.PID.part, written, then renamed to PATH (to the target of a symbolic link)
//!        └─ a pipe, a device ────────────▶ written to as it is: a rename would replace it
//! ```

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Replaces the bytes of a file, or creates it. An existing file keeps its permissions.
///
/// # Errors
///
/// The errors of the file system. The old file is unchanged then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match Destination::of(path)? {
        Destination::Special => OpenOptions::new().write(true).open(path)?.write_all(bytes),
        Destination::Regular { file, part, permissions } => {
            let written = write(&part, bytes, permissions).and_then(|()| fs::rename(&part, &file));
            written.inspect_err(|_| drop(fs::remove_file(&part)))
        }
    }
}

/// Checks that [`replace`] can work before long work begins: creates its temporary file and removes
/// it.
///
/// # Errors
///
/// As [`replace`], as far as they can be foreseen.
pub fn can_replace(path: &Path) -> io::Result<()> {
    match Destination::of(path)? {
        Destination::Special => Ok(()),
        Destination::Regular { part, .. } => create(&part).and_then(|_| fs::remove_file(&part)),
    }
}

/// The destination of the bytes.
enum Destination {
    /// A pipe or a device.
    Special,
    /// A regular file, which may exist.
    Regular { file: PathBuf, part: PathBuf, permissions: Option<Permissions> },
}

impl Destination {
    fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(there) if there.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(there) if there.is_file() => Self::regular(fs::canonicalize(path)?, Some(&there)),
            Ok(_) => Ok(Self::Special),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::regular(target(path), None),
            Err(error) => Err(error),
        }
    }

    fn regular(file: PathBuf, there: Option<&Metadata>) -> io::Result<Self> {
        // A path without a file name is empty, or ends in `..`.
        let mut part: OsString = file.file_name().ok_or(io::ErrorKind::NotFound)?.to_owned();
        part.push(format!(".{}.part", std::process::id()));
        let part = file.with_file_name(part);
        Ok(Self::Regular { file, part, permissions: there.map(Metadata::permissions) })
    }
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

fn write(part: &Path, bytes: &[u8], permissions: Option<Permissions>) -> io::Result<()> {
    let mut file = create(part)?;
    permissions.map_or(Ok(()), |permissions| file.set_permissions(permissions))?;
    file.write_all(bytes)?;
    // The bytes must reach the disk before the rename does.
    file.sync_data()
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
