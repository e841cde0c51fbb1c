//! Injected answers of the kernel, in a build with the feature `inject`. Without the feature this
//! does nothing.

use fastrand::Rng;
#[cfg(feature = "inject")]
use pagestitch_kernel::uffd::inject::{Injected, inject, injected};

/// The answers that a round injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "inject"),
    expect(dead_code, reason = "Injection::begin makes them only with the feature")
)]
pub(super) enum Injection {
    /// No answer.
    None,
    /// Answers that are no errors: changing mappings, partial fills, pages that are already
    /// present.
    Harmless,
    /// Also answers that make a page unavailable.
    Fatal,
}

impl Injection {
    /// Chooses the answers of a round. `fatal`: pages may become unavailable.
    #[cfg(feature = "inject")]
    pub(super) fn begin(rng: &mut Rng, fatal: bool) -> Self {
        use Injected::{Again, Busy, Exists, NoMarker, NoMemory, Partial, ProcessGone};
        let injection = [Self::None, Self::Harmless, Self::Fatal][rng.usize(..if fatal { 3 } else { 2 })];
        let (kinds, one_of): (&[_], _) = match injection {
            Self::None => (&[], 0),
            Self::Harmless => (&[Again, Partial, Exists, Busy], rng.u32(1..20)),
            Self::Fatal if rng.bool() => (&[Again, Exists, NoMemory, ProcessGone], rng.u32(1..20)),
            Self::Fatal => (&[Partial, NoMemory, NoMarker, ProcessGone], rng.u32(1..20)),
        };
        inject(one_of, kinds, rng.u64(..));
        injection
    }

    #[cfg(not(feature = "inject"))]
    pub(super) const fn begin(_: &mut Rng, _: bool) -> Self {
        Self::None
    }

    /// Ends the injection.
    pub(super) fn end() {
        #[cfg(feature = "inject")]
        inject(0, &[], 0);
    }

    /// The number of injected answers so far, by kind.
    pub(super) fn counts() -> Vec<(String, u64)> {
        #[cfg(feature = "inject")]
        return injected().map(|(kind, count)| (format!("injected {kind:?}"), count)).to_vec();
        #[cfg(not(feature = "inject"))]
        Vec::new()
    }
}
