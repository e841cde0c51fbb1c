//! What does it cost to read all of it once? Page by page, ahead of the reader, and copied first.

use pagestitch_bench::scan::run;

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    print!("{}", if quick { run(8 << 20, 3) } else { run(512 << 20, 7) });
}
