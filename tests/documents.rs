//! The documents name only files that exist, and stay short.

use std::fs;
use std::path::Path;

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(name)).expect(name)
}

#[test]
fn every_path_that_a_document_names_exists() {
    for document in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/debugging.md"] {
        let text = read(document);
        let words = text.split(|c: char| c.is_whitespace() || "`()[],;".contains(c));
        // Without the number of a line.
        let words = words.filter_map(|word| word.split(':').next());
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
fn the_architecture_has_at_most_320_lines() {
    let lines = read("ARCHITECTURE.md").lines().count();
    assert!(lines <= 320, "ARCHITECTURE.md has grown to {lines} lines");
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
