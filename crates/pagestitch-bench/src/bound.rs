//! Bounds of figures.

/// The bound of a figure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub(crate) fn holds(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(target) => figure >= target,
            Self::AtMost(target) => figure <= target,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(target) => write!(f, ">= {target}"),
            Self::AtMost(target) => write!(f, "<= {target}"),
        }
    }
}
