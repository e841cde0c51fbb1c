//! A region's children: the same bytes in processes that were forked from the one that built it.
//!
//! ```text
//!   fork(2) ── waits until a worker has read ──▶ Event::Fork { the child's own uffd }
//!                                                      │
//!        the same layout, addresses and sources ──▶ a Served of its own: adopted memory, all absent
//! ```
//!
//! The child inherits the pages that are present at the fork, as with any memory. If it touches an
//! absent page, the parent fills that page from its sources, for the child alone. Children of a
//! child are served likewise. The service of all of them ends when the parent drops the region:
//! absent pages of the children are poisoned then.
//!
//! If the parent's process ended first, the kernel would close the children's uffds, and absent
//! pages would read as zeros. So the uffds are also in flight in a socket that the children have
//! inherited: a child that touches an absent page then waits forever. A child whose uffd is not there
//! yet waits in a fork handler ([`ForkWindow`](pagestitch_kernel::fork_window::ForkWindow)).

mod children;
mod descriptors;
pub(super) mod fork_reader;
pub(crate) mod orphans;
pub(super) mod reader;

pub(crate) use children::{ForkedChildren, first_page};
pub(crate) use descriptors::Descriptors;

use crate::policy::{Blocks, Policy, Readahead};
use crate::serve::Served;
use crate::space::Target;
use crate::space::mapped_in_place::ShownPages;
use crate::space::target::Foreign;
use crate::space::{Mapping, PageTables, ServeOptions, Shards};
use pagestitch_kernel::{Batch, Errno, Outcome, Uffd};
use std::thread;

impl Served {
    /// The same region in a child, whose userfaultfd is `uffd`.
    pub(crate) fn child(&self, uffd: Uffd) -> Result<Self, (Uffd, Errno)> {
        match self.prepare_child() {
            Ok((tables, policy, adopted)) => {
                let serve_options =
                    ServeOptions { reporter: self.reporter.clone(), ..ServeOptions::default() };
                let mapping = Mapping::new(
                    format!("{} in a child", self.name),
                    (self.layout.share(), None, ShownPages::default()),
                    (false, Err("the kernel moves pages only inside a process")),
                    (policy, serve_options, tables),
                    (Target::Foreign(adopted), Shards::one(uffd), None),
                    None,
                    self.children.is_none(),
                );
                let limit = self.limit.as_ref().map(|(most, _)| *most);
                Ok(Self::new(mapping, limit, self.children.clone()))
            }
            Err(errno) => Err((uffd, errno)),
        }
    }

    /// The steps that the kernel may refuse.
    fn prepare_child(&self) -> Result<(PageTables, Policy, Foreign), Errno> {
        let (pages, size) = (self.target.all().pages, self.page_size());
        let tables = PageTables::new(pages, &ServeOptions::default(), false)?;
        let policy = Policy::new(Readahead::None, pages, size, Blocks::Never)?;
        Ok((tables, policy, Foreign::inherited(size, self.target.ranges().collect())?))
    }
}

/// Prevents forks with the region, and returns when none is under way: closing its uffd would show
/// zeros to a child that is being created.
///
/// An owned region calls this before its teardown, because the teardown may wait for the allocator,
/// whose lock a forking thread holds until the fork reader has read its event. The region of a
/// child calls this at its end, because the child has an allocator of its own.
pub(crate) fn block_forks(region: &Served) {
    if region.children.is_none() {
        return;
    }
    match &region.target {
        Target::Owned(reservation) => {
            let _ = reservation.do_not_fork();
        }
        // A refusal means that the range is unmapped, or that its owner has ended.
        Target::Foreign(_) => region.target.ranges().for_each(|(span, _)| {
            let _ = region.uffd.unregister(region.target.addresses(span));
        }),
    }
    // The kernel fills no page while a fork is under way.
    while region.uffd.get(0).continue_pages(first_page(region)) == Outcome::Changing {
        if region.target.foreign().is_some() {
            region.read_without_serving(&mut Batch::with_capacity(BATCH));
        }
        thread::yield_now();
    }
}

/// Events read at once.
const BATCH: usize = 64;
