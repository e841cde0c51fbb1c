//! The public items of a crate as sorted lines, from the output of rustdoc.
//!
//! Names in signatures are as written in the source. Of the traits that the compiler adds, the lines have `Send` and `Sync`.

use serde_json::Value;
use std::collections::BTreeSet;

/// The lines of a crate.
pub(crate) fn lines(documented: &Value) -> Vec<String> {
    let mut listing = Listing { index: &documented["index"], lines: BTreeSet::new() };
    let root = listing.item(&documented["root"]).expect("a root module");
    listing.children(&root["inner"]["module"]["items"], name(root));
    listing.lines.into_iter().map(|(path, line)| line.replace(AT, &path)).collect()
}

/// Where the path of an item belongs in its line.
const AT: &str = "\u{0}";

struct Listing<'a> {
    index: &'a Value,
    /// The path of each item, by which the lines are sorted, and its line.
    lines: BTreeSet<(String, String)>,
}

impl<'a> Listing<'a> {
    fn item(&self, id: &Value) -> Option<&'a Value> {
        self.index.get(id.to_string())
    }

    fn add(&mut self, path: &str, line: String) {
        self.lines.insert((path.to_owned(), line));
    }

    fn children(&mut self, ids: &'a Value, parent: &str) {
        let index = self.index;
        for item in array(ids).iter().filter_map(|id| index.get(id.to_string())) {
            self.visit(item, parent, None);
        }
    }

    /// Adds an item and what it contains. A re-export has its own name.
    fn visit(&mut self, item: &'a Value, parent: &str, renamed: Option<&str>) {
        let path = format!("{parent}::{}", renamed.unwrap_or_else(|| name(item)));
        let (kind, inner) = item["inner"].as_object().and_then(|inner| inner.iter().next()).expect("a kind");
        match kind.as_str() {
            "use" => self.visit_use(inner, parent),
            "struct_field" if item["visibility"] == "public" || item["visibility"] == "default" => {
                self.add(&path, format!("pub {AT}: {}", a_type(inner)));
            }
            "struct_field" => {}
            "impl" => self.visit_impl(inner, parent),
            _ => {
                self.add(&path, line_of(item, kind, inner));
                for part in ["items", "variants", "impls"] {
                    self.children(&inner[part], &path);
                }
                for fields in [&inner["kind"]["plain"]["fields"], &inner["kind"]["tuple"]] {
                    self.children(fields, &path);
                }
                self.children(&inner["kind"]["struct"]["fields"], &path);
            }
        }
    }

    fn visit_use(&mut self, inner: &'a Value, parent: &str) {
        let (target, new) = (self.item(&inner["id"]), text(&inner["name"]));
        match target {
            Some(module) if inner["is_glob"] == true => {
                self.children(&module["inner"]["module"]["items"], parent);
            }
            Some(target) => self.visit(target, parent, Some(new)),
            None => {
                self.add(&format!("{parent}::{new}"), format!("pub use {AT} = {}", text(&inner["source"])))
            }
        }
    }

    /// Adds an implementation of a trait, or the items of an inherent one.
    fn visit_impl(&mut self, inner: &'a Value, parent: &str) {
        if !inner["blanket_impl"].is_null() {
            return;
        }
        if inner["trait"].is_null() {
            return self.children(&inner["items"], parent);
        }
        let of = path(&inner["trait"]);
        let implied = inner["is_synthetic"] == true && of != "Send" && of != "Sync";
        if implied || of == "StructuralPartialEq" {
            return;
        }
        let not = if inner["is_negative"] == true { "!" } else { "" };
        let (generics, bounds) = generics(&inner["generics"]);
        let target = a_type(&inner["for"]);
        let own = parent.rsplit("::").next().and_then(|name| target.strip_prefix(name));
        // An implementation is listed with each type in it. Its own type's list is the right one.
        if own.is_none() && self.index.get(inner["for"]["resolved_path"]["id"].to_string()).is_some() {
            return;
        }
        let target = own.map(|arguments| format!("{AT}{arguments}")).unwrap_or(target);
        self.add(parent, format!("impl{generics} {not}{of} for {target}{bounds}"));
    }
}

/// The line of an item that has a name.
fn line_of(item: &Value, kind: &str, inner: &Value) -> String {
    let (generics, bounds) = generics(&inner["generics"]);
    match kind {
        "function" => function(AT, inner),
        "trait" => {
            let safety = if inner["is_unsafe"] == true { "unsafe " } else { "" };
            let supertraits = all_bounds(&inner["bounds"], ": ");
            format!("pub {safety}trait {AT}{generics}{supertraits}{bounds}")
        }
        "variant" => format!("pub variant {AT}"),
        "constant" => format!("pub const {AT}: {}", a_type(&inner["type"])),
        "assoc_const" => format!("pub const {AT}: {}", a_type(&inner["type"])),
        "static" => format!("pub static {AT}: {}", a_type(&inner["type"])),
        "assoc_type" => {
            let default = if inner["type"].is_null() {
                String::new()
            } else {
                format!(" = {}", a_type(&inner["type"]))
            };
            format!("pub type {AT}{generics}{}{default}", all_bounds(&inner["bounds"], ": "))
        }
        "type_alias" => format!("pub type {AT}{generics} = {}", a_type(&inner["type"])),
        "struct" | "enum" => {
            let open = array(&item["attrs"]).iter().any(|attribute| attribute == "non_exhaustive");
            format!("{}pub {kind} {AT}{generics}{bounds}", if open { "#[non_exhaustive] " } else { "" })
        }
        "module" => format!("pub mod {AT}"),
        _ => format!("pub {kind} {AT}"),
    }
}

fn function(path: &str, inner: &Value) -> String {
    let header = &inner["header"];
    let mut out = String::from("pub ");
    for (flag, word) in [("is_const", "const "), ("is_async", "async "), ("is_unsafe", "unsafe ")] {
        out += if header[flag] == true { word } else { "" };
    }
    let (generics, bounds) = generics(&inner["generics"]);
    format!("{out}fn {path}{generics}{}{bounds}", signature(&inner["sig"]))
}

fn signature(sig: &Value) -> String {
    let inputs = array(&sig["inputs"]).iter().map(|input| {
        let (name, kind) = (text(&input[0]), a_type(&input[1]));
        match (name, kind.as_str()) {
            ("self", "Self") => String::from("self"),
            ("self", "&Self") => String::from("&self"),
            ("self", "&mut Self") => String::from("&mut self"),
            ("" | "_", _) => kind,
            _ => format!("{name}: {kind}"),
        }
    });
    let output =
        if sig["output"].is_null() { String::new() } else { format!(" -> {}", a_type(&sig["output"])) };
    format!("({}){output}", list(inputs))
}

/// The parameters in angle brackets, and the `where` clause.
fn generics(generics: &Value) -> (String, String) {
    let params = array(&generics["params"]).iter().filter_map(|param| {
        let (name, kind) = (text(&param["name"]), &param["kind"]);
        if let Some(lifetime) = kind.get("lifetime") {
            let outlives: Vec<_> = array(&lifetime["outlives"]).iter().map(text).collect();
            let bounds =
                if outlives.is_empty() { String::new() } else { format!(": {}", outlives.join(" + ")) };
            return Some(format!("{name}{bounds}"));
        }
        if let Some(constant) = kind.get("const") {
            return Some(format!("const {name}: {}", a_type(&constant["type"])));
        }
        // An `impl Trait` in an argument is a parameter, too.
        let kind = &kind["type"];
        (kind["is_synthetic"] != true).then(|| format!("{name}{}", all_bounds(&kind["bounds"], ": ")))
    });
    let params = list(params);
    let params = if params.is_empty() { params } else { format!("<{params}>") };
    let wheres = array(&generics["where_predicates"]).iter().map(|predicate| {
        let bound = &predicate["bound_predicate"];
        match bound.is_null() {
            false => format!("{}{}", a_type(&bound["type"]), all_bounds(&bound["bounds"], ": ")),
            true => predicate.to_string(),
        }
    });
    let wheres = list(wheres);
    (params, if wheres.is_empty() { wheres } else { format!(" where {wheres}") })
}

fn all_bounds(bounds: &Value, before: &str) -> String {
    let bounds: Vec<_> = array(bounds).iter().map(bound).collect();
    if bounds.is_empty() { String::new() } else { format!("{before}{}", bounds.join(" + ")) }
}

fn bound(bound: &Value) -> String {
    if let Some(lifetime) = bound["outlives"].as_str() {
        return lifetime.to_owned();
    }
    if let Some(captured) = bound.get("use") {
        let names = array(captured)
            .iter()
            .map(|name| text(name.get("lifetime").unwrap_or_else(|| &name["param"])).to_owned());
        return format!("use<{}>", list(names));
    }
    let (bound, maybe) = (&bound["trait_bound"], bound["trait_bound"]["modifier"] == "maybe");
    format!(
        "{}{}{}",
        if maybe { "?" } else { "" },
        for_lifetimes(&bound["generic_params"]),
        path(&bound["trait"])
    )
}

fn for_lifetimes(params: &Value) -> String {
    let names = list(array(params).iter().map(|param| text(&param["name"]).to_owned()));
    if names.is_empty() { names } else { format!("for<{names}> ") }
}

fn a_type(value: &Value) -> String {
    let Some((kind, inner)) = value.as_object().and_then(|kinds| kinds.iter().next()) else {
        return text(value).to_owned();
    };
    match kind.as_str() {
        "resolved_path" => path(inner),
        "generic" | "primitive" => text(inner).to_owned(),
        "tuple" => format!("({})", list(array(inner).iter().map(a_type))),
        "slice" => format!("[{}]", a_type(inner)),
        "array" => format!("[{}; {}]", a_type(&inner["type"]), text(&inner["len"])),
        "impl_trait" => format!("impl {}", all_bounds(inner, "")),
        "raw_pointer" if inner["is_mutable"] == true => format!("*mut {}", a_type(&inner["type"])),
        "raw_pointer" => format!("*const {}", a_type(&inner["type"])),
        "borrowed_ref" => reference(inner),
        "dyn_trait" => dyn_trait(inner),
        "function_pointer" => format!("fn{}", signature(&inner["sig"])),
        "qualified_path" => qualified(inner),
        _ => value.to_string(),
    }
}

fn reference(inner: &Value) -> String {
    let lifetime = inner["lifetime"].as_str().map(|name| format!("{name} ")).unwrap_or_default();
    let mutable = if inner["is_mutable"] == true { "mut " } else { "" };
    format!("&{lifetime}{mutable}{}", a_type(&inner["type"]))
}

fn dyn_trait(inner: &Value) -> String {
    let traits = array(&inner["traits"]).iter();
    let mut all: Vec<_> = traits
        .map(|one| format!("{}{}", for_lifetimes(&one["generic_params"]), path(&one["trait"])))
        .collect();
    all.extend(inner["lifetime"].as_str().map(str::to_owned));
    format!("dyn {}", all.join(" + "))
}

fn qualified(inner: &Value) -> String {
    let (owner, name) = (a_type(&inner["self_type"]), text(&inner["name"]));
    let of = &inner["trait"];
    match of.is_null() || owner == "Self" {
        true => format!("{owner}::{name}"),
        false => format!("<{owner} as {}>::{name}", path(of)),
    }
}

/// A path with its arguments. A path from the root of the crate is shown by its last name, as an imported one.
fn path(value: &Value) -> String {
    let (name, args) = (text(&value["path"]), &value["args"]);
    let name = if name.trim_start_matches('$').starts_with("crate::") {
        name.rsplit("::").next().unwrap_or(name)
    } else {
        name
    };
    if let Some(parenthesized) = args.get("parenthesized") {
        let inputs = list(array(&parenthesized["inputs"]).iter().map(a_type));
        let output = &parenthesized["output"];
        let output = if output.is_null() { String::new() } else { format!(" -> {}", a_type(output)) };
        return format!("{name}({inputs}){output}");
    }
    let args = &args["angle_bracketed"];
    let plain = array(&args["args"]).iter().map(argument);
    let equal = array(&args["constraints"]).iter().map(|constraint| {
        let (name, binding) = (text(&constraint["name"]), &constraint["binding"]);
        match binding.get("equality") {
            Some(equal) => format!("{name} = {}", argument_or_type(equal)),
            None => format!("{name}{}", all_bounds(&binding["constraint"], ": ")),
        }
    });
    let args = list(plain.chain(equal));
    if args.is_empty() { name.to_owned() } else { format!("{name}<{args}>") }
}

fn argument(value: &Value) -> String {
    match (value.get("lifetime"), value.get("const")) {
        (Some(lifetime), _) => text(lifetime).to_owned(),
        (_, Some(constant)) => text(&constant["expr"]).to_owned(),
        _ => argument_or_type(value),
    }
}

fn argument_or_type(value: &Value) -> String {
    a_type(value.get("type").unwrap_or(value))
}

fn list(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("_")
}

fn name(item: &Value) -> &str {
    text(&item["name"])
}
