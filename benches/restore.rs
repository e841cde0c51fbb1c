//! A guest in another process, restored from a memory file: how soon does it run, and how fast?

fn main() {
    pagestitch_bench::print("restore");
}
