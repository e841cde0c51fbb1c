//! Do many regions on one pool cost a fault anything?

fn main() {
    pagestitch_bench::print("regions");
}
