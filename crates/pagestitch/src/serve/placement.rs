//! Placement: the CPUs on which workers run. This decides most of the cost of a fault.

use crate::error::{BuildOption, Error, ErrorKind};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::{Pid, gettid};
use std::fs;

/// The CPUs on which the workers of a pool run.
///
/// Waking a worker on another, idle CPU costs more than the rest of a fault; waking one on the CPU
/// of the fault costs a switch of threads. No placement spends CPU time on waiting: workers sleep,
/// and do not spin.
///
/// | | workers | choose it |
/// |---|---|---|
/// | [`Auto`](Self::Auto) | `PerCpu`; with a given number of workers `Anywhere`, unless that is one or two for each CPU, and eight at most | unless you have measured |
/// | [`PerCpu`](Self::PerCpu) | one pinned to each CPU | if faults come from all CPUs and must be fast |
/// | [`Cpus`](Self::Cpus) | one pinned to each of these CPUs | if the touching threads are pinned: name their CPUs |
/// | [`Anywhere`](Self::Anywhere) | not pinned | if sources are slow |
///
/// # The CPUs that a process may use
///
/// The CPUs on which at least one thread of the process may run when the pool starts. So a thread that is pinned
/// starts the same pool as any other thread, and a process keeps to the CPUs of its `taskset(1)` and of its
/// cpuset. A process whose only thread is pinned may use the CPU of that thread alone: start the pool before.
/// Without `/proc`, the CPUs of the thread that starts the pool count.
///
/// # Which worker a fault wakes
///
/// **Up to eight pinned workers**: all of them. The first to run serves the fault, which is mostly the
/// one on the CPU of the fault. **More, or workers that are not pinned**: one. On machines with more
/// than eight CPUs a large region has a [shard](crate::Builder::shards) for each worker, and a fault
/// wakes the worker of its shard, or another one if that is busy.
///
/// # Figures
///
/// Random first touches of 4 KiB pages in memory, in million a second, by 1 / 4 / 16 threads. These are
/// of prototypes with the same wakes on a virtual machine with 16 CPUs, except for the last row. The
/// defaults for more than eight CPUs are derived from them, and are not measured.
///
/// | workers | | 1 | 4 | 16 |
/// |---|---|---|---|---|
/// | 1, not pinned | | 0.067 | 0.22 | 0.22 |
/// | 4, all are woken | | 0.062 | 0.16 | 0.18 |
/// | 16, all are woken | | 0.023 | 0.06 | 0.11 |
/// | 16, pinned, one for each of 16 shards | the default there | 0.031 | 0.23 | 0.73 |
/// | the same, each thread on the CPU of its shard's worker | [`AnyRegion::shards`](crate::AnyRegion::shards) | 0.166 | 0.55 | 1.7 |
/// | this pool before it had shards: 8, not pinned, one is woken | | 0.052 | 0.137 | 0.151 |
///
/// On two CPUs, in microseconds a page: workers that are not pinned, and pinned ones (medians of 3 rounds; fewer
/// are better).
///
/// | workers | 1 thread | 2 threads | 8 threads |
/// |---|---|---|---|
/// | 1 | 49, 47 | 23, 22 | 6.7, 6.2 |
/// | 2 | 48, 14 | 9.6, 7.6 | 7.0, 7.2 |
/// | 4 | 47, 19 | 15, 12 | 7.9, 8.0 |
/// | 8 | 41, 22 | 14, 18 | 8.0, 7.2 |
///
/// On one CPU, where the default is one worker: 9.7, 9.4 and 8.6 by one, 10.8, 11 and 8.9 by two, 16, 12 and 9.4 by
/// four pinned workers.
///
/// A single thread that touches pages of all shards at random meets many idle CPUs: build such a region
/// with [`shards(1)`](crate::Builder::shards). On 64 CPUs the default has 32 workers on every other CPU,
/// because 16 saturate the kernel's own fault path: this is reasoned, and not measured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Placement {
    /// The placement that suits the machine. The default. A worker that serves
    /// [adopted memory](crate::AdoptedMemory) is not pinned from then on, unless it replays a
    /// recording.
    #[default]
    Auto,
    /// One worker pinned to each CPU that the process may use; in [`Auto`](Self::Auto), 32 workers at
    /// most. Up to eight workers, a fault wakes all of them; with more, it wakes one.
    PerCpu,
    /// One worker pinned to each of these CPUs.
    Cpus(Vec<usize>),
    /// Workers that the scheduler places, on all CPUs that the process may use. A fault wakes one.
    Anywhere,
}

/// The number of workers, and the CPU of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WorkerCpus {
    pub(super) workers: usize,
    /// Worker `i` is pinned to entry `i`, modulo the length. Empty if workers are not pinned.
    cpus: Vec<usize>,
    /// The number of CPUs that this process may use.
    allowed: usize,
    /// True if the caller has not chosen the placement.
    pub(super) is_automatic: bool,
    /// The CPUs of workers that are not pinned. Empty if these workers inherit the right ones from the thread that
    /// starts the pool.
    unpinned: Vec<usize>,
}

impl WorkerCpus {
    /// Decides for a requested number of workers and a placement, on this machine.
    pub(super) fn decide(workers: Option<usize>, placement: &Placement) -> Result<Self, Error> {
        let own = cpus_of(Pid::from_raw(0)).unwrap_or_else(|| vec![0]);
        let all = allowed(&own);
        let mut decided = Self::on(&all, workers, placement)?;
        if own != all {
            decided.unpinned = all;
        }
        Ok(decided)
    }

    fn on(allowed: &[usize], workers: Option<usize>, placement: &Placement) -> Result<Self, Error> {
        let cpus = match placement {
            Placement::Auto => workers.map_or_else(|| spread(allowed), |number| for_number(allowed, number)),
            Placement::PerCpu => allowed.to_vec(),
            Placement::Cpus(cpus) => {
                refuse_others(allowed, cpus)?;
                cpus.clone()
            }
            Placement::Anywhere => Vec::new(),
        };
        let by_default = if cpus.is_empty() { allowed.len().min(WAKE_ALL_MAX) } else { cpus.len() };
        match workers.unwrap_or(by_default) {
            0 => {
                let what = "a pool needs at least one worker: ask for 1 or more";
                Err(Error::new(ErrorKind::InvalidOption, what).of_option(BuildOption::Workers))
            }
            workers => {
                let is_automatic = *placement == Placement::Auto;
                Ok(Self { workers, cpus, allowed: allowed.len(), is_automatic, unpinned: Vec::new() })
            }
        }
    }

    /// `workers` workers, which are not pinned to a CPU.
    pub(super) const fn anywhere(workers: usize) -> Self {
        Self { workers, cpus: Vec::new(), allowed: 1, is_automatic: false, unpinned: Vec::new() }
    }

    /// True if a fault wakes all workers, because the nearest is the fastest: if they are pinned, and
    /// few.
    pub(super) fn wake_all(&self) -> bool {
        !self.cpus.is_empty() && self.workers <= WAKE_ALL_MAX
    }

    /// The number of shards that suits a large region: one for each worker on machines with many CPUs.
    /// On few CPUs the threads do not wait for each other long enough.
    pub(super) fn shards(&self) -> usize {
        if self.allowed > WAKE_ALL_MAX { self.workers.min(self.allowed) } else { 1 }
    }

    /// The CPUs to which workers are pinned.
    pub(super) fn all(&self) -> &[usize] {
        &self.cpus
    }

    /// The CPUs on which a worker that is not pinned has to run. `None` if it runs there already.
    pub(super) fn unpinned(&self) -> Option<&[usize]> {
        Some(&*self.unpinned).filter(|cpus| !cpus.is_empty())
    }

    pub(super) fn cpu_of(&self, worker: usize) -> Option<usize> {
        self.cpus.get(worker.checked_rem(self.cpus.len())?).copied()
    }
}

/// The CPUs of the workers by default: all of them, or as many as make sense, in equal distances.
fn spread(allowed: &[usize]) -> Vec<usize> {
    let step = allowed.len().div_ceil(WORKERS_MAX);
    allowed.iter().copied().step_by(step.max(1)).collect()
}

/// The CPUs of a given number of workers, none if they are not pinned: so many workers must meet faults of all CPUs,
/// and waking all of them must not cost more than waking an idle CPU.
fn for_number(allowed: &[usize], workers: usize) -> Vec<usize> {
    let most = (2 * allowed.len()).min(WAKE_ALL_MAX);
    if (allowed.len()..=most).contains(&workers) { allowed.to_vec() } else { Vec::new() }
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

/// The CPUs that this process may use: those of all its threads, beside the `own` ones of the calling thread, which
/// may be pinned. A CPU of the cpuset that no thread uses does not count, though the kernel lets a thread go there:
/// `taskset(1)` has excluded it.
fn allowed(own: &[usize]) -> Vec<usize> {
    let mut all = own.to_vec();
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let threads: Vec<_> = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
    // Not so if `/proc` is that of another PID namespace, whose numbers name other threads here.
    if !threads.contains(&gettid().as_raw()) {
        return all;
    }
    for thread in threads {
        // A thread that has ended since has no CPUs.
        let mut more = cpus_of(Pid::from_raw(thread)).unwrap_or_default();
        more.retain(|cpu| !all.contains(cpu));
        if !more.is_empty() && !is_of_kernel(thread) {
            all.extend(more);
        }
    }
    all.sort_unstable();
    all
}

fn cpus_of(thread: Pid) -> Option<Vec<usize>> {
    let set = sched_getaffinity(thread).ok()?;
    let cpus: Vec<_> = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).collect();
    Some(cpus).filter(|cpus| !cpus.is_empty())
}

/// True if the kernel works in this thread of the process, for an `io_uring(7)`. Until Linux 6.1 such a thread may
/// run on all CPUs, also on those that `taskset(1)` has excluded.
fn is_of_kernel(thread: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"));
    // The thread may have ended.
    stat.map_or(true, |stat| flags_in(&stat).is_none_or(|flags| flags & PF_IO_WORKER != 0))
}

/// The flags of a thread in its `/proc/PID/stat`. Its name, in parentheses, may contain any character.
fn flags_in(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

/// The flag of a thread in which the kernel works for an `io_uring(7)` (`include/linux/sched.h`).
const PF_IO_WORKER: u32 = 0x10;
/// The most workers that a fault wakes all. With more of them it gets slower.
const WAKE_ALL_MAX: usize = 8;
/// The most workers by default. Half as many saturate the kernel's fault path, and there is room for as
/// many replacements of workers that sources hold up.
const WORKERS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn on(cpus: usize, workers: Option<usize>, placement: &Placement) -> Result<WorkerCpus, Error> {
        WorkerCpus::on(&(0..cpus).collect::<Vec<_>>(), workers, placement)
    }

    #[test]
    fn by_default_workers_are_pinned_unless_another_number_than_that_of_the_cpus_is_given() {
        let cpus = on(2, None, &Placement::Auto).unwrap();
        assert_eq!((cpus.workers, cpus.cpu_of(0), cpus.cpu_of(1)), (2, Some(0), Some(1)));
        assert_eq!((cpus.wake_all(), cpus.shards()), (true, 1));
        let cpus = on(2, Some(5), &Placement::Auto).unwrap();
        assert_eq!((cpus.workers, cpus.cpu_of(4), cpus.shards()), (5, None, 1));
        let is_pinned = |cpus, workers| on(cpus, Some(workers), &Placement::Auto).unwrap().wake_all();
        for (cpus, least, most) in [(1, 1, 2), (2, 2, 4), (4, 4, 8), (6, 6, 8), (8, 8, 8)] {
            for workers in 1..20 {
                assert_eq!(
                    is_pinned(cpus, workers),
                    (least..=most).contains(&workers),
                    "{workers} on {cpus}"
                );
            }
        }
        assert!((1..40).all(|workers| !is_pinned(9, workers)));
    }

    #[test]
    fn on_many_cpus_each_worker_has_a_shard_and_a_fault_wakes_one() {
        let of = |cpus: &WorkerCpus| (cpus.workers, cpus.shards(), cpus.wake_all());
        assert_eq!(of(&on(8, None, &Placement::Auto).unwrap()), (8, 1, true));
        assert_eq!(of(&on(9, None, &Placement::Auto).unwrap()), (9, 9, false));
        assert_eq!(of(&on(16, Some(4), &Placement::Auto).unwrap()), (4, 4, false));
        let many = on(64, None, &Placement::Auto).unwrap();
        assert_eq!(of(&many), (32, 32, false));
        assert_eq!((many.cpu_of(0), many.cpu_of(31)), (Some(0), Some(62)));
        assert_eq!(on(100, None, &Placement::Auto).unwrap().workers, 25);
    }

    #[test]
    fn threads_in_which_the_kernel_works_are_told_by_their_flags() {
        let stat = |name, flags| format!("7 ({name}) S 1 1 1 0 -1 {flags} 0 0 0 0");
        assert_eq!(
            flags_in(&stat("iou-wrk-7", 4_210_768)).map(|flags| flags & PF_IO_WORKER),
            Some(PF_IO_WORKER)
        );
        assert_eq!(flags_in(&stat("a) S (b", 4_194_304)), Some(4_194_304));
        assert_eq!((flags_in("7"), is_of_kernel(gettid().as_raw())), (None, false));
    }

    #[test]
    fn a_requested_placement_is_kept() {
        assert_eq!(on(64, None, &Placement::PerCpu).unwrap().workers, 64);
        let cpus = on(4, Some(3), &Placement::Cpus(vec![3, 1])).unwrap();
        assert_eq!((cpus.cpu_of(0), cpus.cpu_of(1), cpus.cpu_of(2)), (Some(3), Some(1), Some(3)));
        let anywhere = WorkerCpus { allowed: 4, ..WorkerCpus::anywhere(4) };
        assert_eq!(on(4, None, &Placement::Anywhere).unwrap(), anywhere);
    }

    #[test]
    fn a_pool_without_workers_or_on_a_foreign_cpu_is_refused() {
        for (workers, placement) in
            [(Some(0), Placement::Auto), (None, Placement::Cpus(vec![])), (None, Placement::Cpus(vec![0, 4]))]
        {
            let error = on(4, workers, &placement).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidOption, "{error}");
        }
        // CPU 1 exists, and the process may not use it.
        let error = WorkerCpus::on(&[0, 2], None, &Placement::Cpus(vec![0, 1])).unwrap_err();
        assert_eq!((error.kind(), error.option()), (ErrorKind::InvalidOption, Some(BuildOption::Placement)));
    }
}
