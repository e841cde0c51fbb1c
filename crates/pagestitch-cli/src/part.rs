//! A part of a file on the command line: `PATH` or `PATH:OFFSET+LENGTH`, in bytes. The path `-` is
//! standard input.

use crate::size;
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

/// The defect of a malformed part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadPart(String);

impl Part {
    /// Parses an argument. An existing file whose name looks like a part is that file.
    pub(crate) fn parse(argument: &OsStr) -> Result<Self, BadPart> {
        let part = Self::split(argument)?;
        if part.path.as_os_str().is_empty() {
            return Err(BadPart(String::from("it names no file: say FILE, or FILE:4096+1000")));
        }
        Ok(part)
    }

    fn split(argument: &OsStr) -> Result<Self, BadPart> {
        if argument == "-" || Path::new(argument).exists() {
            return Ok(Self { path: argument.into(), range: None });
        }
        let bytes = argument.as_bytes();
        let Some(colon) = bytes.iter().rposition(|&byte| byte == b':') else {
            return Ok(Self { path: argument.into(), range: None });
        };
        let (path, range) = (OsStr::from_bytes(&bytes[..colon]), &bytes[colon + 1..]);
        // `dir:x/file` has a colon in the name of a folder, and no range.
        if range.contains(&b'/') {
            return Ok(Self { path: argument.into(), range: None });
        }
        let range = parse_range(&String::from_utf8_lossy(range))?;
        Ok(Self { path: path.into(), range: Some(range) })
    }
}

fn parse_range(text: &str) -> Result<Range<u64>, BadPart> {
    let bad = |defect| BadPart(format!("the range '{text}' {defect}"));
    let (offset, length) =
        text.split_once('+').ok_or_else(|| bad("is not OFFSET+LENGTH, as in FILE:4096+1000"))?;
    let offset = size::parse(offset).ok_or_else(|| bad(BAD_OFFSET))?;
    let length = size::parse(length).ok_or_else(|| bad(BAD_LENGTH))?;
    if length == 0 {
        return Err(bad("is empty: give it a length of 1 or more, or leave it out"));
    }
    let end = offset.checked_add(length).ok_or_else(|| bad("ends beyond 2^64"))?;
    Ok(offset..end)
}

const BAD_OFFSET: &str = concat!(
    "has an offset that is not a size below 2^64: say ",
    size::examples!(),
    ", as in FILE:64K+0x1000"
);
const BAD_LENGTH: &str =
    concat!("has a length that is not a size below 2^64: say ", size::examples!(), ", as in FILE:64K+0x1000");

impl fmt::Display for BadPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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
    fn a_part_is_a_whole_file_or_a_range() {
        let part = |path: &str, range| Ok(Part { path: path.into(), range });
        assert_eq!(parse("no.bin"), part("no.bin", None));
        assert_eq!(parse("no.bin:4096+1000"), part("no.bin", Some(4096..5096)));
        assert_eq!(parse("no.bin:64K+0x10"), part("no.bin", Some(65536..65552)));
        assert_eq!((parse("-"), parse("-:1+2")), (part("-", None), part("-", Some(1..3))));
        assert_eq!(parse("a:b:0+1"), part("a:b", Some(0..1)));
        assert_eq!(parse("dir:x/no.bin"), part("dir:x/no.bin", None));
    }

    #[test]
    fn a_malformed_range_names_its_defect() {
        for (argument, why) in [
            ("", "names no file"),
            (":0+1", "names no file"),
            ("no.bin:", "is not OFFSET+LENGTH"),
            ("no.bin:12", "is not OFFSET+LENGTH"),
            ("no.bin:a+1", "offset that is not a size"),
            ("no.bin:1+b", "length that is not a size"),
            ("no.bin:+1", "offset that is not a size"),
            ("no.bin:1++1", "length that is not a size"),
            ("no.bin:-1+1", "offset that is not a size"),
            ("no.bin:64KB+1", "say 4096, 0x1000, 64K or 2G, as in FILE:64K+0x1000"),
            ("no.bin:5+0", "is empty"),
            ("no.bin:1+18446744073709551615", "ends beyond 2^64"),
            ("no.bin:1+99999999999999999999", "length that is not a size"),
        ] {
            let error = parse(argument).unwrap_err();
            assert!(error.contains(why), "{argument}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_argument_is_parsed_or_refused(argument in ".*") {
            let _ = parse(&argument);
        }

        #[test]
        fn a_range_survives_a_round_trip(offset in 0u64..1 << 62, length in 1u64..1 << 62) {
            let part = parse(&format!("no.bin:{offset}+{length}")).unwrap();
            prop_assert_eq!(part.range, Some(offset..offset + length));
        }
    }
}
