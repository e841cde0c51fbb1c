//! Building a region, in time and memory for each chunk, and locating a byte.

fn main() {
    pagestitch_bench::print("build");
}
