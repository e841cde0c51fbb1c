//! What the kernel injection on purpose, in a build with the feature `inject`; nothing in any other.

use fastrand::Rng;
#[cfg(feature = "inject")]
use pagestitch_kernel::uffd::inject::{Injected, inject, injected};

/// What may be injected in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "inject"), expect(dead_code, reason = "there is one, then"))]
pub(super) enum Injection {
    /// Those that the kernel gives by itself.
    None,
    /// Also those that are no errors: the map is changing, some pages were filled, somebody was quicker.
    Harmless,
    /// Also those that cost a page its bytes.
    Fatal,
}

impl Injection {
    /// As a round has it; `fatal`: whether its pages may go bad.
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

    /// From now on, only its own.
    pub(super) fn end() {
        #[cfg(feature = "inject")]
        inject(0, &[], 0);
    }

    /// How many were injected so far, by kind.
    pub(super) fn counts() -> Vec<(String, u64)> {
        #[cfg(feature = "inject")]
        return injected().map(|(kind, count)| (format!("the kernel injection: {kind:?}"), count)).to_vec();
        #[cfg(not(feature = "inject"))]
        Vec::new()
    }
}
