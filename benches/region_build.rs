//! What does a region cost to build, in time and memory a chunk, and a byte to locate?

fn main() {
    pagestitch_bench::print("build");
}
