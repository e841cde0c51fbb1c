//! Models, for a model checker: the page table, its claims, the gate and the turns as they are, with a kernel of a few lines.
//! `ci/models` runs them.
//!
//! | model | what has to hold in every order of steps |
//! |---|---|
//! | `faults` | who touches a page gets its bytes, or a signal where its source fails; nobody waits for ever |
//! | `teardown` | who waits when a region is dropped gets a signal, and never zeros |
//! | `balloon` | what the owner of adopted memory lets go of holds zeros from then on, and never again what it held |
//! | `turns` | no event is left unread |

mod balloon;
mod faults;
mod kernel;
mod teardown;
mod turns;
