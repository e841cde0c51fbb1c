//! [`pagestitch`] for C and C++. The header `include/pagestitch.h` is generated from this crate.
//!
//! Each call is one function of the files `server`, `builder` and `region`. `call` runs its
//! body: it catches panics, and keeps the error for `ps_last_error()`, in the names of C by `names`.
//! `handle` checks the pointers that come in. The modules are private, so that no safe Rust code can pass a wrong
//! pointer: Rust programs use `pagestitch`.

#![expect(unsafe_code, reason = "each call takes pointers of C, and its name is a symbol")]
#![expect(
    unreachable_pub,
    reason = "no Rust code calls these functions, and the header has public ones only"
)]

mod budget;
mod builder;
mod call;
mod handle;
mod names;
mod ranges;
mod region;
mod server;
mod source;
mod status;

/// The version of the binary interface. It grows with each incompatible change. A program compares it with the
/// value that it was built for, PS_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn ps_abi_version() -> u32 {
    PS_ABI_VERSION
}

/// The version of the binary interface that this header describes.
pub const PS_ABI_VERSION: u32 = 1;
