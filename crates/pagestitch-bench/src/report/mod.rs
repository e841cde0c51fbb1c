//! Reports of results.

mod chart;
pub mod compare;
pub mod page;
pub mod table;
