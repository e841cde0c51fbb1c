//! Faults that take too long: told of once, and given up where that was declared.

use crate::{touch, until};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pagestitch::{Chunk, Pool, Region};
use pagestitch_kernel::Uffd;
use pagestitch_kernel::support::Features;
use pagestitch_kernel::uffd::FaultMode;
use pagestitch_testkit::child;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use std::io::IoSliceMut;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const PAGE: usize = 4096;
const SIGBUS: i32 = 7;

fn hanging() -> Arc<Scripted> {
    Arc::new(Scripted::new(10 * PAGE as u64).waiting(3 * PAGE as u64..4 * PAGE as u64))
}

#[test]
fn a_fault_that_takes_too_long_is_told_of_once() {
    let pool = Pool::builder().overdue_after(Duration::from_millis(20)).start().unwrap();
    let source = hanging();
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&pool).unwrap();
    let meter = region.meter();
    thread::scope(|scope| {
        let reader = scope.spawn(|| region.as_slice()[3 * PAGE]);
        until(|| meter.faults_overdue() == 1);
        thread::sleep(Duration::from_millis(60));
        assert_eq!((meter.faults_overdue(), meter.faults_given_up()), (1, 0), "once");
        source.open();
        assert_eq!(reader.join().unwrap(), byte_at(3 * PAGE as u64));
    });
    assert_eq!(region.as_slice()[0], byte_at(0));
    drop(region);
    assert_eq!(pool.stop().unwrap().workers, Pool::new().unwrap().workers(), "the watchdog is no worker");
    assert_eq!(meter.faults_overdue(), 1);
}

#[test]
fn a_fault_that_was_given_up_is_a_signal_to_its_waiter() {
    let end = child::run("watchdog::a_fault_that_was_given_up_is_a_signal_to_its_waiter", || {
        let pool = Pool::builder().give_up_after(Duration::from_millis(30)).start().unwrap();
        let region = Region::builder().chunk(Chunk::source(hanging())).build(&pool).unwrap();
        println!("read a byte: {}", region.as_slice()[3 * PAGE]);
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.said());
    assert!(!end.said().contains("read a byte"), "{}", end.said());
}

/// The waiter is the kernel, which gets an error and no signal; and the source answers after all.
#[test]
fn a_source_that_answers_after_all_mends_the_page() {
    let mode = Uffd::open(Features::NONE).unwrap().mode();
    if crate::signal_of_loss() != SIGBUS || mode == FaultMode::UserOnly {
        println!(
            "SKIPPED: no poison marks here (Linux 6.6), or an ordinary user, for whom the kernel does not wait"
        );
        return;
    }
    let source = hanging();
    let pool = Pool::builder().give_up_after(Duration::from_millis(30)).start().unwrap();
    let region = Region::builder().chunk(Chunk::source(Arc::clone(&source))).build(&pool).unwrap();
    let address = region.as_ptr().expose_provenance().get() + 3 * PAGE;
    let asked = thread::spawn(move || {
        let (mut byte, from) = ([0], [RemoteIoVec { base: address, len: 1 }]);
        process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut byte)], &from)
    });
    until(|| region.meter().faults_given_up() == 1);
    let failed = region.failures();
    assert_eq!((failed.len(), failed[0].0), (1, 3 * PAGE as u64));
    assert!(failed[0].1.to_string().contains("it has taken"), "{}", failed[0].1);
    assert!(asked.join().unwrap().is_err());
    source.open();
    until(|| region.failures().is_empty());
    assert_eq!(touch(address), byte_at(3 * PAGE as u64));
    assert_eq!(region.close().faults_given_up, 1);
}
