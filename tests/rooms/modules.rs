//! The modules of a crate, each with the items, the `use` declarations and the paths of its source text.
//!
//! Code under `#[cfg(test)]` or `#[cfg(all(test, …))]` is left out.

use crate::tokens::{Token, tokens};
use std::collections::{BTreeMap, BTreeSet};

/// A path of names in the code of a module: `crate::space::Mapping`, or one name alone.
#[derive(Clone, Debug)]
pub(crate) struct PathOf {
    pub(crate) names: Vec<String>,
    pub(crate) line: usize,
}

/// One name that a `use` declaration brings into a module; `*` for all names.
#[derive(Clone, Debug)]
pub(crate) struct Import {
    pub(crate) name: String,
    pub(crate) path: PathOf,
}

#[derive(Debug, Default)]
pub(crate) struct Module {
    /// Its names from the root of the crate.
    pub(crate) path: Vec<String>,
    pub(crate) file: String,
    pub(crate) children: BTreeMap<String, usize>,
    pub(crate) items: BTreeSet<String>,
    pub(crate) imports: Vec<Import>,
    pub(crate) paths: Vec<PathOf>,
}

/// All modules of a crate; the first is its root.
#[derive(Debug)]
pub(crate) struct Modules {
    pub(crate) all: Vec<Module>,
    /// The file that defines each `macro_rules!` macro.
    pub(crate) macros: BTreeMap<String, String>,
}

impl Modules {
    /// The modules of a crate whose `files` are pairs of a path below `src` and a text.
    pub(crate) fn of(files: &BTreeMap<String, String>) -> Self {
        let mut modules = Self { all: Vec::new(), macros: BTreeMap::new() };
        for root in ["lib.rs", "main.rs"] {
            if files.contains_key(root) {
                modules.read_file(files, root, Vec::new());
            }
        }
        modules
    }

    fn read_file(&mut self, files: &BTreeMap<String, String>, file: &str, path: Vec<String>) -> usize {
        let found = tokens(&files[file]);
        let module = self.add(file, path);
        Reader { files, tokens: &found, at: 0, modules: self }.block(module);
        module
    }

    fn add(&mut self, file: &str, path: Vec<String>) -> usize {
        self.all.push(Module { path, file: file.to_owned(), ..Module::default() });
        self.all.len() - 1
    }
}

/// Reads the tokens of one file.
struct Reader<'a> {
    files: &'a BTreeMap<String, String>,
    tokens: &'a [Token<'a>],
    at: usize,
    modules: &'a mut Modules,
}

impl<'a> Reader<'a> {
    fn text(&self, ahead: usize) -> &'a str {
        self.tokens.get(self.at + ahead).map_or("", |token| token.text)
    }

    fn is_name(&self, ahead: usize) -> bool {
        self.tokens.get(self.at + ahead).is_some_and(Token::is_name)
    }

    /// Reads up to the brace that ends the block of a module, or the end of the file.
    fn block(&mut self, module: usize) {
        let mut depth = 0;
        while self.at < self.tokens.len() {
            match self.text(0) {
                "{" => depth += 1,
                "}" if depth == 0 => return,
                "}" => depth -= 1,
                "#" => {
                    self.attribute();
                    continue;
                }
                "mod" if self.is_name(1) => {
                    self.child(module);
                    continue;
                }
                "use" if self.text(1) != "<" => {
                    self.import(module);
                    continue;
                }
                _ if self.is_name(0) || self.text(0) == "$" => {
                    self.name(module, depth == 0);
                    continue;
                }
                _ => {}
            }
            self.at += 1;
        }
    }

    /// Skips an attribute, and the item below it if that is only compiled in tests.
    fn attribute(&mut self) {
        let start = self.at;
        self.at += 1 + usize::from(self.text(1) == "!");
        if self.text(0) != "[" {
            return;
        }
        self.group();
        let texts: Vec<_> = self.tokens[start..self.at].iter().map(|token| token.text).collect();
        let text = texts.concat();
        if ["#[cfg(test", "#[cfg(all(test", "#[cfg(doctest"].iter().any(|test| text.starts_with(test)) {
            self.skip_item();
        }
    }

    /// Skips what stands between a bracket and its partner.
    fn group(&mut self) {
        let mut depth = 0;
        while self.at < self.tokens.len() {
            match self.text(0) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return;
            }
        }
    }

    /// Skips an item, statement, field or arm: to its `;`, its `,`, or the end of its block.
    fn skip_item(&mut self) {
        let (mut is_use, mut is_item) = (false, false);
        while self.at < self.tokens.len() {
            match self.text(0) {
                "}" => return,
                ";" => break,
                "," if !is_item => break,
                "{" if !is_use => return self.group(),
                "(" | "[" | "{" => {
                    self.group();
                    continue;
                }
                text => {
                    is_use |= text == "use";
                    is_item |= ITEMS.contains(&text) || ["impl", "use"].contains(&text);
                }
            }
            self.at += 1;
        }
        self.at += 1;
    }

    /// A child module in a file of its own, or in the braces that follow.
    fn child(&mut self, parent: usize) {
        let name = self.text(1).to_owned();
        let mut path = self.modules.all[parent].path.clone();
        path.push(name.clone());
        let child = if self.text(2) == "{" {
            let file = self.modules.all[parent].file.clone();
            let child = self.modules.add(&file, path);
            self.at += 3;
            self.block(child);
            child
        } else {
            let folder = path.join("/");
            let (file, nested) = (format!("{folder}.rs"), format!("{folder}/mod.rs"));
            let file = if self.files.contains_key(&file) { file } else { nested };
            assert!(self.files.contains_key(&file), "module {folder} has no file");
            self.at += 2;
            self.modules.read_file(self.files, &file, path)
        };
        self.at += 1;
        self.modules.all[parent].children.insert(name, child);
    }

    fn import(&mut self, module: usize) {
        self.at += 1;
        if self.text(0) == "::" {
            self.at += 1;
        }
        self.tree(module, &[]);
    }

    /// The part of a `use` declaration below the names of `above`.
    fn tree(&mut self, module: usize, above: &[String]) {
        let mut names = above.to_vec();
        let line = self.tokens[self.at].line;
        loop {
            match self.text(0) {
                "{" => {
                    self.at += 1;
                    while !["}", ""].contains(&self.text(0)) {
                        self.tree(module, &names);
                        self.at += usize::from(self.text(0) == ",");
                    }
                    self.at += 1;
                    return;
                }
                "self" if !names.is_empty() => {}
                text => names.push(text.to_owned()),
            }
            self.at += 1;
            if self.text(0) != "::" {
                break;
            }
            self.at += 1;
        }
        let mut name = names.last().cloned().unwrap_or_default();
        if self.text(0) == "as" {
            name = self.text(1).to_owned();
            self.at += 2;
        }
        self.modules.all[module].imports.push(Import { name, path: PathOf { names, line } });
    }

    /// A name with the names that follow it after `::`: a definition, a macro or a path.
    fn name(&mut self, module: usize, may_define: bool) {
        if self.text(0) == "macro_rules" && self.text(1) == "!" {
            let file = self.modules.all[module].file.clone();
            self.modules.macros.insert(self.text(2).to_owned(), file);
            self.at += 3;
            return;
        }
        let is_pointer = self.at > 0 && self.tokens[self.at - 1].text == "*";
        if ITEMS.contains(&self.text(0)) && self.is_name(1) && !ITEMS.contains(&self.text(1)) && !is_pointer {
            let name = self.text(1).to_owned();
            if may_define {
                self.modules.all[module].items.insert(name);
            }
            self.at += 2;
            return;
        }
        self.path(module);
    }

    fn path(&mut self, module: usize) {
        let (start, line) = (self.at, self.tokens[self.at].line);
        self.at += usize::from(self.text(0) == "$");
        let mut names = vec![self.text(0).to_owned()];
        self.at += 1;
        while self.text(0) == "::" && self.is_name(1) {
            names.push(self.text(1).to_owned());
            self.at += 2;
        }
        let before = |back: usize| start.checked_sub(back).map_or("", |at| self.tokens[at].text);
        let is_member = before(1) == "." && before(2) != "." || before(1) == "::";
        let is_binding = names.len() == 1 && self.text(0) == ":";
        if is_member || is_binding {
            return;
        }
        if names.len() == 1 && self.text(0) == "!" {
            names[0].push('!');
        }
        self.modules.all[module].paths.push(PathOf { names, line });
    }
}

const ITEMS: [&str; 8] = ["fn", "struct", "enum", "trait", "type", "const", "static", "union"];
