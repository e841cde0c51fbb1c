//! The cost of timing the parts of a fault.

fn main() {
    pagestitch_bench::print("metering");
}
