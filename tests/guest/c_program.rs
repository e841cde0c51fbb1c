//! The program of C that shows physical memory through the C library.

use crate::{COMPILER, artifacts, cargo};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the program into a folder: static, because a guest has no libraries.
pub(crate) fn build(folder: &Path) -> Result<PathBuf, String> {
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/pagestitch-capi");
    let program = folder.join("physical-c");
    let mut compiler = Command::new(COMPILER);
    compiler.args(["-static", "-s", "-D_GNU_SOURCE", "-I"]).arg(library.join("include"));
    compiler.arg(library.join("tests/c/physical.c")).arg(archive()?);
    // Unused parts of the archive need symbols that only a shared C library has.
    compiler.args(["-Wl,--gc-sections", "-lm", "-o"]).arg(&program);
    let output = compiler.output().map_err(|error| format!("cannot run gcc: {error}"))?;
    match output.status.success() {
        true => Ok(program),
        false => Err(format!("{compiler:?} failed:\n{}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// The archive of the C library, which cargo has built for the tests of this machine.
fn archive() -> Result<PathBuf, String> {
    let mut command = cargo();
    let messages =
        artifacts(command.args(["test", "--workspace", "--no-run", "--test", "c", "--message-format=json"]))?;
    let files = messages.iter().filter(|message| message["target"]["name"] == "pagestitch_capi");
    let mut files = files.filter_map(|message| message["filenames"].as_array()).flatten();
    let archive = files.find_map(|file| file.as_str().filter(|file| file.ends_with(".a")));
    archive.map(PathBuf::from).ok_or_else(|| String::from("cargo built no archive of the C library"))
}
