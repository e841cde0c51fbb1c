//! `pagestitch probe`: the kernel features that this process may use, and the cost and the remedy of
//! each that is missing.

use crate::output::{Form, table, width};
use comfy_table::ColumnConstraint;
use pagestitch::Support;
use pagestitch_kernel::capabilities::{Capability, Verdict};
use serde_json::json;
use std::error::Error;
use std::io::{Write, stdout};

pub(crate) fn run(form: Form) -> Result<(), Box<dyn Error>> {
    let support = Support::probe();
    let capabilities = support.capabilities();
    if form == Form::Json {
        let rows: Vec<_> = capabilities.iter().map(row).collect();
        let all = json!({
            "kernel": support.kernel(), "page_size": support.page_size().bytes(), "capabilities": rows,
        });
        writeln!(stdout(), "{all:#}")?;
    } else if form == Form::Text {
        writeln!(stdout(), "Linux {}, pages of {}", support.kernel(), support.page_size())?;
        write!(stdout(), "{}", report(&capabilities, width()))?;
    }
    // The exit status tells scripts if pages can be filled on first touch; the output is complete
    // either way.
    support.features().map(drop).map_err(Into::into)
}

/// A table of all features, then the missing ones with their costs and remedies.
fn report(capabilities: &[Capability], width: usize) -> String {
    let wide = width >= WIDE;
    let mut table =
        table(if wide { &["feature", "since", "here", "unlocks"] } else { &["feature", "since", "here"] });
    table.set_width(u16::try_from(width).unwrap_or(u16::MAX));
    for Capability { name, since, unlocks, verdict } in capabilities {
        let here = if *verdict == Verdict::Yes { "yes" } else { "no" };
        let row = [*name, since, here, unlocks];
        table.add_row(&row[..if wide { 4 } else { 3 }]);
    }
    // A broken name cannot be searched for.
    for column in table.column_iter_mut().take(3) {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
    let mut text = format!("{table}\n");
    for Capability { name, verdict, .. } in capabilities {
        let Verdict::No { reason, cost, remedy } = verdict else { continue };
        text += &format!("\n{name}\n");
        for (label, words) in [("missing", reason.as_str()), ("costs", cost), ("cure", remedy)] {
            text += &paragraph(&format!("  {label:<9}"), words, width);
        }
    }
    text
}

/// Words after a label, in lines of a width. Later lines are indented as far as the label reaches.
fn paragraph(label: &str, words: &str, width: usize) -> String {
    let mut text = label.to_owned();
    let mut column = label.len();
    for (nth, word) in words.split_whitespace().enumerate() {
        if nth > 0 && column + 1 + word.len() > width {
            text += &format!("\n{:indent$}", "", indent = label.len());
            column = label.len();
        } else if nth > 0 {
            text.push(' ');
            column += 1;
        }
        text += word;
        column += word.len();
    }
    text + "\n"
}

fn row(capability: &Capability) -> serde_json::Value {
    let Capability { name, since, unlocks, verdict } = capability;
    match verdict {
        Verdict::Yes => json!({"name": name, "since": since, "unlocks": unlocks, "here": true}),
        Verdict::No { reason, cost, remedy } => json!({
            "name": name, "since": since, "unlocks": unlocks, "here": false, "reason": reason, "cost": cost,
            "remedy": remedy,
        }),
    }
}

/// The least width for the column of uses.
const WIDE: usize = 70;

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities() -> [Capability; 2] {
        let no = Verdict::No {
            reason: String::from("the kernel answers: Permission denied (os error 13)"),
            cost: "a system call that reads an absent page returns EFAULT, unless populate() has filled it",
            remedy: String::from("as root: setfacl -m u:1000:rw /dev/userfaultfd"),
        };
        let unlocks = "handing absent pages to system calls (write(2) from a region)";
        let capability = |name, verdict| Capability { name, since: "4.11", unlocks, verdict };
        [capability("kernel-mode faults", no), capability("WP_HUGETLBFS_SHMEM", Verdict::Yes)]
    }

    #[test]
    fn the_report_fits_its_width_and_breaks_no_name() {
        for width in [40, 60, 80, 120] {
            let text = report(&capabilities(), width);
            assert!(text.lines().all(|line| line.trim_end().chars().count() <= width), "{width}:\n{text}");
            for whole in ["kernel-mode faults ", "WP_HUGETLBFS_SHMEM ", "\nkernel-mode faults\n  missing  "] {
                assert!(text.contains(whole), "{whole:?} is not in\n{text}");
            }
            assert_eq!(text.contains("unlocks"), width >= WIDE, "{text}");
            assert!(!text.contains("\nWP_HUGETLBFS_SHMEM\n"), "a present feature has no cost:\n{text}");
        }
    }

    #[test]
    fn a_paragraph_keeps_all_words() {
        let text = paragraph("  cure ", "one two three", 14);
        assert_eq!(text, "  cure one two\n       three\n");
    }
}
