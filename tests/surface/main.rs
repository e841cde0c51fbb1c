//! Public signatures name types of the standard library, of our own crates, and of a short list of other crates.
//!
//! A type of another crate in a public signature binds a dependent to one version of that crate. The signatures are those
//! that rustdoc finds: functions, fields, variants, re-exports, and implementations of traits.
//!
//! A file of this folder lists the public items of each crate, so that a review sees each change of them.

mod examples;
mod listing;
mod manifests;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::{env, fs};

/// The packages, and the other crates that their signatures may name.
///
/// `bytes` is the container of shared bytes that async libraries hand out. `vm_memory` has the traits for which its crate
/// is made.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("pagestitch-kernel", &[]),
    ("pagestitch", &["bytes"]),
    ("pagestitch-firecracker", &[]),
    ("pagestitch-tokio", &["bytes", "tokio"]),
    ("pagestitch-vm-memory", &["vm_memory"]),
    ("pagestitch-testkit", &[]),
    ("pagestitch-bench", &["hdrhistogram", "serde_core"]),
];
/// The features with which they are read.
const FEATURES: &str = "pagestitch/metrics";

/// The output of rustdoc for the library of each package.
static DOCUMENTED: LazyLock<BTreeMap<&str, Value>> = LazyLock::new(|| {
    let (target, packages) = (target_folder(), ALLOWED.map(|(package, _)| package));
    let status = Command::new(env!("CARGO"))
        .args(["doc", "--quiet", "--no-deps", "--lib", "--features", FEATURES, "--target-dir"])
        .arg(&target)
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .env("RUSTDOC", Path::new(ROOT).join("tests/surface/rustdoc"))
        .env("RUSTDOCFLAGS", "-Zunstable-options --output-format=json")
        .current_dir(ROOT)
        .status();
    assert!(status.expect("cargo").success(), "cargo doc fails");
    let file = |package: &str| target.join("doc").join(package.replace('-', "_")).with_extension("json");
    let read = |package| serde_json::from_slice(&fs::read(file(package)).expect("the output of rustdoc"));
    packages.into_iter().map(|package| (package, read(package).expect("JSON"))).collect()
});

/// The target folder of this build.
fn target_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target folder").to_owned()
}

/// The places whose signatures name a type of another crate, each with the path of the type.
fn foreign_names(documented: &Value, allowed: &[&str]) -> BTreeSet<String> {
    let items = documented["index"].as_object().expect("an index").values();
    let ours = items.filter(|item| item["crate_id"] == 0 && !is_implied(item));
    let mut found = BTreeSet::new();
    for item in ours {
        each_reference(&item["inner"], &mut |id| {
            if let Some(name) = foreign_name(documented, id, allowed) {
                found.insert(format!("{}: {name}", place_of(item)));
            }
        });
    }
    found
}

/// True for an implementation that the compiler adds, such as `Send`.
fn is_implied(item: &Value) -> bool {
    let implementation = &item["inner"]["impl"];
    !implementation["blanket_impl"].is_null() || implementation["is_synthetic"] == true
}

/// Calls `each` with the ids of all types and traits in a part of rustdoc's output.
fn each_reference(part: &Value, each: &mut impl FnMut(&Value)) {
    match part {
        Value::Object(fields) => {
            if fields.contains_key("path") || fields.contains_key("source") {
                fields.get("id").into_iter().for_each(&mut *each);
            }
            fields.values().for_each(|field| each_reference(field, each));
        }
        Value::Array(parts) => parts.iter().for_each(|part| each_reference(part, each)),
        _ => {}
    }
}

/// The path of a type, if its crate may not be named.
fn foreign_name(documented: &Value, id: &Value, allowed: &[&str]) -> Option<String> {
    let summary = documented["paths"].get(id.to_string())?;
    let external = &documented["external_crates"][summary["crate_id"].to_string()];
    let name = external["name"].as_str()?;
    let known = ["std", "core", "alloc"].contains(&name) || name.starts_with("pagestitch");
    let path = || summary["path"].as_array()?.iter().map(Value::as_str).collect::<Option<Vec<_>>>();
    (!known && !allowed.contains(&name)).then(|| path().expect("a path").join("::"))
}

fn place_of(item: &Value) -> String {
    let (span, name) = (&item["span"], item["name"].as_str().unwrap_or("impl"));
    format!("{}:{} ({name})", span["filename"].as_str().unwrap_or("?"), span["begin"][0])
}

#[test]
fn public_signatures_name_no_type_of_another_crate() {
    let mut found = BTreeSet::new();
    for (package, allowed) in ALLOWED {
        let documented = &DOCUMENTED[package];
        found.extend(foreign_names(documented, allowed));
        for name in allowed {
            let others: Vec<_> = allowed.iter().filter(|other| *other != name).copied().collect();
            assert!(
                !foreign_names(documented, &others).is_empty(),
                "{package} does not name {name}: shorten the list"
            );
        }
    }
    let found: Vec<_> = found.into_iter().collect();
    assert!(found.is_empty(), "use a type of std or of our own instead:\n{}", found.join("\n"));
}

/// The changes of a crate's public items, as the lines of a diff. Writes the listing instead if that is asked for.
fn changes(package: &str) -> Vec<String> {
    let file = Path::new(ROOT).join("tests/surface").join(package).with_extension("txt");
    let now = listing::lines(&DOCUMENTED[package]);
    if env::var_os("UPDATE_LISTINGS").is_some() {
        fs::write(&file, now.join("\n") + "\n").expect("a listing");
    }
    let listed = fs::read_to_string(&file).unwrap_or_default();
    let (then, now): (BTreeSet<_>, BTreeSet<_>) =
        (listed.lines().collect(), now.iter().map(String::as_str).collect());
    let gone = then.difference(&now).map(|line| format!("-{line}"));
    gone.chain(now.difference(&then).map(|line| format!("+{line}"))).collect()
}

#[test]
fn public_signatures_are_those_of_the_listings() {
    let changes: Vec<_> = ALLOWED.iter().flat_map(|(package, _)| changes(package)).collect();
    assert!(
        changes.is_empty(),
        "the public items have changed; if that is intended, write the listings with\n\
         UPDATE_LISTINGS=1 cargo test -p pagestitch-tests --test surface\n{}",
        changes.join("\n")
    );
}

#[test]
fn a_planted_name_is_found_in_each_sort_of_signature() {
    let reference = serde_json::json!({"path": "Errno", "id": 7, "args": null});
    let sorts = [
        serde_json::json!({"function": {"sig": {"inputs": [], "output": {"resolved_path": reference}}}}),
        serde_json::json!({"struct_field": {"resolved_path": reference}}),
        serde_json::json!({"impl": {"trait": reference, "blanket_impl": null, "is_synthetic": false}}),
        serde_json::json!({"use": {"source": "nix::errno::Errno", "name": "Errno", "id": 7}}),
    ];
    for inner in sorts {
        let documented = serde_json::json!({
            "index": {"1": {
                "crate_id": 0, "name": "read_at", "inner": inner,
                "span": {"filename": "view.rs", "begin": [4, 1]},
            }},
            "paths": {"7": {"crate_id": 9, "path": ["nix", "errno", "Errno"]}},
            "external_crates": {"9": {"name": "nix"}},
        });
        let found: Vec<_> = foreign_names(&documented, &[]).into_iter().collect();
        assert_eq!(found, ["view.rs:4 (read_at): nix::errno::Errno"]);
        assert!(foreign_names(&documented, &["nix"]).is_empty());
    }
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
