//! Links of the documents lead somewhere: files and headings exist, and addresses are well formed. No network is used.

use std::fs;
use std::path::{Path, PathBuf};

/// A link, and the line on which it is.
#[derive(Debug)]
struct Link {
    line: usize,
    target: String,
}

#[test]
fn every_link_of_a_document_leads_to_a_file_or_is_an_address() {
    let documents = files(".md");
    assert!(documents.len() > 10, "{documents:?}");
    let mut seen = 0;
    let mut broken = Vec::new();
    for path in &documents {
        for link in links_of(&read(path)) {
            seen += 1;
            let found = broken_reason(path, &link.target);
            broken
                .extend(found.map(|why| format!("{}:{}: {}: {why}", path.display(), link.line, link.target)));
        }
    }
    assert!(seen > 30, "{seen} links: the test misses some");
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Readers of crates.io and docs.rs have the package, not the repository: a relative link is dead there.
#[test]
fn documents_of_packages_link_only_to_addresses() {
    let of_packages = |ending| files(ending).into_iter().filter(|path| path.starts_with("crates"));
    let readmes: Vec<_> = of_packages("README.md").collect();
    let comments: Vec<_> =
        of_packages(".rs").filter(|path| path.iter().any(|folder| folder == "src")).collect();
    assert!(readmes.len() > 5 && comments.len() > 100);
    let mut relative = Vec::new();
    for path in readmes.iter().chain(&comments) {
        let text = read(path);
        let text = if path.extension().is_some_and(|end| end == "rs") { comments_of(&text) } else { text };
        let links = links_of(&text).into_iter().filter(|link| is_file(&link.target));
        relative.extend(links.map(|link| format!("{}:{}: {}", path.display(), link.line, link.target)));
    }
    assert!(relative.is_empty(), "name the path in the repository without a link:\n{}", relative.join("\n"));
}

#[test]
fn planted_links_are_found_and_broken_ones_are_told() {
    let text = "see [a](guide.md#x), [b][c] and `[no](code)`\n```\n[no](block)\n```\n\n[c]: https://e.org/x\n<https://f.org>";
    let found: Vec<_> = links_of(text).into_iter().map(|link| (link.line, link.target)).collect();
    let expected = [(1, "guide.md#x"), (6, "https://e.org/x"), (7, "https://f.org")];
    assert_eq!(found, expected.map(|(line, target)| (line, target.to_owned())));

    let from = Path::new("README.md");
    for target in ["docs/guide.md", "docs/guide.md#which-server", "https://docs.rs/pagestitch", "#how-fast"] {
        assert_eq!(broken_reason(from, target), None, "{target}");
    }
    for target in ["docs/none.md", "docs/guide.md#none", "https://", "http://a b", "ftp://a.org", "#none"] {
        assert!(broken_reason(from, target).is_some(), "{target}");
    }
    assert!(is_file("../ARCHITECTURE.md") && !is_file("crate::Region#drop") && !is_file("Self::seal()"));
}

/// The reason why a link of a document leads nowhere.
fn broken_reason(from: &Path, target: &str) -> Option<&'static str> {
    if target.contains("://") {
        let host = target.strip_prefix("https://").map(|rest| rest.split('/').next().unwrap_or_default());
        let is_fine = host.is_some_and(|host| host.contains('.')) && !target.contains(char::is_whitespace);
        return (!is_fine).then_some("no https address");
    }
    let (file, heading) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() { from.to_owned() } else { from.parent().expect("a folder").join(file) };
    if !Path::new(ROOT).join(&path).exists() {
        return Some("no such file");
    }
    let has_heading = || read(&path).lines().any(|line| line.starts_with('#') && anchor_of(line) == heading);
    (!heading.is_empty() && !has_heading()).then_some("no such heading")
}

/// The anchor that a heading gets: lower case, with `-` for spaces, and without punctuation.
fn anchor_of(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-' || *c == '_');
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The inline links, reference definitions and bare addresses of a text, outside of code.
fn links_of(text: &str) -> Vec<Link> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (number, line) in text.lines().enumerate() {
        in_code ^= line.trim_start().starts_with("```");
        if !in_code {
            let prose: String = line.split('`').step_by(2).collect();
            found.extend(
                targets_of(&prose).map(|target| Link { line: number + 1, target: target.to_owned() }),
            );
        }
    }
    found
}

fn targets_of(prose: &str) -> impl Iterator<Item = &str> {
    let inline = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let bare = prose.split("<http").skip(1).filter_map(|rest| rest.split_once('>')).map(|(target, _)| target);
    let bare = bare.map(|target| &prose[prose.find(target).expect("it is a part") - 4..][..target.len() + 4]);
    let defined =
        prose.strip_prefix('[').and_then(|rest| rest.split_once("]: ")).map(|(_, target)| target.trim());
    inline.chain(defined).chain(bare)
}

/// The text of documentation comments, line for line.
fn comments_of(source: &str) -> String {
    let doc = |line: &str| {
        let line = line.trim_start();
        let text = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        text.map(|text| text.strip_prefix(' ').unwrap_or(text)).unwrap_or_default().to_owned() + "\n"
    };
    source.lines().map(doc).collect()
}

/// True for a link to a file, unlike one to an item of Rust, to an address, or to a heading.
fn is_file(target: &str) -> bool {
    let file = target.split('#').next().unwrap_or_default();
    let ends = [".md", ".rs", ".toml", ".yaml", ".html"].iter().any(|end| file.ends_with(end));
    !target.contains("://") && (file.contains('/') || ends)
}

/// The files below the root with this ending, without folders of builds and hidden ones. A folder walk
/// in place of git, because the user of a test run need not own the sources, nor have a clone.
fn files(ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(ROOT)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry")) {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let is_hidden = name.starts_with('.') && name != ".github" || name == "target";
            match entry.file_type().expect("a type") {
                kind if kind.is_dir() && !is_hidden => folders.push(path),
                kind if kind.is_file() && name.ends_with(ending) => {
                    found.push(path.strip_prefix(ROOT).expect("a path below").to_owned());
                }
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).expect("a document")
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
