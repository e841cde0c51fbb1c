//! From which share of touched pages on is an eager copy quicker?

fn main() {
    pagestitch_bench::print("sparse");
}
