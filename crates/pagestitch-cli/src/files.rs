//! Files that a command writes at its end. Their paths are checked at its beginning.

use crate::usage::Usage;
use pagestitch_kernel::replace::{can_replace, replace};
use std::error::Error;
use std::fs;
use std::io;
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
