//! A number of bytes on the command line: `4096`, `0x1000`, `64K`, `2GiB`.

/// Parses a number of bytes. A letter multiplies it by a power of 1024. None if the text is no
/// such number, or the number is 2^64 or more.
pub(crate) fn parse(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // `from_str_radix` accepts a sign.
        let hexadecimal = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        return u64::from_str_radix(digits, 16).ok().filter(|_| hexadecimal);
    }
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let mut letters = unit.chars();
    let power = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
        None => return digits.parse().ok(),
        Some(letter) => "KMGTPE".find(letter)? as u32 + 1,
    };
    let whole = ["", "iB"].contains(&letters.as_str());
    digits.parse::<u64>().ok().filter(|_| whole)?.checked_mul(1 << (10 * power))
}

/// Examples for errors.
macro_rules! examples {
    () => {
        "4096, 0x1000, 64K or 2G"
    };
}
pub(crate) use examples;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_have_units_and_bases() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 4096),
            ("0XfF", 255),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("3M", 3 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn an_invalid_size_is_refused() {
        for text in [
            "",
            "K",
            "x",
            "0x",
            "0xg",
            "0x+1",
            "-1",
            "+1",
            " 1",
            "1 ",
            "1.5G",
            "64KB",
            "64Ki",
            "64KK",
            "1B",
            "1é",
            "16E",
            "0x10K",
            "1_000",
            "18446744073709551616",
            "0x10000000000000000",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_none(text in ".*") {
            let _ = parse(&text);
        }
    }
}
