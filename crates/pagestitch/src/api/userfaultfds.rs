//! The userfaultfds of a region: one for each shard.

use crate::api::options::Options;
use crate::error::{BuildOption, Error, ErrorKind};
use crate::serve::Server;
use crate::space::{Layout, Shards};
use pagestitch_kernel::limits::{Limit, ReserveError, descriptors_left, mappings_left, mappings_left_for};
use pagestitch_kernel::page::HUGE;
use pagestitch_kernel::uffd::{FaultMode, OpenError};
use pagestitch_kernel::{Errno, Features, Reservation, Span, Uffd};

/// The userfaultfds of a region that is built.
pub(super) enum Userfaultfds {
    /// Its own.
    Own(Vec<Uffd>),
    /// One of those that small regions of the server share, with these features.
    Shared(Features),
}

impl Userfaultfds {
    pub(super) fn features(&self) -> Features {
        match self {
            Self::Own(uffds) => uffds[0].features(),
            Self::Shared(features) => *features,
        }
    }
}

/// Opens the userfaultfds of a region of `bytes` bytes, at least one, unless it shares one. All have the
/// same features.
pub(super) fn open(
    name: &str,
    (layout, bytes): (&Layout, usize),
    options: &Options,
    server: &Server,
) -> Result<Userfaultfds, Error> {
    let wanted = features(layout, options, server);
    if shares(wanted, bytes, options, server) {
        if let Some(features) = server.inner().open_shared(wanted.without(Features::EVENT_REMOVE)) {
            return Ok(Userfaultfds::Shared(features));
        }
    }
    open_own(name, bytes, options, (server, wanted)).map(Userfaultfds::Own)
}

/// True if a region may share a userfaultfd: it is small, and `wanted` has no features of its own.
fn shares(wanted: Features, bytes: usize, options: &Options, server: &Server) -> bool {
    let is_common = wanted.without(Features::EVENT_REMOVE) == common(server).without(Features::EVENT_REMOVE);
    let is_own = options.report_discards == Some(true)
        || options.shards.is_some()
        || options.budget.is_some()
        || options.capacity.is_some()
        || options.on_memfd;
    bytes <= SHARED_MAX && is_common && !is_own
}

/// The features of all regions of a server.
fn common(server: &Server) -> Features {
    server.inner().features() | Features::POISON | Features::MOVE
}

fn open_own(
    name: &str,
    bytes: usize,
    options: &Options,
    (server, wanted): (&Server, Features),
) -> Result<Vec<Uffd>, Error> {
    let open = || match server.inner().spare_uffds() {
        Some(spares) => spares.open(wanted),
        None => Uffd::open(wanted),
    };
    let first = open().map_err(|error| cannot_open(name, options.inherit_on_fork, error))?;
    server.inner().check_features(first.features()).map_err(|error| error.inside(name))?;
    let mut uffds = vec![first];
    let blocks = (bytes / HUGE).max(1);
    match options.shards {
        Some(shards) => {
            let shards = shards.min(blocks);
            check_mappings(shards).map_err(|error| error.inside(name))?;
            let opened = (1..shards).map(|_| open()).collect::<Result<Vec<_>, _>>();
            uffds.extend(opened.map_err(|error| no_descriptors(shards, error).inside(name))?);
        }
        None if options.inherit_on_fork => {}
        None => {
            let left = (mappings_left_for, descriptors_left);
            let shards = by_default(server.inner().shards(), blocks, left);
            let opened = (1..shards).map(|_| open()).collect::<Result<Vec<_>, _>>();
            uffds.extend(opened.unwrap_or_default());
        }
    }
    if uffds.iter().any(|uffd| uffd.mode() == FaultMode::UserOnly) {
        log!(
            debug,
            region = name,
            "faults of system calls are not served: populate() before a system call reads the region"
        );
    }
    Ok(uffds)
}

/// The number of shards by default, of those that suit the server. One if the program is short of mappings or
/// descriptors, because it needs them more than shards.
fn by_default(
    suitable: usize,
    blocks: usize,
    (mappings_left, descriptors_left): (impl FnOnce(usize) -> usize, impl FnOnce() -> usize),
) -> usize {
    let shards = suitable.min(blocks / BLOCKS_MIN);
    let suffice = |left: usize| left / LEFT_SHARE >= shards;
    // On a small machine nothing is counted.
    if shards > 1 && suffice(mappings_left(shards)) && suffice(descriptors_left()) { shards } else { 1 }
}

/// Registers the shards of a range, and opens a span of it.
pub(super) fn register(
    name: &str,
    uffds: Userfaultfds,
    server: &Server,
    reservation: &Reservation,
    open: Span,
) -> Result<Shards, Error> {
    let registered = match uffds {
        Userfaultfds::Own(uffds) => {
            let spares = server.inner().spare_uffds().cloned();
            Shards::register(uffds, spares, reservation, open)
        }
        Userfaultfds::Shared(_) => server.inner().register_shared(reservation),
    };
    registered.map_err(|errno| match errno {
        Errno::ENOMEM | Errno::EAGAIN => {
            Error::unreserved(name, ReserveError::met(reservation.range().bytes(), errno))
        }
        errno => Error::refused(format_args!("region {name}: cannot register its range"), errno),
    })
}

fn features(layout: &Layout, options: &Options, server: &Server) -> Features {
    let mut wanted = common(server);
    // Each page that a budget drops would be an event that the evictor waits for. Other processes discard
    // pages of a memfd without an event.
    if options.report_discards == Some(false) || options.budget.is_some() || options.on_memfd {
        wanted = wanted.without(Features::EVENT_REMOVE);
    }
    if options.inherit_on_fork {
        wanted = wanted | Features::EVENT_FORK;
    }
    if options.on_memfd {
        wanted = wanted | Features::MISSING_SHMEM;
    }
    if layout.has_lazy() {
        wanted = wanted | Features::MISSING_SHMEM | Features::MINOR_SHMEM;
    }
    match (options.serve_options.record_of_writes.any(), &options.budget) {
        // Faults tell the first write to a page.
        (true, Some(_)) => wanted = wanted | Features::WRITE_PROTECT,
        (true, None) => {
            wanted = wanted
                | Features::WRITE_PROTECT
                | Features::WRITE_PROTECT_UNPOPULATED
                | Features::WRITE_PROTECT_ASYNC;
        }
        (false, _) => {}
    }
    wanted
}

/// Refuses more shards than there are mappings left. Each shard is a mapping of its own.
fn check_mappings(shards: usize) -> Result<(), Error> {
    if shards == 1 {
        return Ok(());
    }
    let left = mappings_left();
    if shards <= left {
        return Ok(());
    }
    let what = format!(
        "{shards} shards are as many mappings, and this process has {left} left: raise vm.max_map_count, or ask for fewer shards()"
    );
    Err(Error::new(ErrorKind::LimitReached, what).of_limit(Limit::Other).of_option(BuildOption::Shards))
}

fn no_descriptors(shards: usize, error: OpenError) -> Error {
    if !matches!(error.errno(), Errno::EMFILE | Errno::ENFILE) {
        return Error::no_userfaultfd(&error);
    }
    let limit = Limit::of_descriptors();
    let what = format!("{shards} shards take a descriptor each: {limit}, or ask for fewer shards()");
    Error::refused(what, error.errno()).of_option(BuildOption::Shards)
}

/// The error for a userfaultfd that cannot be opened. `EVENT_FORK` is the one feature that depends
/// on the privileges of the process instead of the kernel's version, so it has an error of its own.
fn cannot_open(name: &str, children: bool, error: OpenError) -> Error {
    let plain = match error.errno() {
        Errno::EPERM if children => Uffd::open(Features::NONE),
        _ => Err(error),
    };
    let error = match plain {
        Ok(_) => {
            let what = "inherit_on_fork() needs CAP_SYS_PTRACE, which this process lacks: grant it (setcap, --cap-add), or leave it out";
            Error::new(ErrorKind::PermissionDenied, what).of_option(BuildOption::InheritOnFork)
        }
        Err(error) => Error::no_userfaultfd(&error),
    };
    error.inside(name)
}

/// The largest region that shares a userfaultfd.
const SHARED_MAX: usize = 256 << 10;
/// By default, a shard has at least this many blocks: 8 MiB.
const BLOCKS_MIN: usize = 4;
/// By default, shards take at most this share of the mappings, and of the descriptors, that the process has left.
const LEFT_SHARE: usize = 4;

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::serve::{Attachment, Demands, FaultServer, Served};
    use std::sync::Arc;

    /// A server with sixteen workers, as on a machine with as many CPUs.
    #[derive(Debug)]
    struct Wide;

    impl FaultServer for Wide {
        fn noun(&self) -> &'static str {
            "stub"
        }

        fn number(&self) -> usize {
            usize::MAX
        }

        fn is_of_this_process(&self) -> bool {
            true
        }

        fn shards(&self) -> usize {
            16
        }

        fn check(&self, _demands: &Demands) -> Result<(), Error> {
            Ok(())
        }

        fn attach(&self, _region: &Arc<Served>) -> Result<Box<dyn Attachment>, Error> {
            unreachable!("no region is built")
        }
    }

    #[test]
    fn the_number_of_shards_by_default_follows_the_workers_and_the_size() {
        let server = Server::of(Arc::new(Wide));
        let opened = |bytes, options: &Options| {
            open_own("wide", bytes, options, (&server, Features::NONE)).unwrap().len()
        };
        let default = Options::default();
        let sizes = [PAGE, 8 << 20, 15 << 20, 16 << 20, 64 << 20, 128 << 20, 1 << 40];
        assert_eq!(sizes.map(|bytes| opened(bytes, &default)), [1, 1, 1, 2, 8, 16, 16]);
        assert_eq!(opened(64 << 20, &Options { inherit_on_fork: true, ..Options::default() }), 1);
        assert_eq!(opened(64 << 20, &Options { shards: Some(3), ..Options::default() }), 3);
    }

    #[test]
    fn a_process_short_of_mappings_or_descriptors_has_one_shard_by_default() {
        let of = |mappings, descriptors| by_default(16, (64 << 20) / HUGE, (|_| mappings, || descriptors));
        assert_eq!((of(65_000, 1_000), of(32, 32)), (8, 8));
        assert_eq!((of(31, 1_000), of(65_000, 31), of(0, 0)), (1, 1, 1));
        let uncounted = || unreachable!("one shard needs no count");
        assert_eq!(by_default(1, usize::MAX, (|_| uncounted(), uncounted)), 1);
    }

    /// Regions of 128 MiB on sixteen CPUs, with the limit that most systems begin with.
    #[test]
    fn a_limit_of_1024_descriptors_is_enough_for_sixty_regions_of_sixteen_shards() {
        let (mut left, mut shards) = (1_024 - 30, Vec::new());
        while left > 0 {
            shards.push(by_default(16, (128 << 20) / HUGE, (|_| 65_000, || left)));
            left -= shards.last().unwrap();
        }
        assert_eq!(shards.iter().filter(|&&shards| shards == 16).count(), 59);
        assert_eq!(shards.iter().filter(|&&shards| shards == 1).count(), 50);
    }

    const PAGE: usize = 4096;
}
