//! What does a region cost to build, in time and memory a chunk?

use pagestitch_bench::build::run;

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (most, rounds) = if quick { (10_000, 3) } else { (10_000_000, 5) };
    print!("{}", run(most, rounds));
}
