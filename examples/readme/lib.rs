//! Compiles and runs the examples of documents that belong to no package, with the doc tests.
#![cfg(doctest)]
#![doc = include_str!("../../README.md")]

#[doc = include_str!("../../docs/cases.md")]
struct Cases;
#[doc = include_str!("../../docs/containers.md")]
struct Containers;
#[doc = include_str!("../../docs/debugging.md")]
struct Debugging;
#[doc = include_str!("../../docs/failures.md")]
struct Failures;
#[doc = include_str!("../../docs/guide.md")]
struct Guide;
#[doc = include_str!("../../docs/migrating.md")]
struct Migrating;
#[doc = include_str!("../../docs/production.md")]
struct Production;
#[doc = include_str!("../../docs/slow.md")]
struct Slow;
