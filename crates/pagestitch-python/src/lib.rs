//! [`pagestitch`] for Python. `pagestitch.pyi` describes the module for its users.
//!
//! The global interpreter lock decides the design: a thread that touches an absent page holds it, and
//! so the page must come without it. Therefore workers never wait for the interpreter: buffers that a
//! worker gives up are released later (`lent`), and a source that is written in Python fills pages
//! in `populate` and `read_at` only, in the calling thread (`call`, `source`).
#![expect(unsafe_code, reason = "the buffer protocol hands out pointers")]

mod call;
mod chunks;
mod error;
mod held;
mod lent;
mod numbers;
mod raised;
mod region;
mod server;
mod source;

/// Scattered memory and files as one buffer, filled on first touch.
#[pyo3::pymodule]
#[pyo3(name = "pagestitch")]
mod native {
    #[pymodule_export]
    use crate::chunks::{File, Hole};
    #[pymodule_export]
    use crate::error::Error;
    #[pymodule_export]
    use crate::region::Region;
    #[pymodule_export]
    use crate::server::Pool;
}
