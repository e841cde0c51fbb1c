//! Pages that leave a region with a budget, and that come back.

fn main() {
    pagestitch_bench::print("evict");
}
