//! The share of touched pages at which an eager copy becomes faster.

fn main() {
    pagestitch_bench::print("sparse");
}
