//! The wait of a thread for a page.

fn main() {
    pagestitch_bench::print("latency");
}
