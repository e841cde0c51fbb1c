//! Atomics, locks and the event count. They are the standard library's, except under a model
//! checker.
//!
//! Built with `--cfg shuttle`, they are those of [shuttle](https://docs.rs/shuttle), which decides
//! at each operation which thread runs next. The models in this crate and in `pagestitch` so run in
//! a great many orders (`ci/models`). Shuttle treats each operation as sequentially consistent;
//! Miri tries weaker orderings.

mod event_count;
mod futex;

pub use event_count::EventCount;
pub use std::sync::PoisonError;

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

    /// Every order of the model's steps, up to a limit; beyond it, orders at random.
    ///
    /// # Panics
    ///
    /// If the model panics in one of the orders, or all of its threads wait. Prints that order, so
    /// that it can be repeated.
    pub fn explore_all(what: &str, model: impl Fn() + Send + Sync + 'static) {
        let model = Arc::new(model);
        let orders = run(DfsScheduler::new(Some(MOST), false), &model);
        if orders < MOST {
            println!("model of {what}: all {orders} orders");
        } else {
            explore(what, move || model());
        }
    }

    /// Orders at random: either the thread of each step is drawn, or the threads' priorities and
    /// the steps at which they change.
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
    /// No model takes as many steps unless it loops forever.
    const STEPS: usize = 20_000;
}
