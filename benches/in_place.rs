//! Do pages shown in place cost more than a plain `mmap` of the same memfd?

fn main() {
    pagestitch_bench::print("mapped");
}
