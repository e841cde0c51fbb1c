//! Filling all pages of a region at once.

fn main() {
    pagestitch_bench::print("populate");
}
