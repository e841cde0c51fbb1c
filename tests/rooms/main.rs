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

/// All errors of a crate's source.
fn errors_of(source: &Path, has_rooms: bool) -> Vec<String> {
    let (arrows, mut errors) = arrows::arrows(&files_of(source));
    assert!(!arrows.is_empty() || files_of(source).len() == 1, "{} has no arrows", source.display());
    if has_rooms {
        errors.extend(rules::wrong_arrows(&arrows));
    }
    errors.extend(rules::circles(&arrows).iter().map(|circle| rules::describe(circle, &arrows)));
    errors
}

#[test]
fn arrows_between_rooms_go_one_way_and_no_files_form_a_circle() {
    // Another tree of sources can be checked, such as an older one.
    let root = std::env::var("PAGESTITCH_ROOT").unwrap_or_else(|_| ROOT.to_owned());
    let (mut report, mut errors) = (String::new(), 0);
    for entry in fs::read_dir(Path::new(&root).join("crates")).expect("the folder of crates") {
        let folder = entry.expect("an entry").path();
        for error in errors_of(&folder.join("src"), folder.ends_with("pagestitch")) {
            errors += 1;
            report +=
                &format!("{}/src: {error}\n", folder.strip_prefix(&root).expect("below the root").display());
        }
    }
    assert!(errors <= CIRCLES_LEFT, "{errors} errors, {CIRCLES_LEFT} are allowed\n{report}");
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Circles that are still there. The number only falls.
const CIRCLES_LEFT: usize = 1;
