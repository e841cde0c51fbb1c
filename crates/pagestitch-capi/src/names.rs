//! The texts of errors, with the names of C: `pagestitch` names the calls and options of Rust.

/// Phrases with names that C lacks, or that need other words in C. Earlier ones come first.
const PHRASES: [(&str, &str); 17] = [
    ("add write_back(), or leave out", "leave out"),
    ("track_changes() and write_back()", "track_changes()"),
    ("track_changes(), write_back() or", "track_changes() or"),
    ("write_back() or budget()", "budget()"),
    ("map it copy_on_write(), copy it, or", "copy it by ps_add_file() or ps_add_memory(), or"),
    (
        "open it for writing too, or map it copy_on_write()",
        "call ps_builder_writable() before ps_add_file_in_place(), or pass a descriptor that is open for writing",
    ),
    ("build it writable() to write to it", "call writable() before the build to write to it"),
    ("build it with capacity()", "call capacity() before the build"),
    ("build it with track_changes()", "call track_changes() before the build"),
    ("(chunk_ranges())", "(ps_region_offset_of() has their starts)"),
    ("or fewer workers()", "or fewer `workers` in ps_pool_options"),
    ("see max_workers()", "see `max_workers` in ps_pool_options"),
    ("the Manual belongs to", "the manual server belongs to"),
    ("make a Manual in", "make a manual server in"),
    ("Eager has no thread", "ps_server_eager() has no thread"),
    ("the server Eager", "ps_server_eager()"),
    ("which Eager does without", "which ps_server_eager() does without"),
];

/// Each call of Rust that an error names, and that of C.
const CALLS: [(&str, &str); 15] = [
    ("append", "ps_region_append"),
    ("budget", "ps_builder_budget"),
    ("Budget::bytes", "ps_budget_new"),
    ("capacity", "ps_builder_capacity"),
    ("changes", "ps_region_changes"),
    ("inherit_on_fork", "ps_builder_inherit_on_fork"),
    ("populate", "ps_region_populate"),
    ("prefetch", "ps_region_prefetch"),
    ("read_at", "ps_region_read"),
    ("require_zero_copy", "ps_builder_require_zero_copy"),
    ("retry_failed", "ps_region_retry_failed"),
    ("save_changes", "ps_region_save_changes"),
    ("track_changes", "ps_builder_track_changes"),
    ("writable", "ps_builder_writable"),
    ("write_at", "ps_region_write"),
];

/// The text with the names of C.
pub(crate) fn in_c(text: &str) -> String {
    let text = PHRASES.iter().fold(text.to_owned(), |text, (rust, c)| text.replace(rust, c));
    let Some((calls, rest)) = text.rsplit_once("()") else { return text };
    calls.split("()").map(|part| call_in_c(part) + "()").collect::<String>() + rest
}

/// A part of the text that ends with the name of a call.
fn call_in_c(part: &str) -> String {
    let start = part.rfind(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).map_or(0, |at| at + 1);
    let (before, name) = part.split_at(start);
    let found = CALLS.iter().find(|(rust, _)| *rust == name);
    format!("{before}{}", found.map_or(name, |(_, c)| c))
}

#[cfg(test)]
mod tests {
    use super::in_c;

    #[test]
    fn calls_of_rust_become_calls_of_c() {
        let texts = [
            (
                "region r has no record for changes(): build it with track_changes()",
                "region r has no record for ps_region_changes(): call ps_builder_track_changes() before the build",
            ),
            (
                "add write_back(), or leave out writable() or budget()",
                "leave out ps_builder_writable() or ps_builder_budget()",
            ),
            (
                "leave out track_changes(), write_back() or capacity()",
                "leave out ps_builder_track_changes() or ps_builder_capacity()",
            ),
            ("mount /proc, or use Budget::bytes()", "mount /proc, or use ps_budget_new()"),
            ("(populate())", "(ps_region_populate())"),
            ("read_at", "read_at"),
            ("unknown() of ps_server_pool()é", "unknown() of ps_server_pool()é"),
            ("", ""),
        ];
        for (rust, c) in texts {
            assert_eq!(in_c(rust), c);
        }
    }
}
