//! Prototypes: the least that a program can do to fill pages on first touch, as a limit of each way
//! to serve. No prototype has a page table, a policy or a counter.
//!
//! | prototype | threads that fill | touches |
//! |---|---|---|
//! | `copy` | the measured threads, each its own part | none: the scaling of `UFFDIO_COPY` itself |
//! | `inline` | the touching thread, in a bare SIGBUS handler | anywhere |
//! | `inlinelocal` | the same | by each thread in its own part |
//! | `inlinemasked` | the same, with all signals masked meanwhile, as the library does | anywhere |
//! | `pool` | a worker for each part, pinned to its own CPU | anywhere |
//! | `poollocal` | the same | by each thread in its own part, on the CPU of the worker |
//! | `pool1` | several pinned workers that wait at one userfaultfd | anywhere |
//! | `zero` | the kernel, with a new page for each first write | anywhere |
//!
//! | file | content |
//! |---|---|
//! | `parts` | memory in parts, each with a userfaultfd of its own |
//! | `workers` | pinned threads that read events and fill pages |
//! | `bus` | the bare SIGBUS handler |
//! | `direct` | a file read around the page cache into memory with a bound, for the same workload |
//! | `evict` | memory with a bound, from which pages leave by moves: the prototype of the workload `ooc` |

mod bus;
pub(crate) mod direct;
pub(crate) mod evict;
mod parts;
mod workers;

use crate::affinity::allowed;
use crate::case::Sample;
use crate::hot::{Hot, Touches};
use crate::systems::PAGE;
use nix::sys::signal::SigSet;
use pagestitch::source::Pages;
use pagestitch_kernel::Features;
use parts::Parts;
use std::hint::black_box;
use std::sync::Arc;

/// A prototype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prototype {
    Copy,
    Inline,
    InlineLocal,
    InlineMasked,
    Pool,
    PoolLocal,
    Pool1,
    Zero,
}

/// The setting of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    pub(crate) pages: usize,
    /// The number of measured threads.
    pub(crate) threads: usize,
    /// The number of parts, each with a userfaultfd of its own; for `pool1`, the number of workers.
    pub(crate) shards: usize,
    pub(crate) seed: u64,
}

impl Prototype {
    /// Measures the prototype, and checks every byte.
    ///
    /// # Panics
    ///
    /// If a byte differs, or the kernel refuses a call.
    pub(crate) fn measure(self, hot: &Arc<Hot>, setting: &Setting) -> Sample {
        let touches = self.touches(setting);
        if self == Self::Zero {
            return write_first(setting.pages, &touches);
        }
        let shards = if self == Self::Pool1 { 1 } else { setting.shards };
        let parts = Parts::new(hot, setting.pages, shards, self.features());
        let read = || touches.read(hot, |page| parts.word(page));
        let sample = match self {
            Self::Copy => touches.each(touches.lists.clone(), |list| {
                list.into_iter().for_each(|page| parts.fill_page(page));
            }),
            Self::Inline | Self::InlineLocal => bus::serve(&parts, SigSet::empty(), read),
            Self::InlineMasked => bus::serve(&parts, SigSet::all(), read),
            Self::Pool1 => workers::serve(&parts, setting.shards, read),
            Self::Pool | Self::PoolLocal => workers::serve(&parts, parts.count(), read),
            Self::Zero => unreachable!("the kernel fills its own pages"),
        };
        parts.check();
        sample
    }

    fn touches(self, &Setting { pages, threads, seed, .. }: &Setting) -> Touches {
        match self {
            Self::Copy => Touches::in_order(pages, threads),
            Self::InlineLocal => Touches::in_own_parts(pages, threads, seed),
            Self::PoolLocal => Touches::in_own_parts(pages, threads, seed).on(allowed()),
            Self::Inline | Self::InlineMasked | Self::Pool | Self::Pool1 | Self::Zero => {
                Touches::anywhere(pages, threads, seed)
            }
        }
    }

    const fn features(self) -> Features {
        match self {
            Self::Inline | Self::InlineLocal | Self::InlineMasked => Features::SIGBUS,
            _ => Features::THREAD_ID,
        }
    }
}

/// The kernel's own fault: the first write to each page of fresh memory.
fn write_first(pages: usize, touches: &Touches) -> Sample {
    let mut memory = Pages::without_huge_pages(pages * PAGE).expect("memory");
    let mut bytes: Vec<Option<&mut u8>> = memory.iter_mut().step_by(PAGE).map(Some).collect();
    let mut byte = |&page: &usize| bytes[page].take().expect("each page is in one list");
    let items: Vec<Vec<&mut u8>> =
        touches.lists.iter().map(|list| list.iter().map(&mut byte).collect()).collect();
    let sample = touches.each(items, |list| list.into_iter().for_each(|byte| *black_box(byte) = 1));
    let whole = |page: &[u8]| page[0] == 1 && page[1..].iter().all(|&byte| byte == 0);
    assert!(memory.chunks(PAGE).all(whole), "a page has other bytes than zeros and the written one");
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prototype_fills_every_page_once() {
        if pagestitch::Support::current().features().is_err() {
            println!("SKIPPED each_prototype_fills_every_page_once: no userfaultfd");
            return;
        }
        let hot = Hot::new(1);
        for prototype in [
            Prototype::Copy,
            Prototype::Inline,
            Prototype::InlineLocal,
            Prototype::InlineMasked,
            Prototype::Pool,
            Prototype::PoolLocal,
            Prototype::Pool1,
            Prototype::Zero,
        ] {
            for (threads, shards) in [(1, 1), (3, 2), (2, 5)] {
                let setting = Setting { pages: 2048, threads, shards, seed: 1 };
                assert_eq!(prototype.measure(&hot, &setting).pages, 2048, "{prototype:?} {setting:?}");
            }
        }
    }
}
