//! Reading all bytes once.

fn main() {
    pagestitch_bench::print("scan");
}
