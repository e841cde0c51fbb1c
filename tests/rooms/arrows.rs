//! The arrows of a crate: each goes from a file to the file that defines an item which the first file names.

use crate::modules::{Import, Modules, PathOf};
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
pub(crate) struct Arrow {
    pub(crate) from: String,
    pub(crate) line: usize,
    /// As it stands in the text.
    pub(crate) path: String,
    /// The file that defines the item, after all re-exports.
    pub(crate) to: String,
    /// The room of each module through which the path goes, from its first name to the definition.
    pub(crate) rooms: Vec<String>,
}

/// The arrows of a crate; a line for each import of all names, because such an import hides arrows.
pub(crate) fn arrows(files: &BTreeMap<String, String>) -> (Vec<Arrow>, Vec<String>) {
    let modules = Modules::of(files);
    let (mut found, mut globs) = (Vec::new(), Vec::new());
    for at in 0..modules.all.len() {
        let module = &modules.all[at];
        for import in &module.imports {
            let Some(place) = modules.find(at, &import.path.names) else { continue };
            if import.name == "*" {
                let path = import.path.names.join("::");
                globs.push(format!(
                    "{}:{}: `{path}` hides arrows: import each item by its name",
                    module.file, import.path.line
                ));
            }
            if let Some(line) = modules.line_of_use(at, import, &place) {
                found.push(place.arrow(&module.file, line, &import.path));
            }
        }
        for path in &module.paths {
            if let Some(place) = modules.find_path(at, path) {
                found.push(place.arrow(&module.file, path.line, path));
            }
        }
    }
    (found, globs)
}

/// The end of a path.
#[derive(Debug)]
struct Place {
    /// The module that is meant, or that defines the item.
    module: usize,
    file: String,
    /// The names that follow are its variants or functions.
    is_item: bool,
    rooms: Vec<String>,
}

impl Place {
    fn arrow(&self, from: &str, line: usize, path: &PathOf) -> Arrow {
        let (path, rooms) = (path.names.join("::"), self.rooms.clone());
        Arrow { from: from.to_owned(), line, path, to: self.file.clone(), rooms }
    }
}

impl Modules {
    /// The place of a path in code. A name alone is no path, because its import, if any, is the arrow.
    fn find_path(&self, module: usize, path: &PathOf) -> Option<Place> {
        let [name] = path.names.as_slice() else { return self.find(module, &path.names) };
        let file = self.macros.get(name.strip_suffix('!')?)?;
        let module = self.all.iter().position(|module| module.file == *file)?;
        Some(self.place(module))
    }

    /// The line that makes an import an arrow. A module declares the names of its descendants for others by `use`;
    /// these are arrows only where its own code needs them.
    fn line_of_use(&self, at: usize, import: &Import, place: &Place) -> Option<usize> {
        let module = &self.all[at];
        let is_own = place.module != at && self.all[place.module].path.starts_with(&module.path);
        if !is_own {
            return Some(import.path.line);
        }
        let mut uses = module.paths.iter().filter(|path| path.names[0].trim_end_matches('!') == import.name);
        uses.next().map(|path| path.line)
    }

    /// Follows `names` from a module to the definition. None for another crate, or a name of the prelude.
    fn find(&self, module: usize, names: &[String]) -> Option<Place> {
        self.follow(module, names, 0)
    }

    fn follow(&self, module: usize, names: &[String], depth: usize) -> Option<Place> {
        let (first, rest) = names.split_first()?;
        let parent = |module: usize| {
            let path = &self.all[module].path;
            let above = &path[..path.len().checked_sub(1)?];
            self.all.iter().position(|module| module.path == above)
        };
        match first.as_str() {
            "crate" => self.enter(self.place(0), rest, depth),
            "self" => self.enter(self.place(module), rest, depth),
            "super" if rest.first().is_some_and(|next| next == "super") => {
                self.follow(parent(module)?, rest, depth)
            }
            "super" => self.enter(self.place(parent(module)?), rest, depth),
            _ => self.step(&self.place(module), first, rest, depth),
        }
    }

    /// The place that `names` mean in the module of `place`.
    fn enter(&self, place: Place, names: &[String], depth: usize) -> Option<Place> {
        let (false, Some((first, rest))) = (place.is_item, names.split_first()) else { return Some(place) };
        let is_item = self.all[place.module].items.contains(first);
        let found = if is_item { None } else { self.step(&place, first, rest, depth) };
        // A macro may define a name that is neither found nor an item.
        Some(found.unwrap_or(Place { is_item: first != "*", ..place }))
    }

    /// A child module, or a name that the module of `place` imports.
    fn step(&self, place: &Place, first: &str, rest: &[String], depth: usize) -> Option<Place> {
        let module = &self.all[place.module];
        let through = |mut next: Place| {
            next.rooms.splice(0..0, place.rooms.iter().cloned());
            next
        };
        let child = module.children.get(first);
        let imports = || module.imports.iter().filter(|import| import.name == first && depth < 16);
        let imported = |import: &Import| self.follow(place.module, &import.path.names, depth + 1);
        if let Some(child) = child.filter(|_| !rest.is_empty() || imports().next().is_none()) {
            return self.enter(self.place(*child), rest, depth).map(through);
        }
        imports().find_map(imported).and_then(|place| self.enter(place, rest, depth)).map(through)
    }

    fn place(&self, module: usize) -> Place {
        let found = &self.all[module];
        Place {
            module,
            file: found.file.clone(),
            is_item: false,
            rooms: found.path.first().cloned().into_iter().collect(),
        }
    }
}
