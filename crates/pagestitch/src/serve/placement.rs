//! Placement: the CPUs on which workers run. This decides most of the cost of a fault.

use crate::error::{BuildOption, Error, ErrorKind};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// The CPUs on which the workers of a pool run.
///
/// Waking a worker on another, idle CPU costs more than the rest of a fault; waking one on the CPU
/// of the fault costs a switch of threads. No placement spends CPU time on waiting: workers sleep,
/// and do not spin.
///
/// | | workers | choose it |
/// |---|---|---|
/// | [`Auto`](Self::Auto) | `PerCpu` up to eight CPUs; `Anywhere` above, or with a given number of workers | unless you have measured |
/// | [`PerCpu`](Self::PerCpu) | one pinned to each CPU | if faults come from all CPUs and must be fast |
/// | [`Cpus`](Self::Cpus) | one pinned to each of these CPUs | if the touching threads are pinned: name their CPUs |
/// | [`Anywhere`](Self::Anywhere) | not pinned | if sources are slow, or there are many CPUs |
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Placement {
    /// The placement that suits the machine. The default.
    #[default]
    Auto,
    /// One worker pinned to each CPU that the process may use. A fault wakes all of them, and the
    /// first to run serves it, which is mostly the worker on the CPU of the fault.
    PerCpu,
    /// One worker pinned to each of these CPUs.
    Cpus(Vec<usize>),
    /// Workers that the scheduler places. A fault wakes one.
    Anywhere,
}

/// The number of workers, and the CPU of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WorkerCpus {
    pub(super) workers: usize,
    /// Worker `i` is pinned to entry `i`, modulo the length. Empty if workers are not pinned.
    cpus: Vec<usize>,
}

impl WorkerCpus {
    /// Decides for a requested number of workers and a placement, on this machine.
    pub(super) fn decide(workers: Option<usize>, placement: &Placement) -> Result<Self, Error> {
        Self::on(&allowed(), workers, placement)
    }

    fn on(allowed: &[usize], workers: Option<usize>, placement: &Placement) -> Result<Self, Error> {
        let cpus = match placement {
            Placement::Auto if workers.is_some() || allowed.len() > WORKERS_MAX => Vec::new(),
            Placement::Auto | Placement::PerCpu => allowed.to_vec(),
            Placement::Cpus(cpus) => {
                refuse_others(allowed, cpus)?;
                cpus.clone()
            }
            Placement::Anywhere => Vec::new(),
        };
        let by_default = if cpus.is_empty() { allowed.len().min(WORKERS_MAX) } else { cpus.len() };
        match workers.unwrap_or(by_default) {
            0 => {
                let what = "a pool needs at least one worker: ask for 1 or more";
                Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Workers))
            }
            workers => Ok(Self { workers, cpus }),
        }
    }

    /// `workers` workers, which are not pinned to a CPU.
    pub(super) const fn anywhere(workers: usize) -> Self {
        Self { workers, cpus: Vec::new() }
    }

    /// True if workers are pinned: a fault then wakes all of them, because the nearest is the
    /// fastest.
    pub(super) fn pinned(&self) -> bool {
        !self.cpus.is_empty()
    }

    pub(super) fn cpu_of(&self, worker: usize) -> Option<usize> {
        self.cpus.get(worker.checked_rem(self.cpus.len())?).copied()
    }
}

fn refuse_others(allowed: &[usize], cpus: &[usize]) -> Result<(), Error> {
    let refused = |what| Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Placement));
    if cpus.is_empty() {
        return refused(String::from("a pool needs at least one CPU: name one in Placement::Cpus"));
    }
    match cpus.iter().find(|cpu| !allowed.contains(cpu)) {
        Some(cpu) => refused(format!(
            "this process may not use CPU {cpu}, only {allowed:?}: name one of these (taskset -p)"
        )),
        None => Ok(()),
    }
}

/// The CPUs that this process may use; CPU 0 if the kernel does not tell.
fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    let cpus: Vec<_> = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).collect();
    if cpus.is_empty() { vec![0] } else { cpus }
}

/// The most workers by default. They saturate memory, and with more of them a fault that wakes all
/// workers gets slower.
const WORKERS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn on(cpus: usize, workers: Option<usize>, placement: &Placement) -> Result<WorkerCpus, Error> {
        WorkerCpus::on(&(0..cpus).collect::<Vec<_>>(), workers, placement)
    }

    #[test]
    fn by_default_workers_are_pinned_on_few_cpus_and_not_on_many() {
        let cpus = on(2, None, &Placement::Auto).unwrap();
        assert_eq!((cpus.workers, cpus.cpu_of(0), cpus.cpu_of(1)), (2, Some(0), Some(1)));
        let cpus = on(64, None, &Placement::Auto).unwrap();
        assert_eq!((cpus.workers, cpus.cpu_of(0), cpus.pinned()), (8, None, false));
        let cpus = on(2, Some(5), &Placement::Auto).unwrap();
        assert_eq!((cpus.workers, cpus.cpu_of(4)), (5, None));
    }

    #[test]
    fn a_requested_placement_is_kept() {
        assert_eq!(on(64, None, &Placement::PerCpu).unwrap().workers, 64);
        let cpus = on(4, Some(3), &Placement::Cpus(vec![3, 1])).unwrap();
        assert_eq!((cpus.cpu_of(0), cpus.cpu_of(1), cpus.cpu_of(2)), (Some(3), Some(1), Some(3)));
        assert_eq!(on(4, None, &Placement::Anywhere).unwrap(), WorkerCpus { workers: 4, cpus: vec![] });
    }

    #[test]
    fn a_pool_without_workers_or_on_a_foreign_cpu_is_refused() {
        for (workers, placement) in
            [(Some(0), Placement::Auto), (None, Placement::Cpus(vec![])), (None, Placement::Cpus(vec![0, 4]))]
        {
            let error = on(4, workers, &placement).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidOption, "{error}");
        }
    }
}
