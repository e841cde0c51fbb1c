//! The oldest Rust in a crate's manifest is new enough for its dependencies. `ci/msrv` builds with it.

use crate::ROOT;
use serde_json::Value;
use std::collections::HashMap;
use std::process::Command;

#[test]
fn no_dependency_of_a_public_crate_needs_a_newer_rust_than_the_crate() {
    let metadata = metadata();
    let packages: HashMap<_, _> =
        list(&metadata["packages"]).map(|package| (&package["id"], package)).collect();
    let nodes: HashMap<_, _> = list(&metadata["resolve"]["nodes"]).map(|node| (&node["id"], node)).collect();
    let published = list(&metadata["workspace_members"]).filter(|id| packages[id]["publish"].is_null());
    for id in published {
        let ours = packages[id];
        let oldest = version(&ours["rust_version"]).expect("a manifest names the oldest Rust");
        for dependency in dependencies(id, &nodes) {
            let package = packages[dependency];
            let needs = version(&package["rust_version"]).unwrap_or_default();
            let (ours, its) = (&ours["name"], &package["name"]);
            assert!(
                needs <= oldest,
                "{ours} names Rust {oldest:?}, but its dependency {its} needs {needs:?}"
            );
        }
    }
}

/// The dependencies with which a dependent builds a crate, with all features of the crates of this workspace.
fn dependencies<'a>(id: &'a Value, nodes: &HashMap<&Value, &'a Value>) -> Vec<&'a Value> {
    let (mut found, mut next) = (Vec::new(), 0);
    let mut from = id;
    loop {
        for dependency in list(&nodes[from]["deps"]) {
            let used = list(&dependency["dep_kinds"]).any(|kind| kind["kind"] != "dev");
            if used && !found.contains(&&dependency["pkg"]) {
                found.push(&dependency["pkg"]);
            }
        }
        let Some(dependency) = found.get(next) else { return found };
        (from, next) = (dependency, next + 1);
    }
}

fn metadata() -> Value {
    let arguments =
        ["metadata", "--format-version=1", "--all-features", "--filter-platform=x86_64-unknown-linux-gnu"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(ROOT).output().expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The parts of a version, without zeros at its end.
fn version(value: &Value) -> Option<Vec<u32>> {
    let parts = value.as_str()?.trim_end_matches(".0").split('.');
    Some(parts.map(|part| part.parse().expect("a number")).collect())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
