//! Faults of many regions on one pool.

fn main() {
    pagestitch_bench::print("regions");
}
