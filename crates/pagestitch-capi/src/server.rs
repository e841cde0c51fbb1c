//! Servers: the threads that answer faults.

use crate::call::{self, CallError};
use crate::handle::{self, Handle};
use pagestitch::{BestServer, Eager, Inline, Manual, Pool};
use std::ffi::c_int;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Answers the page faults of regions.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Pool(Pool),
    Best(BestServer),
    Inline,
    Eager,
    Manual(Box<ManualServer>),
}

/// A manual server. All but its service goes on while a thread serves, and in the callbacks of that thread.
#[derive(Debug)]
struct ManualServer {
    service: Mutex<Manual>,
    /// The descriptor of the service, which lives as long.
    fd: RawFd,
    of_builder: pagestitch::Server,
}

impl ManualServer {
    fn new() -> Result<Self, pagestitch::Error> {
        let manual = Manual::new()?;
        Ok(Self { fd: manual.as_raw_fd(), of_builder: (&manual).into(), service: Mutex::new(manual) })
    }

    fn serve(&self, most: usize) -> usize {
        self.service.lock().unwrap_or_else(PoisonError::into_inner).serve_ready(most)
    }
}

impl Handle for Server {
    const NAME: &'static str = "server";
}

impl Server {
    /// The server as the builder takes it.
    pub(crate) fn of_builder(&self) -> pagestitch::Server {
        match &self.kind {
            Kind::Pool(pool) => pool.into(),
            Kind::Best(best) => best.into(),
            Kind::Inline => Inline.into(),
            Kind::Eager => Eager.into(),
            Kind::Manual(manual) => manual.of_builder.clone(),
        }
    }

    fn manual(&self) -> Result<&ManualServer, CallError> {
        match &self.kind {
            Kind::Manual(manual) => Ok(manual),
            _ => Err(CallError::argument(
                "the server has threads of its own: only one of ps_server_manual() is called to serve",
            )),
        }
    }
}

/// Options of a pool. Zero stands for the default in all fields but `size`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct PoolOptions {
    /// sizeof(ps_pool_options).
    pub size: usize,
    /// The number of workers. Default: one for each CPU, on its CPU.
    pub workers: usize,
    /// The number of threads up to which workers that a source holds up are replaced.
    pub max_workers: usize,
    /// A fault that takes so many milliseconds ends in SIGBUS. Default: no limit.
    pub fault_timeout_ms: u64,
    /// A fault that takes so many milliseconds is logged.
    pub warn_after_ms: u64,
}

/// The size of the struct's first version, which ends with this field. Later versions have their fields behind it.
const FIRST_OPTIONS: usize = offset_of!(PoolOptions, warn_after_ms) + size_of::<u64>();
#[cfg(target_pointer_width = "64")]
const _: () = assert!(FIRST_OPTIONS == 40 && offset_of!(PoolOptions, fault_timeout_ms) == 24, "an ABI stays");

const NO_OPTIONS: PoolOptions =
    PoolOptions { size: 0, workers: 0, max_workers: 0, fault_timeout_ms: 0, warn_after_ms: 0 };

/// Starts a pool of worker threads. `options` may be NULL.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_pool(options: *const PoolOptions, server: *mut *mut Server) -> c_int {
    call::status("ps_server_pool", || {
        let options = if options.is_null() { NO_OPTIONS } else { read(options)? };
        Server { kind: Kind::Pool(started(options)?) }.give(server)
    })
}

fn read(options: *const PoolOptions) -> Result<PoolOptions, CallError> {
    // SAFETY: all fields are integers.
    unsafe { handle::sized(options, NO_OPTIONS, FIRST_OPTIONS, "ps_pool_options") }
}

fn started(options: PoolOptions) -> Result<Pool, pagestitch::Error> {
    let mut pool = Pool::builder();
    if options.workers > 0 {
        pool = pool.workers(options.workers);
    }
    if options.max_workers > 0 {
        pool = pool.max_workers(options.max_workers);
    }
    if options.fault_timeout_ms > 0 {
        pool = pool.fault_timeout(Duration::from_millis(options.fault_timeout_ms));
    }
    if options.warn_after_ms > 0 {
        pool = pool.warn_after(Duration::from_millis(options.warn_after_ms));
    }
    pool.start()
}

/// A pool, or the eager server where the process may not use userfaultfd.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_best(server: *mut *mut Server) -> c_int {
    call::status("ps_server_best", || Server { kind: Kind::Best(pagestitch::best_server()?) }.give(server))
}

/// The touching thread itself fills the page, in a handler of SIGBUS: for sources in memory, holes and files.
/// A handler of SIGBUS that the process installs later has to call the one before it, and a thread that blocks SIGBUS
/// cannot touch absent pages.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_inline(server: *mut *mut Server) -> c_int {
    call::status("ps_server_inline", || Server { kind: Kind::Inline }.give(server))
}

/// No faults: ps_builder_build() maps or copies all bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_eager(server: *mut *mut Server) -> c_int {
    call::status("ps_server_eager", || Server { kind: Kind::Eager }.give(server))
}

/// A server without threads, for an event loop: wait for its descriptor, then call ps_server_serve(). The thread
/// that serves must not touch the regions. Free it after its regions: without it, a touch of them raises SIGSEGV.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_manual(server: *mut *mut Server) -> c_int {
    call::status("ps_server_manual", || {
        Server { kind: Kind::Manual(Box::new(ManualServer::new()?)) }.give(server)
    })
}

/// The descriptor of a manual server, readable while faults wait. It belongs to the server. Negative: an error.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_fd(server: *const Server) -> c_int {
    let mut fd = -1;
    let status = call::status("ps_server_fd", || {
        fd = Server::borrow(server)?.manual()?.fd;
        Ok(())
    });
    if status < 0 { status } else { fd }
}

/// Serves up to `most` faults of a manual server, without waiting for more. One thread serves at a time: others wait.
/// A callback cannot call it. `served` may be NULL.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_serve(server: *mut Server, most: usize, served: *mut usize) -> c_int {
    call::status("ps_server_serve", || {
        let place = handle::optional_place(served, "the place for the number of faults")?;
        let server = Server::borrow(server)?.manual()?;
        call::outside_callbacks()?;
        let faults = server.serve(most);
        place.map(|place| place.write(faults));
        Ok(())
    })
}

/// Gives the server up. A pool goes on until its last region is freed. A manual server ends now: free its regions
/// first. NULL is ignored. A callback cannot call it, except for `release` of a source.
#[unsafe(no_mangle)]
pub extern "C" fn ps_server_free(server: *mut Server) -> c_int {
    call::status("ps_server_free", || {
        call::outside_callbacks()?;
        Server::free(server).map(drop)
    })
}
