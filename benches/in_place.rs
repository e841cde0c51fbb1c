//! Pages mapped in place, beside a plain `mmap` of the same memfd.

fn main() {
    pagestitch_bench::print("mapped");
}
