//! Servers that a forked child inherits: they belong to the parent, and an error says so.

use crate::{PAGE, is_readable, own_memory, pattern, serve_until, until};
use nix::poll::PollTimeout;
use pagestitch::{AdoptedMemory, Error, ErrorKind, Inline, Manual, Pool, Process, Region, Server};
use pagestitch_kernel::Features;
use pagestitch_kernel::Uffd;
use pagestitch_testkit::forked::ForkedChild;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::{child, this_test};
use std::os::fd::AsFd;

/// Returns 0 if `result` is the error of a server that another process made.
fn is_refused<T>(result: Result<T, Error>) -> i32 {
    match result {
        Ok(_) => 1,
        Err(error) => {
            println!("{error}");
            i32::from(error.kind() != ErrorKind::ForkedChild)
        }
    }
}

fn build_in_child(server: impl Into<Server>) -> i32 {
    is_refused(Region::builder().name("late").chunk(vec![7; 10 * PAGE]).build(server))
}

#[test]
fn a_region_of_an_inherited_pool_is_refused_in_the_child() {
    let pool = Pool::builder().workers(2).start().unwrap();
    let before = Region::builder().chunk(vec![7; 10 * PAGE]).build(&pool).unwrap();
    assert!(ForkedChild::start(|| build_in_child(&pool)).succeeds());
    assert!(before.as_slice().iter().all(|&byte| byte == 7), "the parent's pool serves as before");
}

#[test]
fn a_region_of_an_inherited_manual_is_refused_in_the_child() {
    let mut manual = Manual::new().unwrap();
    assert!(ForkedChild::start(|| build_in_child(&manual)).succeeds());
    assert_eq!(manual.serve_ready(64), 0);
}

#[test]
fn shared_and_adopted_regions_of_an_inherited_pool_are_refused_in_the_child() {
    let pool = Pool::builder().workers(1).start().unwrap();
    let shared = ForkedChild::start(|| {
        let builder = Region::builder().name("shown").chunk(vec![7; PAGE]);
        is_refused(builder.build_shared(&pool))
    });
    assert!(shared.succeeds());
    let adopted = ForkedChild::start(|| {
        let uffd = Uffd::open(Features::NONE).unwrap().as_fd().try_clone_to_owned().unwrap();
        let memory = AdoptedMemory::of_this_process(uffd, own_memory()).unwrap().range(1 << 30, PAGE);
        // Before Linux 6.6, a region of adopted memory needs the owner.
        let memory = memory.owner(Process::open(std::process::id()).unwrap());
        let builder = Region::builder().name("guest").chunk(vec![7; PAGE]);
        is_refused(builder.build_adopted(memory, &pool))
    });
    assert!(adopted.succeeds());
}

/// Parent and child share the eventfds that stop a pool and that wake its workers.
#[test]
fn stop_and_serve_ready_in_a_child_leave_the_servers_of_the_parent_alone() {
    let end = child::run(this_test!(), || {
        let pool = Pool::builder().workers(1).start().unwrap();
        let stopped = pool.clone();
        assert!(ForkedChild::start(|| is_refused(stopped.stop())).succeeds());
        let region = Region::builder().chunk(vec![7; 10 * PAGE]).build(&pool).unwrap();
        assert_eq!(region.as_slice()[5 * PAGE], 7, "the workers run on");

        let mut manual = Manual::new().unwrap();
        let bytes = pattern(1, 10 * PAGE);
        let region = Region::builder().chunk(bytes.clone()).build(&manual).unwrap();
        scope(|scope| {
            let reader = scope.spawn(|| region.as_slice() == bytes);
            until(|| is_readable(&manual, PollTimeout::ZERO));
            assert!(ForkedChild::start(|| i32::from(manual.serve_ready(64) != 0)).succeeds());
            serve_until(&mut manual, 64, || reader.is_finished());
            assert!(reader.join().unwrap());
        });
    });
    end.expect_pass();
}

#[test]
fn a_child_builds_regions_of_its_own() {
    let end = child::run(this_test!(), || {
        let bytes = pattern(2, 10 * PAGE);
        let before = Region::builder().chunk(bytes.clone()).build(Inline).unwrap();
        assert_eq!(before.as_slice()[PAGE], bytes[PAGE]);
        let inline = ForkedChild::start(|| {
            let region = Region::builder().chunk(bytes.clone()).build(Inline).unwrap();
            i32::from(region.as_slice() != bytes)
        });
        assert!(inline.succeeds());
        let pool = ForkedChild::start(|| {
            let pool = Pool::builder().workers(2).start().unwrap();
            let region = Region::builder().chunk(bytes.clone()).build(&pool).unwrap();
            i32::from(region.as_slice() != bytes)
        });
        assert!(pool.succeeds());
        assert!(before.as_slice() == bytes, "the region of the parent is served as before");
    });
    end.expect_pass();
}
