//! Compiles and runs the examples of documents that belong to no package, with the doc tests.
#![cfg(doctest)]
#![doc = include_str!("../../README.md")]
