//! The terms of the command in place of those of the library, whose errors name the methods of a
//! builder and the servers of a program.

use pagestitch::BuildOption;

/// An error of the library, with the options of this command.
pub(crate) fn of_command(text: &str) -> String {
    let text = text.replace("use a pool", "let this process use userfaultfd (see pagestitch probe)");
    OPTIONS.iter().fold(text, |text, (option, name)| replace(&text, &format!("{option}()"), name))
}

/// Replaces a method, where it is not the end of a longer name.
fn replace(text: &str, method: &str, name: &str) -> String {
    let mut parts = text.split(method);
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let is_longer = replaced.ends_with(|before: char| before == '_' || before.is_alphanumeric());
        replaced += if is_longer { method } else { name };
        replaced += part;
    }
    replaced
}

/// The options of the command that set an option of the library.
const OPTIONS: [(BuildOption, &str); 5] = [
    (BuildOption::Budget, "--memory"),
    (BuildOption::Record, "--record"),
    (BuildOption::RecordLatency, "--live"),
    (BuildOption::Replay, "--replay"),
    (BuildOption::Workers, "--workers"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_of_a_builder_is_the_option_of_the_command() {
        assert_eq!(of_command("leave out record() or budget()"), "leave out --record or --memory");
        assert_eq!(of_command("record() it, or fewer workers()"), "--record it, or fewer --workers");
        assert_eq!(of_command("raise max_workers(), or record"), "raise max_workers(), or record");
        assert!(of_command("leave it out, or use a pool").ends_with("(see pagestitch probe)"));
    }
}
