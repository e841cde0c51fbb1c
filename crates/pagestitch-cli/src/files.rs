//! Files that are written at the end: a path that cannot be is found at the beginning.

use crate::usage::Usage;
use pagestitch_kernel::replace::{can_replace, replace};
use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Fails if an output cannot be written, or is one of the inputs, which writing would destroy. Each comes with what it is.
pub(crate) fn check<'a>(
    outputs: impl IntoIterator<Item = (&'static str, &'a Path)>,
    inputs: &[(&str, &Path)],
) -> Result<(), Box<dyn Error>> {
    for (what, output) in outputs {
        refuse_input(inputs, what, output)?;
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

/// Refuses an output that is an input, by whatever name.
pub(crate) fn refuse_input(inputs: &[(&str, &Path)], what: &str, output: &Path) -> Result<(), Usage> {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let Some(written) = identity(output) else { return Ok(()) };
    match inputs.iter().find(|(_, input)| identity(input) == Some(written)) {
        Some((is, input)) => Err(Usage(format!(
            "the {what} {} is the {is} {}, which writing would destroy: name another file",
            output.display(),
            input.display()
        ))),
        None => Ok(()),
    }
}
