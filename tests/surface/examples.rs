//! The builders and the pool have an example for each method; some example shows each other public item.

use crate::DOCUMENTED;
use serde_json::Value;
use std::collections::BTreeSet;

/// The types of which each method has an example: a new user meets them first.
const COMPLETE: [&str; 5] = ["Builder", "Scope", "Pool", "PoolBuilder", "Chunk"];

/// The packages of which an example shows each public method and trait.
const SHOWN: [&str; 4] = ["pagestitch", "pagestitch-firecracker", "pagestitch-tokio", "pagestitch-vm-memory"];

#[test]
fn every_public_method_of_the_builders_and_the_pool_has_an_example() {
    let documented = &DOCUMENTED["pagestitch"];
    for name in COMPLETE {
        let methods = methods_of(documented, name);
        assert!(!methods.is_empty(), "{name} has no method: shorten the list");
        let without: Vec<_> = methods.into_iter().filter(|item| !has_example(item)).map(name_of).collect();
        assert!(without.is_empty(), "{name} has methods without an example in their docs: {without:?}");
    }
}

#[test]
fn each_public_method_and_trait_is_in_an_example() {
    for package in SHOWN {
        let without = without_example(&DOCUMENTED[package]);
        assert!(without.is_empty(), "{package}: no example shows these: {without:#?}");
    }
}

#[test]
fn a_planted_method_without_an_example_is_found() {
    let documented = serde_json::json!({
        "index": {
            "1": {"name": "Pool", "inner": {"struct": {"impls": [2, 3]}}, "visibility": "public", "docs": "```\nPool::new()\n```"},
            "2": {"name": null, "inner": {"impl": {"trait": null, "items": [4, 5, 6]}}},
            "3": {"name": null, "inner": {"impl": {"trait": {"path": "Clone"}, "items": [7]}}},
            "4": {"name": "new", "inner": {"function": {}}, "visibility": "public", "docs": "```\n```"},
            "8": {"name": "Source", "inner": {"trait": {}}, "visibility": "public", "docs": "See Pool::stop."},
            "5": {"name": "stop", "inner": {"function": {}}, "visibility": "public", "docs": "Stops."},
            "6": {"name": "join", "inner": {"function": {}}, "visibility": "default", "docs": null},
            "7": {"name": "clone", "inner": {"function": {}}, "visibility": "default", "docs": null},
        },
    });
    let methods: Vec<_> = methods_of(&documented, "Pool").into_iter().map(name_of).collect();
    assert_eq!(methods, ["new", "stop"]);
    assert_eq!(without_example(&documented), BTreeSet::from(["Pool::stop", "Source"].map(String::from)));
}

/// The public methods of the struct with this name.
fn methods_of<'d>(documented: &'d Value, name: &str) -> Vec<&'d Value> {
    let structs = items(documented).filter(|item| item["inner"]["struct"].is_object());
    structs.filter(|item| item["name"] == name).flat_map(|item| inherent(documented, item)).collect()
}

/// The public methods and traits whose names occur in no example of the package: not in their own docs, nor in those
/// of another item. Counters explain themselves.
fn without_example(documented: &Value) -> BTreeSet<String> {
    let examples: Vec<_> =
        items(documented).filter_map(|item| item["docs"].as_str()).flat_map(code_of).collect();
    let words = examples.iter().flat_map(|code| code.split(|c: char| !is_of_name(c)));
    let known: BTreeSet<_> = words.chain(counters(documented)).collect();
    let is_hidden = |item: &Value| !known.contains(item["name"].as_str().unwrap_or_default());
    let public = || items(documented).filter(|item| item["visibility"] == "public");
    let traits = public().filter(|item| item["inner"]["trait"].is_object() && item["name"] != "Sealed");
    let traits = traits.filter(|item| is_hidden(item)).map(name_of);
    let methods =
        public().flat_map(|item| inherent(documented, item).into_iter().map(move |method| (item, method)));
    let methods = methods.filter(|(_, method)| is_hidden(method));
    traits.chain(methods.map(|(item, method)| format!("{}::{}", name_of(item), name_of(method)))).collect()
}

/// The names of the counters of a region.
fn counters(documented: &Value) -> impl Iterator<Item = &str> {
    let metrics = items(documented).filter(|item| item["name"] == "Metrics");
    let fields = metrics.filter_map(|item| item["inner"]["struct"]["kind"]["plain"]["fields"].as_array());
    let fields = fields.flatten().filter_map(|id| documented["index"].get(id.to_string()));
    fields.filter_map(|field| field["name"].as_str())
}

/// The code blocks of a documentation comment.
fn code_of(docs: &str) -> impl Iterator<Item = &str> {
    docs.split("```").skip(1).step_by(2)
}

const fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The public methods of a type in its own implementations, not in those of traits.
fn inherent<'d>(documented: &'d Value, item: &Value) -> Vec<&'d Value> {
    let by_id = |id: &Value| documented["index"].get(id.to_string());
    let impls = ["struct", "enum"].into_iter().filter_map(|kind| item["inner"][kind]["impls"].as_array());
    let inherent = impls.flatten().filter_map(by_id).map(|item| &item["inner"]["impl"]);
    let methods =
        inherent.filter(|of| of["trait"].is_null()).filter_map(|of| of["items"].as_array()).flatten();
    let methods = methods.filter_map(by_id).filter(|item| item["inner"]["function"].is_object());
    methods.filter(|item| item["visibility"] == "public").collect()
}

fn items(documented: &Value) -> impl Iterator<Item = &Value> {
    documented["index"].as_object().expect("an index").values()
}

fn has_example(item: &Value) -> bool {
    item["docs"].as_str().is_some_and(|docs| docs.contains("```"))
}

fn name_of(item: &Value) -> String {
    item["name"].as_str().unwrap_or("?").to_owned()
}
