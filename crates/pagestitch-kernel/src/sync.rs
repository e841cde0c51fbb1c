//! What threads meet in: atomics, locks, and the event count. The standard library's, except where a model checker runs them.
//!
//! Built with `--cfg shuttle`, they are those of [shuttle](https://docs.rs/shuttle), which decides at each of them which thread goes on;
//! so the models in this crate and in `pagestitch` are tried in a great many orders (`ci/models`). What is sequentially consistent is
//! explored as it is; weaker orderings are for Miri.

mod event_count;
mod futex;

pub use event_count::EventCount;

#[cfg(shuttle)]
pub use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread::yield_now,
};
#[cfg(not(shuttle))]
pub use std::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread::yield_now,
};

/// Runs a model in many orders of its threads' steps.
#[cfg(all(shuttle, debug_assertions))]
pub mod model {
    use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
    use shuttle::{Config, MaxSteps, Runner};
    use std::sync::Arc;

    /// Every order of its steps, one after the other, as far as there is time; at random beyond.
    ///
    /// # Panics
    ///
    /// If the model does in one of them, or all of its threads wait. Says which order it was, to be repeated.
    pub fn explore_all(what: &str, model: impl Fn() + Send + Sync + 'static) {
        let model = Arc::new(model);
        let orders = run(DfsScheduler::new(Some(MOST), false), &model);
        if orders < MOST {
            println!("model of {what}: all {orders} orders");
        } else {
            explore(what, move || model());
        }
    }

    /// Orders at random: each step's thread is drawn, or each thread's priority, and when it changes.
    ///
    /// # Panics
    ///
    /// As [`explore_all`].
    pub fn explore(what: &str, model: impl Fn() + Send + Sync + 'static) {
        let (model, orders) = (Arc::new(model), orders());
        let drawn = run(RandomScheduler::new(orders), &model);
        let ranked = (1..=4).map(|depth| run(PctScheduler::new(depth, orders / 4), &model)).sum::<usize>();
        println!("model of {what}: {drawn} orders at random, {ranked} by priorities");
    }

    fn run(scheduler: impl Scheduler + 'static, model: &Arc<impl Fn() + Send + Sync + 'static>) -> usize {
        let model = Arc::clone(model);
        let mut config = Config::new();
        config.silence_warnings = true;
        config.max_steps = MaxSteps::FailAfter(STEPS);
        Runner::new(scheduler, config).run(move || model())
    }

    fn orders() -> usize {
        std::env::var("PAGESTITCH_ORDERS")
            .map_or(ORDERS, |orders| orders.parse().expect("a number of orders"))
    }

    const MOST: usize = 200_000;
    const ORDERS: usize = 20_000;
    /// None of these takes as many, but one that turns in a circle.
    const STEPS: usize = 20_000;
}
