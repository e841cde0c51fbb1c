//! The texts of errors and plans, with the names of Python: `pagestitch` names the calls and options of Rust.

/// Phrases with names that Python lacks, or that need other words in Python.
const PHRASES: [(&str, &str); 8] = [
    (
        "open it for writing too, or map it copy_on_write()",
        "open it for writing too, or pass File(..., in_place=False), which keeps the writes in the region",
    ),
    ("Eager has no thread", "server=\"eager\" has no thread"),
    ("(Eager)", "(server=\"eager\")"),
    ("use a pool", "pass a Pool as the server"),
    ("or fewer workers()", "or a Pool of fewer workers"),
    ("(chunk_ranges())", "(chunks())"),
    ("with inherit_on_fork()", "with inherit_on_fork=True"),
    ("inherit_on_fork() needs", "inherit_on_fork=True needs"),
];

/// Options of Rust's builder that are arguments of `Region`, by the same name.
const ARGUMENTS: [(&str, &str); 4] = [
    ("budget()", "budget"),
    ("inherit_on_fork()", "inherit_on_fork"),
    ("page_aligned()", "page_aligned"),
    ("writable()", "writable"),
];

/// The text with the names of Python.
pub(crate) fn in_python(text: &str) -> String {
    let names = PHRASES.iter().chain(&ARGUMENTS);
    names.fold(text.to_owned(), |text, (rust, python)| text.replace(rust, python))
}
