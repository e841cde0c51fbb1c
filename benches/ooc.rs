//! Reading more than memory holds.

fn main() {
    pagestitch_bench::print("ooc");
}
