//! The server of a round: inline, a pool, or several manuals in threads.

use fastrand::Rng;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pagestitch::{Inline, Manual, Placement, Pool, Region, Server};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

/// True if this process may serve children on this kernel.
pub(super) fn may_serve_children() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let built =
            Pool::new().and_then(|pool| Region::builder().chunk(vec![1]).inherit_on_fork().build(&pool));
        built.is_ok()
    })
}

/// A running server, until this is dropped.
pub(super) struct RunningServer {
    pool: Option<Pool>,
    manual: Option<Server>,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl RunningServer {
    pub(super) fn start(rng: &mut Rng, inline: bool) -> Result<Self, pagestitch::Error> {
        let mut server = Self { pool: None, manual: None, stop: Arc::default(), threads: vec![] };
        match rng.u8(..5) {
            0 | 4 if inline => {}
            1 => {
                let manuals = Manual::group(rng.usize(1..3))?;
                server.manual = Some(Server::from(&manuals[0]));
                server.threads = manuals
                    .into_iter()
                    .map(|manual| serve_in_thread(manual, Arc::clone(&server.stop)))
                    .collect();
            }
            _ => {
                let pool = Pool::builder();
                let pool = if rng.bool() { pool.workers(rng.usize(1..5)) } else { pool };
                let pool = if rng.u8(..4) == 0 { pool.placement(Placement::PerCpu) } else { pool };
                server.pool = Some(pool.start()?);
            }
        }
        Ok(server)
    }

    /// An inline server reads no events of discarded pages.
    pub(super) const fn is_inline(&self) -> bool {
        self.pool.is_none() && self.manual.is_none()
    }

    /// A pool can serve forked children.
    pub(super) const fn is_pool(&self) -> bool {
        self.pool.is_some()
    }

    pub(super) fn server(&self) -> Server {
        match (&self.pool, &self.manual) {
            (Some(pool), _) => pool.into(),
            (_, Some(manual)) => manual.clone(),
            _ => Inline.into(),
        }
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn serve_in_thread(mut manual: Manual, stop: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let _ = poll(&mut [PollFd::new(manual.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5_u8));
            manual.serve_ready(64);
        }
    })
}
