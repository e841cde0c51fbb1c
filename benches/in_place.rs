//! Pages mapped in place, beside a plain `mmap` of the same memfd or files.

fn main() {
    pagestitch_bench::print("mapped");
    pagestitch_bench::print("shards");
}
