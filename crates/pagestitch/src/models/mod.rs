//! Models for a model checker: the real page table, claims, gate, read turns and table of workers, with
//! a small model of the kernel. `ci/models` runs them.
//!
//! | model | property that holds in every interleaving |
//! |---|---|
//! | `faults` | a thread that touches a page gets its bytes, or a signal if its source fails; no thread waits forever |
//! | `teardown` | a thread that waits in a fault while its region is dropped gets a signal or its bytes, and never zeros |
//! | `balloon` | a page that the owner of adopted memory has discarded reads as zeros from then on |
//! | `turns` | no event is left unread |
//! | `hand_over` | a worker that hangs in a source delays no other page of its shard |
//! | `sharing` | a thread that waits in a dropped region never gets the bytes of the next region at its address |

mod balloon;
mod faults;
mod hand_over;
mod kernel;
mod sharing;
mod teardown;
mod turns;
