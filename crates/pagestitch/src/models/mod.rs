//! Models for a model checker: the real page table, claims, gate and read turns, with a small model
//! of the kernel. `ci/models` runs them.
//!
//! | model | property that holds in every interleaving |
//! |---|---|
//! | `faults` | a thread that touches a page gets its bytes, or a signal if its source fails; no thread waits forever |
//! | `teardown` | a thread that waits in a fault while its region is dropped gets a signal or its bytes, and never zeros |
//! | `balloon` | a page that the owner of adopted memory has discarded reads as zeros from then on |
//! | `turns` | no event is left unread |

mod balloon;
mod faults;
mod kernel;
mod teardown;
mod turns;
