//! Files that a command writes. Their paths are checked at its beginning, and they appear when they
//! are complete.

use crate::usage::Usage;
use pagestitch_kernel::replace::{Replacement, can_replace, replace};
use std::error::Error;
use std::fs;
use std::io::{self, Write, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Fails if an output cannot be written, or is one of the inputs, which writing would destroy. Each
/// path comes with its role.
pub(crate) fn check<'a>(
    outputs: impl IntoIterator<Item = (&'static str, &'a Path)>,
    inputs: &[(&str, &Path)],
) -> Result<(), Box<dyn Error>> {
    for (role, output) in outputs {
        if output == Path::new("-") {
            let wrong = format!(
                "the {role} cannot go to standard output: name a file, or ./- for a file of that name"
            );
            return Err(Usage(wrong).into());
        }
        refuse_input(inputs, role, output)?;
        can_replace(output).map_err(|error| cannot_write(output, &error))?;
    }
    Ok(())
}

/// Writes a file, all or nothing.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    replace(path, bytes).map_err(|error| cannot_write(path, &error))
}

pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// Refuses an output that is the same file as an input, under any name.
pub(crate) fn refuse_input(inputs: &[(&str, &Path)], role: &str, output: &Path) -> Result<(), Usage> {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let Some(written) = identity(output) else { return Ok(()) };
    match inputs.iter().find(|(_, input)| identity(input) == Some(written)) {
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
            Self::Stdout => cannot_write(Path::new("-"), error),
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
