//! `pagestitch probe`: the kernel features that this process may use.

use crate::output::{Form, table};
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
        let mut table = table(&["feature", "since", "here", "unlocks", "if not"]);
        for capability in &capabilities {
            let Capability { name, since, unlocks, verdict } = capability;
            let (here, remedy) = match verdict {
                Verdict::Yes => ("yes", String::new()),
                Verdict::No { reason, remedy } => ("no", format!("{reason}: {remedy}")),
            };
            table.add_row([name, since, here, unlocks, remedy.as_str()]);
        }
        writeln!(stdout(), "{table}")?;
    }
    // The exit status tells scripts if a region can be built; the output is complete either way.
    support.features().map(drop).map_err(Into::into)
}

fn row(capability: &Capability) -> serde_json::Value {
    let Capability { name, since, unlocks, verdict } = capability;
    match verdict {
        Verdict::Yes => json!({"name": name, "since": since, "unlocks": unlocks, "here": true}),
        Verdict::No { reason, remedy } => json!({
            "name": name, "since": since, "unlocks": unlocks, "here": false, "reason": reason, "remedy": remedy,
        }),
    }
}
