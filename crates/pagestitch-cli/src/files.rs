//! Files that a command writes. Their paths are checked at its beginning, and they appear when they
//! are complete.

use crate::usage::Usage;
use pagestitch_kernel::replace::{Replacement, can_replace, replace};
use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, Write, stdout};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Fails if an output cannot be written, or is one of the inputs or an earlier output, which writing
/// would destroy. Each path comes with its role.
pub(crate) fn check<'a>(
    outputs: impl IntoIterator<Item = (&'static str, &'a Path)>,
    inputs: &[(&'static str, &'a Path)],
) -> Result<(), Box<dyn Error>> {
    let mut taken = inputs.to_vec();
    for (role, output) in outputs {
        if output == Path::new("-") {
            let wrong = format!(
                "the {role} cannot go to standard output: name a file, or ./- for a file of that name"
            );
            return Err(Usage(wrong).into());
        }
        refuse_input(&taken, role, output)?;
        can_replace(output).map_err(|error| cannot_write(output, &error))?;
        taken.push((role, output));
    }
    Ok(())
}

/// An error that does not name the file that it is about.
#[derive(Debug)]
pub(crate) struct OfFile {
    pub(crate) path: PathBuf,
    pub(crate) error: Box<dyn Error>,
}

impl fmt::Display for OfFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.error)
    }
}

impl Error for OfFile {}

/// Writes a file, all or nothing.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    replace(path, bytes).map_err(|error| cannot_write(path, &error))
}

pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> String {
    let folder = folder_of(path);
    let remedy = match error.kind() {
        io::ErrorKind::IsADirectory => ": name a file in it",
        io::ErrorKind::NotFound if !folder.exists() => ": make its folder first",
        _ => "",
    };
    format!("cannot write {}: {error}{remedy}", path.display())
}

/// The folder of a path.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Two paths are of the same file if it has the same number, or is missing in the same folder under
/// the same name. A pipe or a character device has no identity here, because a write destroys none
/// of its bytes.
#[derive(PartialEq)]
enum Identity<'a> {
    Present(u64, u64),
    Missing(PathBuf, &'a OsStr),
}

impl<'a> Identity<'a> {
    fn of(path: &'a Path) -> Option<Self> {
        let Ok(file) = fs::metadata(path) else {
            return Some(Self::Missing(fs::canonicalize(folder_of(path)).ok()?, path.file_name()?));
        };
        let kind = file.file_type();
        (!kind.is_char_device() && !kind.is_fifo()).then(|| Self::Present(file.dev(), file.ino()))
    }
}

/// Refuses an output that is the same file as an input, under any name.
pub(crate) fn refuse_input(inputs: &[(&str, &Path)], role: &str, output: &Path) -> Result<(), Usage> {
    let Some(written) = Identity::of(output) else { return Ok(()) };
    match inputs.iter().find(|(_, input)| Identity::of(input).as_ref() == Some(&written)) {
        Some((other, input)) => Err(Usage(format!(
            "the {role} {} is the {other} {}, which writing would destroy: name another file",
            output.display(),
            input.display()
        ))),
        None => Ok(()),
    }
}

/// The output of many bytes.
pub(crate) enum Output<'a> {
    Stdout,
    /// A file that keeps its old bytes until all new ones are written, or a pipe, or a device.
    File(&'a Path, Replacement),
}

impl<'a> Output<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self, String> {
        if is_stdout(path) {
            return Ok(Self::Stdout);
        }
        let file = Replacement::create(path);
        file.map(|file| Self::File(path, file)).map_err(|error| cannot_replace(path, &error))
    }

    pub(crate) fn writer(&self) -> Box<dyn Write + '_> {
        match self {
            Self::Stdout => Box::new(stdout().lock()),
            Self::File(_, file) => Box::new(file.file()),
        }
    }

    /// Adds the name of the output to an error.
    pub(crate) fn name(&self, error: &io::Error) -> io::Error {
        let reason = match self {
            Self::Stdout => format!("cannot write standard output: {error}"),
            Self::File(path, _) => cannot_replace(path, error),
        };
        match error.kind() {
            // A reader that has gone is no error, and it needs no name.
            kind @ io::ErrorKind::BrokenPipe => kind.into(),
            kind => io::Error::new(kind, reason),
        }
    }

    /// Puts the written bytes in place of the old ones.
    pub(crate) fn commit(self) -> io::Result<()> {
        match self {
            Self::Stdout => Ok(()),
            Self::File(path, file) => {
                file.commit().map_err(|error| io::Error::new(error.kind(), cannot_replace(path, &error)))
            }
        }
    }

    /// The temporary file that a killed process leaves, if there is one.
    pub(crate) fn left_by_a_kill(&self) -> Option<&Path> {
        match self {
            Self::Stdout => None,
            Self::File(_, file) => file.left_by_a_kill(),
        }
    }
}

/// True if a path names standard input, and no file that can be opened by it.
pub(crate) fn is_stdin(path: &Path) -> bool {
    let mut names = ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"].into_iter();
    path == Path::new("-") || names.any(|name| path == Path::new(name)) && !path.is_file()
}

/// True if a path names standard output.
pub(crate) fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].into_iter().any(|name| path == Path::new(name))
}

/// The reason of a failure, with the remedy if another file cannot take the place of an existing one.
fn cannot_replace(path: &Path, error: &io::Error) -> String {
    let reason = cannot_write(path, error);
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ResourceBusy if path.exists() => format!(
            "{reason}: a complete file replaces it, which needs a folder that this user may change: name another file, or use -o - > FILE"
        ),
        _ => reason,
    }
}
