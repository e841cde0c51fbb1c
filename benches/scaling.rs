//! One region and several threads, beside prototypes that do the least.

fn main() {
    pagestitch_bench::print("scaling");
}
