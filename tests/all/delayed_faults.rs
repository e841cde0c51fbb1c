//! Faults of foreign memory that are served later: a worker that hangs has the turn to read them, or
//! their source asks for a pause.

use crate::guests::{adopt, lacks_poison};
use crate::{PAGE, SIGBUS, SetOnDrop, handle_user_signal, serve_until};
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use pagestitch::source::{Fetch, Reply};
use pagestitch::{Chunk, Manual, Pool, Readahead, Region};
use pagestitch_testkit::guest::Guest;
use pagestitch_testkit::scope::scope;
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// The member that is woken for the fault finds the turn taken. No later event wakes it, the other
/// member never releases the turn, and no watchdog looks at manuals: only the look that it requests
/// serves the fault.
#[test]
fn a_fault_is_read_again_when_the_worker_with_the_turn_hangs() {
    if lacks_poison(this_test!()) {
        return;
    }
    // A loaded machine may delay a touch until the turn can be taken at once.
    for _ in 0..5 {
        let (members, done) = (Manual::group(2).unwrap(), &AtomicBool::new(false));
        let guest = Guest::new(&[100 * PAGE], false).unwrap();
        let source = Arc::new(Scripted::new(100 * PAGE as u64).holding(0..1));
        let builder = Region::builder().chunk(Chunk::source(Arc::clone(&source))).readahead(Readahead::None);
        let region = builder.build_adopted(adopt(&guest), &members[0]).unwrap();
        let touch = |page: usize| assert_eq!(guest.read(page * PAGE), byte_at((page * PAGE) as u64));
        scope(|scope| {
            let _ended = SetOnDrop(done);
            let serve = |mut member: Manual| {
                serve_until(&mut member, 64, || done.load(Ordering::SeqCst));
                member
            };
            let members: Vec<_> =
                members.into_iter().map(|member| scope.spawn(move || serve(member))).collect();
            // A member keeps its turn while it fills a page of a fast source.
            (1..50).for_each(touch);
            scope.spawn(|| touch(0));
            source.wait_until_held(1);
            touch(60);
            source.release();
            region.populate(..).unwrap();
            done.store(true, Ordering::SeqCst);
            // The region ends before its server.
            let members: Vec<_> = members.into_iter().map(|member| member.join().unwrap()).collect();
            region.finish().unwrap();
            drop(members);
        });
    }
}

/// A source that asks for an hour before each next request.
#[derive(Default)]
struct AnHourLater(AtomicUsize);

impl Fetch for AnHourLater {
    fn size(&self) -> u64 {
        PAGE as u64
    }

    fn fetch(&self, _: u64, reply: Reply) {
        self.0.fetch_add(1, Ordering::SeqCst);
        reply.retry_after(Duration::from_secs(3600), io::ErrorKind::ConnectionReset.into());
    }
}

/// A signal makes the waiting thread fault again, so that an owner could queue retries without end.
/// The page fails when 4,096 of them wait.
#[test]
fn an_owner_queues_a_limited_number_of_retries() {
    extern "C" fn nothing(_: i32) {}
    if lacks_poison(this_test!()) {
        return;
    }
    let end = child::run(this_test!(), || {
        handle_user_signal(nothing);
        let pool = Pool::builder().workers(1).start().unwrap();
        let guest = Arc::new(Guest::new(&[PAGE], false).unwrap());
        let source = Arc::new(AnHourLater::default());
        let asked = {
            let source = Arc::clone(&source);
            move || source.0.load(Ordering::SeqCst)
        };
        let builder = Region::builder().chunk(Chunk::fetch(source));
        let _region = builder.build_adopted(adopt(&guest), &pool).unwrap();
        let (send, thread) = mpsc::channel();
        thread::spawn(move || {
            send.send(pthread_self()).unwrap();
            println!("read a byte: {}", guest.read(0));
        });
        let thread: Pthread = thread.recv().unwrap();
        for requests in 1..=4100 {
            while asked() < requests {
                thread::yield_now();
            }
            if requests == 4096 {
                println!("{requests} requests wait");
            }
            pthread_kill(thread, Signal::SIGUSR1).unwrap();
        }
    });
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
    assert!(end.output().contains("4096 requests wait"), "{}", end.output());
}
