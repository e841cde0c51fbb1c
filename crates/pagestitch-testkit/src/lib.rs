//! For testing what is built on pagestitch, and pagestitch itself.
//!
//! | module | what for |
//! |---|---|
//! | [`conformance`] | the contract of [`Source`](pagestitch::Source), checked: run it on yours |
//! | [`scripted`] | sources that count, fail, panic or wait when told to |
//! | [`child`] | a test's body in a process of its own, to see it die by a signal or under a limit |
//! | [`require()`] | skip, aloud, what the running kernel does not offer |

pub mod child;
pub mod conformance;
pub mod scripted;

use pagestitch_kernel::Support;
use pagestitch_kernel::support::Features;
use std::io::{Write, stderr};

/// Whether this kernel has `features`. If not, prints a line that begins with `SKIPPED`, past the test runner's
/// capture, so that skips can be counted.
///
/// ```
/// # use pagestitch_kernel::support::Features;
/// # use pagestitch_testkit::require;
/// fn a_test_that_needs_poison() {
///     if !require("a_test_that_needs_poison", Features::POISON) {
///         return;
///     }
/// }
/// # a_test_that_needs_poison();
/// ```
#[must_use]
pub fn require(test: &str, features: Features) -> bool {
    let support = Support::current();
    let here = support.has(features);
    if !here {
        let _ = writeln!(stderr(), "SKIPPED {test}: Linux {} lacks {features:?}", support.kernel());
    }
    here
}
