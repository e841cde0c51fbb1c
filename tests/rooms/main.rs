//! Arrows between the rooms of the library go one way, and no files of a crate form a circle.
//!
//! The arrows are all paths in code, and all imports, each to the file that defines the item. Two things are no arrows:
//!
//! * `mod` and `use` in a module for the names of its descendants, because they only declare where names are found. If
//!   the module's own code needs such a name, it is an arrow. So the children of a `mod.rs` may use its items, or it may
//!   use theirs, but not both.
//! * A method called on a value, because only the compiler knows its file.

mod arrows;
mod modules;
mod planted;
mod rules;
mod tokens;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The source files of a crate: the path below `src`, and the text.
fn files_of(source: &Path) -> BTreeMap<String, String> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![source.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(source).expect("below the sources").display().to_string();
                files.insert(name, fs::read_to_string(&path).expect("a text"));
            }
        }
    }
    files
}

/// The errors of a crate's source, and the number of files in its circles.
fn errors_of(source: &Path, has_rooms: bool) -> (Vec<String>, Vec<String>, usize) {
    let (arrows, mut errors) = arrows::arrows(&files_of(source));
    // A module beside the root of its crate may stand alone.
    assert!(!arrows.is_empty() || files_of(source).len() <= 2, "{} has no arrows", source.display());
    if has_rooms {
        errors.extend(rules::wrong_arrows(&arrows));
    }
    let circles = rules::circles(&arrows);
    let described = circles.iter().map(|circle| rules::describe(circle, &arrows)).collect();
    (errors, described, circles.iter().map(Vec::len).sum())
}

#[test]
fn arrows_between_rooms_go_one_way_and_no_files_form_a_circle() {
    // Another tree of sources can be checked, such as an older one.
    let root = std::env::var("PAGESTITCH_ROOT").unwrap_or_else(|_| ROOT.to_owned());
    let (mut wrong, mut left, mut files) = (Vec::new(), Vec::new(), 0);
    for entry in fs::read_dir(Path::new(&root).join("crates")).expect("the folder of crates") {
        let folder = entry.expect("an entry").path();
        let (errors, circles, count) = errors_of(&folder.join("src"), folder.ends_with("pagestitch"));
        let name = folder.file_name().expect("a name").display().to_string();
        wrong.extend(errors.iter().map(|error| format!("crates/{name}/src: {error}")));
        left.extend(circles.iter().map(|circle| format!("crates/{name}/src: {circle}")));
        files += count;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(left.is_empty(), "{files} files are in circles\n{}", left.join("\n"));
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
