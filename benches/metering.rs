//! What does it cost to take the time of a fault's parts?

fn main() {
    pagestitch_bench::print("metering");
}
