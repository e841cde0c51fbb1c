//! An initramfs in the kernel's "newc" cpio format, uncompressed: `/init`, `/dev/console`,
//! `/tests/*`, `/modules/*`.
//! See `Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// Packs programs into `/tests`, the one called `guest-init` as `/init`, and kernel modules into
/// `/modules`.
pub(crate) fn pack(programs: &[PathBuf], modules: &[PathBuf]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "modules", "tests", "tmp"] {
        archive.entry(folder, FOLDER | 0o755, &[], (0, 0));
    }
    archive.entry("dev/console", CHARACTER_DEVICE | 0o600, &[], (5, 1));
    for program in programs {
        archive.entry(&name_in_guest(program), FILE | 0o755, &fs::read(program)?, (0, 0));
    }
    for module in modules {
        let name = format!("modules/{}", module.file_name().unwrap_or_default().to_string_lossy());
        archive.entry(&name, FILE | 0o644, &fs::read(module)?, (0, 0));
    }
    archive.entry("TRAILER!!!", 0, &[], (0, 0));
    Ok(archive.bytes)
}

/// The file name, without the hash that cargo appends.
fn name_in_guest(program: &Path) -> String {
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    match file.split_once('-') {
        Some(("guest", "init")) => String::from("init"),
        Some((name, hash)) if hash.len() == HASH => format!("tests/{name}"),
        _ => format!("tests/{file}"),
    }
}

/// The digits of that hash.
const HASH: usize = 16;

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        // inode, mode, uid, gid, links, mtime, size, device, device of a node, length of the name,
        // checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08x}").bytes()));
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

const FILE: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
