//! How many faults a second can several threads take?

fn main() {
    pagestitch_bench::print("parallel");
}
