//! Budgets: the memory that regions may take.

use crate::call;
use crate::handle::Handle;
use std::ffi::c_int;

/// The bytes of memory that any number of regions may take together.
#[derive(Debug)]
pub struct Budget {
    pub(crate) budget: pagestitch::Budget,
}

impl Handle for Budget {
    const NAME: &'static str = "budget";
}

/// Makes a budget, for ps_builder_budget(). Pages beyond it leave, and come back with the same bytes when they are
/// touched.
#[unsafe(no_mangle)]
pub extern "C" fn ps_budget_new(bytes: u64, budget: *mut *mut Budget) -> c_int {
    call::status("ps_budget_new", || Budget { budget: pagestitch::Budget::bytes(bytes)? }.give(budget))
}

/// The bytes that its regions take now. 0 also stands for an error.
#[unsafe(no_mangle)]
pub extern "C" fn ps_budget_resident(budget: *const Budget) -> u64 {
    call::value("ps_budget_resident", 0, || Ok(Budget::borrow(budget)?.budget.resident_bytes()))
}

/// Gives the budget up. Its regions keep it. NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn ps_budget_free(budget: *mut Budget) -> c_int {
    call::status("ps_budget_free", || Budget::free(budget).map(drop))
}
