//! Any argument for a part of a file is parsed as that part or refused, without an arithmetic
//! overflow.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

#[path = "../../crates/pagestitch-cli/src/part.rs"]
mod part;

#[path = "../../crates/pagestitch-cli/src/size.rs"]
mod size;

use part::Part;

fuzz_target!(|argument: &[u8]| {
    let whole = OsStr::from_bytes(argument);
    let parsed = Part::parse(whole);
    // An existing file whose name looks like a part is that file.
    if argument == b"-" || std::path::Path::new(whole).exists() {
        assert!(parsed.is_ok_and(|part| part.path == whole && part.range.is_none()));
        return;
    }
    if argument.is_empty() {
        assert!(!parsed.expect_err("it names no file").to_string().is_empty());
        return;
    }
    let colon = argument.iter().rposition(|&byte| byte == b':');
    let Some(colon) = colon.filter(|&colon| !argument[colon..].contains(&b'/')) else {
        let part = parsed.expect("without a range it is a name");
        assert!(part.path == whole && part.range.is_none());
        return;
    };
    // A range of no file is refused.
    let expected = model(&argument[colon + 1..]).filter(|_| colon > 0);
    match (parsed, expected) {
        (Ok(part), Some((offset, end))) => {
            assert_eq!(part.path.as_os_str().as_bytes(), &argument[..colon]);
            assert_eq!(part.range, Some(offset..end));
        }
        (Err(refused), None) => assert!(!refused.to_string().is_empty()),
        (parsed, expected) => panic!("{parsed:?}, expected {expected:?}"),
    }
});

/// `OFFSET+LENGTH`, with numbers of any size, base and unit.
fn model(range: &[u8]) -> Option<(u64, u64)> {
    let plus = range.iter().position(|&byte| byte == b'+')?;
    let number = |text: &[u8]| {
        let (digits, base, unit) = match text {
            [b'0', b'x' | b'X', digits @ ..] => (digits, 16, 1),
            [digits @ .., letter, b'i', b'B'] | [digits @ .., letter] if letter.is_ascii_alphabetic() => {
                let power = b"KMGTPE".iter().position(|unit| *unit == letter.to_ascii_uppercase())?;
                (digits, 10, 1_u128 << (10 * (power + 1)))
            }
            digits => (digits, 10, 1),
        };
        let value = digits.iter().try_fold(0_u128, |value, &digit| {
            let digit = char::from(digit).to_digit(base)?;
            Some((value * u128::from(base) + u128::from(digit)).min(1 << 64))
        });
        value.filter(|_| !digits.is_empty()).map(|value| value * unit)
    };
    let (offset, length) = (number(&range[..plus])?, number(&range[plus + 1..])?);
    let fits = |value: u128| u64::try_from(value).ok();
    let (offset, length) = (fits(offset)?, fits(length)?);
    (length > 0).then_some((offset, offset.checked_add(length)?))
}
