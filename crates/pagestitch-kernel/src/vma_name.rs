//! Names of mappings in `/proc/PID/maps`: `[anon:pagestitch]`, `[anon:pagestitch:NAME]`.
//!
//! Since Linux 5.17, and only if the kernel has `CONFIG_ANON_VMA_NAME`. A name is for people, so an
//! answer of the kernel is no error.
//!
//! No kernel of Debian 12 has that option, neither 6.1 nor 6.12 of the backports, cloud or generic, so the
//! test of names is skipped in the guests.

use crate::errno::Errno;
use crate::page::AddressRange;
use nix::libc::{self, c_ulong};
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

/// Names a range of anonymous memory `pagestitch`, or `pagestitch:REGION`. The call has no effect
/// on a kernel without such names.
pub(crate) fn set(range: AddressRange, region: Option<&str>) {
    // Whether the kernel has such names does not change.
    static REFUSED: AtomicBool = AtomicBool::new(false);
    if REFUSED.load(Ordering::Relaxed) {
        return;
    }
    let name = name_of(region);
    let (option, attribute) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME as c_ulong);
    let (start, bytes) = (range.start() as c_ulong, range.bytes() as c_ulong);
    // SAFETY: the kernel reads the name, which lives through the call, and changes no byte of the
    // range.
    #[expect(unsafe_code, reason = "prctl")]
    let answer = unsafe { libc::prctl(option, attribute, start, bytes, name.as_ptr()) };
    if Errno::result(answer) == Err(Errno::EINVAL) {
        REFUSED.store(true, Ordering::Relaxed);
    }
}

/// The name with the characters that the kernel allows, cut to the length that it allows.
fn name_of(region: Option<&str>) -> CString {
    let allowed = |char: char| matches!(char, ' '..='~') && !"\\`$[]".contains(char);
    let prefix = if region.is_some() { "pagestitch:" } else { "pagestitch" };
    let chars = prefix.chars().chain(region.unwrap_or_default().chars());
    let name: String = chars.map(|char| if allowed(char) { char } else { '_' }).take(LONGEST).collect();
    CString::new(name).expect("NUL is not allowed")
}

/// The longest name, in bytes: `ANON_VMA_NAME_MAX_LEN` without its NUL.
const LONGEST: usize = 79;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_allowed_characters_and_an_allowed_length() {
        let name = |region| name_of(region).into_string().unwrap();
        assert_eq!(name(None), "pagestitch");
        assert_eq!(name(Some("guest 7")), "pagestitch:guest 7");
        assert_eq!(name(Some("a[b]\0$ü`\\\n")), "pagestitch:a_b_______");
        assert_eq!(name(Some(&"x".repeat(200))).len(), LONGEST);
    }
}
