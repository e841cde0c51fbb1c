//! What does it cost to read all of it once?

fn main() {
    pagestitch_bench::print("scan");
}
