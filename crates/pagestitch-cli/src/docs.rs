//! `pagestitch completions` and `pagestitch man`: documents that are generated from the arguments.

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;
use std::error::Error;
use std::io::{Write, stdout};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct CompletionsOptions {
    /// The shell. For bash: pagestitch completions bash > /etc/bash_completion.d/pagestitch
    shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManOptions {
    /// An existing folder for a page for each command
    folder: Option<PathBuf>,
}

/// Prints the script of a shell.
pub(crate) fn completions(options: &CompletionsOptions, mut command: Command) -> Result<(), Box<dyn Error>> {
    // `generate` panics if the reader of standard output has gone.
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "pagestitch", &mut script);
    Ok(stdout().write_all(&script)?)
}

/// Prints the manual page of the command, or writes those of all commands to a folder.
pub(crate) fn manual(options: &ManOptions, command: Command) -> Result<(), Box<dyn Error>> {
    match &options.folder {
        Some(folder) => {
            let remedy = if folder.is_dir() { "" } else { ": name an existing folder" };
            let failed = |error| format!("cannot write to {}: {error}{remedy}", folder.display());
            Ok(clap_mangen::generate_to(command, folder).map_err(failed)?)
        }
        None => Ok(Man::new(command).render(&mut stdout())?),
    }
}
