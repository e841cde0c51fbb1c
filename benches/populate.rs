//! What does it cost to fill all of it at once?

fn main() {
    pagestitch_bench::print("populate");
}
