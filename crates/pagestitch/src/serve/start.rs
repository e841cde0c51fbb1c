//! The start of a worker, at a post of its own or beside workers that are held up.

use crate::error::{BuildOption, Error, ErrorKind};
use crate::fault::PageReads;
use crate::serve::served::Permit;
use crate::serve::server_state::ServerState;
use crate::serve::worker::Worker;
use std::sync::Arc;
use std::thread;

impl ServerState {
    /// Starts another worker at a post where a worker is held up. Both have a fault in flight, so the
    /// new worker takes a permit of `max_in_flight()`.
    pub(super) fn start_another(state: &Arc<Self>, post: usize) -> Result<(), Error> {
        // A permit that no worker can use is not taken, because its return wakes workers.
        if state.workers.working() >= state.workers.most() {
            return Err(no_slot());
        }
        let permit = state.permits.as_ref().map(|permits| {
            let what = "the limit on faults in flight is reached: see max_in_flight()";
            permits.take_for_worker().ok_or_else(|| at_most(BuildOption::MaxInFlight, what))
        });
        Self::start_worker(state, post, permit.transpose()?)
    }

    /// Starts a worker at a post. [`ErrorKind::LimitReached`] if the pool has `max_workers()`
    /// workers.
    pub(super) fn start_worker(state: &Arc<Self>, post: usize, permit: Option<Permit>) -> Result<(), Error> {
        let slot = state.workers.add(post).ok_or_else(no_slot)?;
        let refused = |error| {
            state.workers.cancel(slot);
            error
        };
        let worker = PageReads::new()
            .and_then(|reads| Worker::new(Arc::clone(state), post, state.cpus.cpu_of(post), slot, reads))
            .map_err(|errno| {
                refused(Error::refused("cannot start a worker (memory: ulimit -v, ulimit -d)", errno))
            })?;
        let named = thread::Builder::new().name(thread_name(&state.name, slot));
        let work = move || {
            let _until_it_ends = permit;
            worker.run()
        };
        let thread = named.spawn(work).map_err(|error| {
            let what = format!("cannot start worker {slot} (threads: ulimit -u; addresses: ulimit -v)");
            refused(Error::no_thread(what, error))
        })?;
        state.threads.lock().push(thread);
        Ok(())
    }
}

fn no_slot() -> Error {
    at_most(BuildOption::MaxWorkers, "the limit on workers is reached: see max_workers()")
}

fn at_most(option: BuildOption, what: &str) -> Error {
    Error::new(ErrorKind::LimitReached, what).of_option(option)
}

/// The name of a worker's thread. The kernel cuts names at 15 bytes; this cuts the prefix instead,
/// so that the number is kept.
fn thread_name(prefix: &str, index: usize) -> String {
    let suffix = format!("/{index}");
    let mut cut = prefix.len().min(15 - suffix.len());
    while !prefix.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}{suffix}", &prefix[..cut])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_name_keeps_its_number() {
        assert_eq!(thread_name("pagestitch", 0), "pagestitch/0");
        assert_eq!(thread_name("a very long prefix", 123), "a very long/123");
        assert_eq!(thread_name("ééééééééé", 7), "éééééé/7");
    }
}
