//! A defect of `MADV_POPULATE_READ` before Linux 6.9: it does not end at a page of a file that cannot
//! be read, because each attempt gives up the lock of the memory map and begins anew.

use nix::sys::utsname::uname;
use std::sync::OnceLock;

/// True if the kernel may have the defect. Some older kernels have the fix too, and do not tell.
pub(crate) fn may_not_end() -> bool {
    static MAY_NOT_END: OnceLock<bool> = OnceLock::new();
    *MAY_NOT_END.get_or_init(|| uname().map_or(true, |names| has_defect(&names.release().to_string_lossy())))
}

/// True for a release before 6.9, and for one that does not tell its version.
fn has_defect(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    match (next(), next()) {
        (Some(major), Some(minor)) => (major, minor) < (6, 9),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_with_the_endless_populate_are_recognised() {
        for release in ["5.14.0", "6.1.0-50-cloud-amd64", "6.8.12", "?", ""] {
            assert!(has_defect(release), "{release}");
        }
        for release in ["6.9.0", "6.12.95+deb12", "6.18", "7.0-rc1"] {
            assert!(!has_defect(release), "{release}");
        }
    }
}
