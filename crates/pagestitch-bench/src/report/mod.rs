//! Reports of results.

mod axis;
mod chart;
mod columns;
pub mod compare;
mod html_table;
pub mod page;
pub mod table;
mod targets;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
