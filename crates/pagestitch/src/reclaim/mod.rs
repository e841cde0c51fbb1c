//! Bounded memory: pages leave a region when its budget is used up, and come back when they are touched.
//!
//! | file | content |
//! |---|---|
//! | `budget` | the public handle: a limit for the resident bytes of any number of regions |
//! | `state` | the counts of a budget, and the choice of pages that leave |
//! | `share` | a region's part in a budget: the fault path calls it |
//! | `evict` | moves pages out, drops them, and empties slots |
//! | `in_handler` | the same for the thread of a signal handler, and why that is sound |
//! | `evictor` | a thread of a budget, which signal handlers ask to evict where written pages go back |
//! | `for_handlers` | its evictions, and the wait of a handler for them |
//! | `marks` | the memory that a budget has given up for a while |
//! | `pressure` | reports of memory pressure lower the marks |
//! | `requested` | pages that leave or stay because the application asks for it |
//! | `pins` | pages that do not leave |
//! | `sampling` | the share of the pages that pass through the standby list, and its length |
//! | `soft_fault` | brings a page back from the standby list or the modified list |
//! | `dirty` | the written pages of a region, and the states of a page |
//! | `throttle` | writers wait where nearly all pages are dirty |
//! | `write_back` | dirty pages that have left go to their sources |
//! | `write_in_handler` | dirty pages go to their files in a signal handler |
//! | `flush` | dirty pages go to their sources, and stay |
//! | `places` | where the page of a region is: resident, in a slot, or elsewhere |
//! | `slots` | the standby list and the modified list: a ring of slots, first in, first out |
//! | `blocks` | blocks that sequential readers leave behind: they leave first, each as a whole |
//! | `arrivals` | pages that have come, until the policy takes note of them |
//! | `fingerprints` | hashes of pages whose source may change: they come back with the bytes of their first reading |
//! | `metrics` | the counts of a budget, as the user reads them |
//! | `facade` | the counts for the `metrics` crate |
//! | `models`, `models_of_writes` | the models of a page that leaves, and of one that is written, in many orders of the threads |
//! | `promise` | the one unsafe promise: an evicted page has the same bytes again |
//!
//! ```text
//!                 make_room                tidy: a batch of 64
//!   fault ─────▶ fill, install ─▶ resident ────────────────────▶ standby ─────▶ gone
//!                                  │ ▲                              │  empty: one call for many slots
//!                                  │ └──────── soft fault ──────────┘              ▲
//!                                  │           no read of the source               │
//!                                  └───────────────────────────────────────────────┘
//!                                    drop: most batches, while few pages come back
//! ```
//!
//! There is one mark below the limit, and no thread of the budget's own except for signal handlers: a batch leaves
//! behind the fault that has passed the mark, when its thread runs on already. To wake another thread would take as
//! long as the batch, about 20 us, and a CPU from the threads that touch pages.
//!
//! Victims are chosen under a lock, and moved outside of it. A thread that evicts holds the claim of a page
//! as a thread that fills does, so that a fault on the page waits for the settled claim. No evictor waits
//! for another: a lock that is taken, a region that ends, and a page that is being filled are passed over.

mod arrivals;
mod blocks;
mod budget;
mod dirty;
mod evict;
mod evictor;
#[cfg(feature = "metrics")]
mod facade;
mod fingerprints;
mod flush;
mod for_handlers;
mod in_handler;
mod marks;
mod metrics;
#[cfg(all(test, shuttle))]
mod models;
#[cfg(all(test, shuttle))]
mod models_of_writes;
mod pins;
mod places;
mod pressure;
mod promise;
mod requested;
mod sampling;
mod share;
mod slots;
mod soft_fault;
mod state;
mod throttle;
mod write_back;
mod write_in_handler;

pub use budget::Budget;
pub use metrics::BudgetMetrics;
pub(crate) use promise::evictable;
pub(crate) use share::{EnterRegion, Evicted, Membership};
