//! A guest in another process, restored from a memory file: the time to its first touch, and to its last.

fn main() {
    pagestitch_bench::print("restore");
}
