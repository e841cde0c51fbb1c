//! Do pages shown in place cost more than a plain `mmap` of the same memfd? First touches, and steady reads.

use pagestitch_bench::in_place::run;

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    print!("{}", if quick { run(4 << 20, 3) } else { run(256 << 20, 11) });
}
