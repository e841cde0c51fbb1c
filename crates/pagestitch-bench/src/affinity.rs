//! The CPUs of this process, and threads that are pinned to one of them.

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// Keeps the calling thread on its current CPU until the value is dropped.
pub(crate) struct Pinned {
    before: CpuSet,
    pub(crate) cpu: usize,
}

impl Pinned {
    pub(crate) fn here() -> Self {
        let this = Pid::from_raw(0);
        let (before, cpu) = (sched_getaffinity(this).expect("an affinity"), sched_getcpu().expect("a CPU"));
        pin(cpu);
        Self { before, cpu }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}

/// Keeps the calling thread on a CPU.
pub(crate) fn pin(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu).expect("a CPU of this machine");
    sched_setaffinity(Pid::from_raw(0), &only).expect("a CPU that this process may use");
}

/// The CPUs that this process may use; CPU 0 if the kernel does not tell.
pub(crate) fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).collect();
    if cpus.is_empty() { vec![0] } else { cpus }
}
