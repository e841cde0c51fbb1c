//! Faults per second of several threads.

fn main() {
    pagestitch_bench::print("parallel");
}
