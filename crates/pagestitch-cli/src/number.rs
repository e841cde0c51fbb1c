//! Numbers on the command line. An error says the limits.

use clap::builder::TypedValueParser;

/// Parses a number from 1 to `most`. The error says these limits.
pub(crate) fn up_to<T: TryFrom<u64> + Clone + Send + Sync + 'static>(
    most: u64,
) -> impl TypedValueParser<Value = T> {
    move |text: &str| {
        let number = text.parse().ok().filter(|number| (1..=most).contains(number));
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| format!("say a number from 1 to {most}"))
    }
}

/// Parses any number below 2^64, such as the seed of a run.
pub(crate) fn any(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("say a number from 0 to {}", u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    #[test]
    fn a_number_outside_of_the_limits_is_refused_with_them() {
        let command = Command::new("test").arg(Arg::new("n").value_parser(up_to::<u16>(300)));
        for (text, expected) in [("1", Some(1)), ("300", Some(300)), ("0", None), ("301", None), ("x", None)]
        {
            let matches = command.clone().try_get_matches_from(["test", text]);
            assert_eq!(
                matches.as_ref().ok().and_then(|found| found.get_one::<u16>("n").copied()),
                expected,
                "{text}"
            );
            if let Err(error) = matches {
                assert!(error.to_string().contains("say a number from 1 to 300"), "{error}");
            }
        }
    }
    #[test]
    fn any_number_is_said_with_its_limits() {
        assert_eq!(any("0"), Ok(0));
        assert_eq!(any("18446744073709551615"), Ok(u64::MAX));
        for text in ["", "x", "-1", "18446744073709551616"] {
            assert_eq!(any(text), Err("say a number from 0 to 18446744073709551615".to_owned()), "{text}");
        }
    }
}
