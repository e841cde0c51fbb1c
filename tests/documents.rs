//! The documents name only files that exist, and stay short. Tests and tools match no text of errors.

use std::fs;
use std::path::{Path, PathBuf};

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(name)).expect(name)
}

#[test]
fn every_path_that_a_document_names_exists() {
    for document in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/debugging.md"] {
        let text = read(document);
        let words = text.split(|c: char| c.is_whitespace() || "`()[],;".contains(c));
        // Without the number of a line, or a heading.
        let words = words.filter_map(|word| word.split([':', '#']).next());
        let paths = words.map(|word| word.trim_end_matches('.')).filter(|word| {
            ["crates/", "tests/", "examples/", "benches/", "ci/", ".ci/", "docs/"]
                .iter()
                .any(|start| word.starts_with(start))
        });
        let mut seen = 0;
        for path in paths {
            assert!(Path::new(ROOT).join(path).exists(), "{document} names {path}, which does not exist");
            seen += 1;
        }
        assert!(seen > 0, "{document} names no path: the test finds none");
    }
}

/// ARCHITECTURE.md shortens paths: a room of the library, or `kernel/`.
#[test]
fn every_short_path_of_the_architecture_exists() {
    let text = read("ARCHITECTURE.md");
    let library = Path::new(ROOT).join("crates/pagestitch/src");
    let mut seen = 0;
    for path in text.split('`').filter(|word| word.ends_with(".rs")) {
        let (first, rest) = path.split_once('/').unwrap_or_default();
        let full = match first {
            "kernel" => Path::new(ROOT).join("crates/pagestitch-kernel/src").join(rest),
            room if library.join(room).is_dir() => library.join(path),
            _ => Path::new(ROOT).join(path),
        };
        assert!(full.exists(), "ARCHITECTURE.md names {path}, and {} does not exist", full.display());
        seen += 1;
    }
    assert!(seen > 50, "ARCHITECTURE.md names {seen} paths: the test misses some");
}

#[test]
fn the_architecture_has_at_most_360_lines() {
    let lines = read("ARCHITECTURE.md").lines().count();
    assert!(lines <= 360, "ARCHITECTURE.md has grown to {lines} lines");
}

/// A test or tool that needs to know more than an error's kind gets a method of the error for it.
/// Texts are for people: the tables of `error_messages.rs` and `messages.rs` show each once.
#[test]
fn no_test_or_tool_matches_the_text_of_an_error() {
    // The output of a command is its interface; the test of the rooms writes its own texts; one test
    // reads the standard error of its child.
    let allowed =
        ["crates/pagestitch-cli/", "tests/rooms/", "crates/pagestitch/src/guard.rs", "tests/documents.rs"];
    let mut sources = Vec::new();
    for folder in ["crates", "tests", "examples", "benches", "fuzz"] {
        rust_files(&Path::new(ROOT).join(folder), &mut sources);
    }
    assert!(sources.len() > 200, "{} files: the test misses some", sources.len());
    for path in sources {
        let name = path.strip_prefix(ROOT).unwrap().to_string_lossy();
        if !allowed.iter().any(|start| name.starts_with(start)) {
            let matched = matched_texts(&fs::read_to_string(&path).expect("a source"));
            assert!(matched.is_empty(), "{name} matches the text of an error, not its kind: {matched:?}");
        }
    }
}

#[test]
fn planted_matches_of_texts_are_found() {
    for source in [
        "assert!(error.to_string().contains(\"gone\"));",
        "error\n    .to_string()\n    .starts_with(prefix)",
        "let said = error.to_string(); said.ends_with(\"gone\")",
        "assert_eq!(error.to_string(), \"gone\")",
        "Err(error) if error.contains(\"gone\") => {}",
    ] {
        assert_eq!(matched_texts(source).len(), 1, "{source}");
    }
    for source in ["names.contains(&name)", "plan().to_string().contains(name)", "error.failure()"] {
        assert!(matched_texts(source).is_empty(), "{source}");
    }
}

/// The places of a source that look into the text of an error.
fn matched_texts(source: &str) -> Vec<String> {
    let dense: String = source.chars().filter(|char| !char.is_whitespace()).collect();
    let is_text = |before: &str| {
        let shown = before.ends_with(".to_string()") && !before.ends_with("plan().to_string()");
        shown || ["error", "failure", "said", "told", "why"].iter().any(|word| before.ends_with(word))
    };
    let looks = [".contains(", ".starts_with(", ".ends_with("].into_iter();
    let looks = looks.flat_map(|call| dense.match_indices(call)).filter(|(at, _)| is_text(&dense[..*at]));
    let compared = dense.match_indices("assert_eq!(error.to_string()");
    looks
        .chain(compared)
        .map(|(at, _)| dense[dense.floor_char_boundary(at.saturating_sub(30))..].chars().take(60).collect())
        .collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true if path.ends_with("target") => {}
            true => rust_files(&path, found),
            false if path.extension().is_some_and(|end| end == "rs") => found.push(path),
            false => {}
        }
    }
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
