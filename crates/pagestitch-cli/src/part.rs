//! A part of a file on the command line: `PATH` or `PATH:OFFSET+LENGTH`, in bytes.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A whole file, or a range of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    pub(crate) range: Option<Range<u64>>,
}

/// A range that is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadPart {
    range: String,
    why: &'static str,
}

impl Part {
    /// Reads an argument. A file whose name looks like a part, and exists, is that file.
    pub(crate) fn parse(argument: &OsStr) -> Result<Self, BadPart> {
        if Path::new(argument).exists() {
            return Ok(Self { path: argument.into(), range: None });
        }
        let bytes = argument.as_bytes();
        let Some(colon) = bytes.iter().rposition(|&byte| byte == b':') else {
            return Ok(Self { path: argument.into(), range: None });
        };
        let (path, range) = (OsStr::from_bytes(&bytes[..colon]), &bytes[colon + 1..]);
        // `dir:x/file` has a colon in a directory's name, and no range.
        if range.contains(&b'/') {
            return Ok(Self { path: argument.into(), range: None });
        }
        let range = parse_range(&String::from_utf8_lossy(range))?;
        Ok(Self { path: path.into(), range: Some(range) })
    }
}

fn parse_range(text: &str) -> Result<Range<u64>, BadPart> {
    let bad = |why| BadPart { range: text.to_owned(), why };
    let (offset, length) =
        text.split_once('+').ok_or_else(|| bad("is not OFFSET+LENGTH, as in FILE:4096+1000"))?;
    let number = |digits: &str, why| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
        true => digits.parse::<u64>().map_err(|_| bad(why)),
        false => Err(bad(why)),
    };
    let offset = number(offset, "has an offset that is not a number of bytes below 2^64")?;
    let length = number(length, "has a length that is not a number of bytes below 2^64")?;
    if length == 0 {
        return Err(bad("is empty: give it a length of 1 or more, or leave it out"));
    }
    let end = offset.checked_add(length).ok_or_else(|| bad("ends past 2^64"))?;
    Ok(offset..end)
}

impl fmt::Display for BadPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the range '{}' {}", self.range, self.why)
    }
}

impl std::error::Error for BadPart {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(argument: &str) -> Result<Part, String> {
        Part::parse(OsStr::new(argument)).map_err(|error| error.to_string())
    }

    #[test]
    fn whole_files_and_ranges_are_told_apart() {
        let part = |path: &str, range| Ok(Part { path: path.into(), range });
        assert_eq!(parse("no.bin"), part("no.bin", None));
        assert_eq!(parse("no.bin:4096+1000"), part("no.bin", Some(4096..5096)));
        assert_eq!(parse("a:b:0+1"), part("a:b", Some(0..1)));
        assert_eq!(parse("dir:x/no.bin"), part("dir:x/no.bin", None));
    }

    #[test]
    fn bad_ranges_say_why() {
        for (argument, why) in [
            ("no.bin:", "is not OFFSET+LENGTH"),
            ("no.bin:12", "is not OFFSET+LENGTH"),
            ("no.bin:a+1", "offset that is not a number"),
            ("no.bin:1+b", "length that is not a number"),
            ("no.bin:+1", "offset that is not a number"),
            ("no.bin:1++1", "length that is not a number"),
            ("no.bin:-1+1", "offset that is not a number"),
            ("no.bin:5+0", "is empty"),
            ("no.bin:1+18446744073709551615", "ends past 2^64"),
            ("no.bin:1+99999999999999999999", "length that is not a number"),
        ] {
            let said = parse(argument).unwrap_err();
            assert!(said.contains(why), "{argument}: {said}");
        }
    }

    proptest! {
        #[test]
        fn any_argument_is_read_or_refused(argument in ".*") {
            let _ = parse(&argument);
        }

        #[test]
        fn a_range_is_read_back(offset in 0u64..1 << 62, length in 1u64..1 << 62) {
            let part = parse(&format!("no.bin:{offset}+{length}")).unwrap();
            prop_assert_eq!(part.range, Some(offset..offset + length));
        }
    }
}
