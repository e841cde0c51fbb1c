//! Denies system calls to a thread, as the seccomp profile of a container does.

use pagestitch_kernel::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter, apply_filter_all_threads,
};
use std::env::consts::ARCH;

/// Fails every way to open a userfaultfd with `errno`, for this thread and all that it starts. The
/// filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_userfaultfd(errno: Errno) {
    let device = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, USERFAULTFD_IOC_NEW);
    let device = SeccompRule::new(vec![device.expect("a condition")]).expect("a rule");
    deny(errno, &[(SYS_USERFAULTFD, vec![]), (SYS_IOCTL, vec![device])]);
}

/// Fails `userfaultfd(2)` with `errno`, for this thread and all that it starts. `/dev/userfaultfd` still
/// opens. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_userfaultfd_call(errno: Errno) {
    deny(errno, &[(SYS_USERFAULTFD, vec![])]);
}

/// Fails `userfaultfd(2)` with `errno`, unless it asks for the faults of user code only, for this thread
/// and all that it starts: the answer to a user without privileges. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_kernel_faults(errno: Errno) {
    let all_faults = SeccompCmpOp::MaskedEq(USER_MODE_ONLY);
    let all_faults = SeccompCondition::new(0, SeccompCmpArgLen::Dword, all_faults, 0).expect("a condition");
    deny(errno, &[(SYS_USERFAULTFD, vec![SeccompRule::new(vec![all_faults]).expect("a rule")])]);
}

/// Fails `memfd_create(2)` with `errno`, for this thread and all that it starts. The filter is
/// permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_memfds(errno: Errno) {
    deny(errno, &[(nix::libc::SYS_memfd_create, vec![])]);
}

/// Fails `pidfd_open(2)` with `errno`, for this thread and all that it starts. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_pidfds(errno: Errno) {
    deny(errno, &[(nix::libc::SYS_pidfd_open, vec![])]);
}

/// Fails `io_uring_setup(2)` with `errno`, for this thread and all that it starts. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_io_uring(errno: Errno) {
    deny(errno, &[(nix::libc::SYS_io_uring_setup, vec![])]);
}

/// Fails `io_uring_enter(2)` with `errno`, for all threads of the process and all that they start. The filter is
/// permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_io_uring_to_all_threads(errno: Errno) {
    let program = program(errno, &[(nix::libc::SYS_io_uring_enter, vec![])]);
    apply_filter_all_threads(&program).expect("the kernel takes the filter");
}

/// Fails `process_vm_readv(2)` and `process_vm_writev(2)` with `errno`, for this thread and all
/// that it starts. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_copies(errno: Errno) {
    deny(errno, &[(nix::libc::SYS_process_vm_readv, vec![]), (nix::libc::SYS_process_vm_writev, vec![])]);
}

/// Fails `fdatasync(2)` with `errno`, for this thread and all that it starts. The filter is permanent.
///
/// # Panics
///
/// If the kernel refuses the filter.
pub fn deny_syncs(errno: Errno) {
    deny(errno, &[(nix::libc::SYS_fdatasync, vec![])]);
}

fn deny(errno: Errno, rules: &[(i64, Vec<SeccompRule>)]) {
    apply_filter(&program(errno, rules)).expect("the kernel takes the filter");
}

fn program(errno: Errno, rules: &[(i64, Vec<SeccompRule>)]) -> BpfProgram {
    let architecture = ARCH.try_into().expect("an architecture that seccompiler knows");
    let filter = SeccompFilter::new(
        rules.iter().cloned().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.raw() as u32),
        architecture,
    );
    filter.expect("a filter").try_into().expect("a program")
}

const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const USER_MODE_ONLY: u64 = 1;
const SYS_USERFAULTFD: i64 = nix::libc::SYS_userfaultfd;
const SYS_IOCTL: i64 = nix::libc::SYS_ioctl;
