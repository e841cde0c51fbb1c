//! The Python objects that a region keeps, for the garbage collector of Python.
//!
//! A region in Rust has the only reference to each of them. The collector must be told of exactly that
//! one, or it ends objects that are in use. So the reference is shared with a `Held`, which knows
//! when it is gone.

use crate::lent::Export;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};
use std::sync::Arc;

/// An object that a region keeps.
#[derive(Debug)]
pub(crate) enum Held {
    /// A source in Python. This is one of the owners of its reference.
    Source(Arc<Py<PyAny>>),
    /// An object that exports a buffer to the region.
    Exporter(Arc<Export>),
}

impl Held {
    /// Tells the collector of the reference.
    pub(crate) fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Self::Source(object) => visit.call(&**object),
            Self::Exporter(export) => visit.call(export.object()),
        }
    }

    /// False if the region has given the object up.
    pub(crate) fn is_kept(&self) -> bool {
        match self {
            Self::Source(object) => Arc::strong_count(object) > 1,
            Self::Exporter(export) => export.object().is_some(),
        }
    }
}
