//! Finding the pages that were written.

fn main() {
    pagestitch_bench::print("changes");
}
