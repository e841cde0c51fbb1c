//! How long does a thread wait for a page?

fn main() {
    pagestitch_bench::print("latency");
}
