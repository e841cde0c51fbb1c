//! How long does a thread wait for a page? Against the manual page's handler and the kernel's own zero page.

use pagestitch_bench::latency::{Config, run};

fn main() {
    let config =
        if std::env::args().any(|arg| arg == "--quick") { Config::quick() } else { Config::default() };
    print!("{}", run(config));
}
