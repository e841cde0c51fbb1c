//! Keeps the shared library in memory after dlclose(3), because its handler of SIGBUS and its threads run there.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
