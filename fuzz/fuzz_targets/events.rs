//! Any messages of a userfaultfd are decoded as `linux/userfaultfd.h` lays them out: all events in
//! order, one fault for each page, and no lost descriptor of a fork.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pagestitch_kernel::uffd::inject::pretend;
use pagestitch_kernel::{Batch, Event, Fault, FaultKind, PageSize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// A message of 32 bytes.
#[derive(Debug, Arbitrary)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

/// The expected event.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Remove(u64, u64),
    Unmap(u64, u64),
    Remap(u64, u64, u64),
    Fork(i32),
}

impl Message {
    fn bytes(&self) -> Vec<u8> {
        let head = [&[self.event][..], &self.reserved].concat();
        self.words.iter().fold(head, |all, word| [all, word.to_ne_bytes().to_vec()].concat())
    }
}

const FORK: u8 = 0x13;
const BATCH: usize = 8;

fuzz_target!(|messages: Vec<Message>| {
    let mut messages = messages;
    messages.truncate(20);
    let (mut kernel, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    // SAFETY: the descriptor is a socket. Each fork message holds a descriptor that is opened
    // below, and given to its event.
    let uffd = unsafe { pretend(OwnedFd::from(ours)) };
    for message in messages.iter_mut().filter(|message| message.event == FORK) {
        let child = File::open("/dev/null").unwrap().into_raw_fd();
        message.words[0] = message.words[0] & !0xffff_ffff | child as u64;
    }
    let before = fs::read_dir("/proc/self/fd").unwrap().count();
    for message in &messages {
        kernel.write_all(&message.bytes()).unwrap();
    }

    let mut batch = Batch::with_capacity(BATCH);
    for some in messages.chunks(BATCH) {
        let read = batch.read(&uffd, PageSize::system());
        let known = |message: &&Message| matches!(message.event, 0x12..=0x16);
        assert_eq!(read.is_ok(), some.iter().all(|message| known(&message)));
        assert_eq!(batch.is_full(), some.len() == BATCH);
        check_faults(batch.faults(), some);
        let events: Vec<_> = batch.take_events().map(|event| seen(&event)).collect();
        assert_eq!(events, some.iter().filter_map(expected).collect::<Vec<_>>());
    }
    let forks = messages.iter().filter(|message| message.event == FORK).count();
    let left = fs::read_dir("/proc/self/fd").unwrap().count();
    assert_eq!(left + forks, before, "each child's descriptor was closed, once");
    assert!(batch.read(&uffd, PageSize::system()).is_ok() && batch.faults().is_empty(), "all was read");
});

fn expected(message: &Message) -> Option<Expected> {
    let [first, second, third] = message.words;
    Some(match message.event {
        FORK => Expected::Fork(first as u32 as i32),
        0x14 => Expected::Remap(first, second, third),
        0x15 => Expected::Remove(first, second),
        0x16 => Expected::Unmap(first, second),
        _ => return None,
    })
}

fn seen(event: &Event) -> Expected {
    match event {
        Event::Remove { start, end } => Expected::Remove(*start as u64, *end as u64),
        Event::Unmap { start, end } => Expected::Unmap(*start as u64, *end as u64),
        Event::Remap { from, to, bytes } => Expected::Remap(*from as u64, *to as u64, *bytes as u64),
        Event::Fork { child, .. } => Expected::Fork(std::os::fd::AsFd::as_fd(child).as_raw_fd()),
    }
}

fn check_faults(seen: &[Fault], messages: &[Message]) {
    let mut model = BTreeMap::new();
    for Message { words: [flags, address, _], .. } in messages.iter().filter(|message| message.event == 0x12) {
        let kind = match () {
            () if flags & 4 != 0 => FaultKind::Minor,
            () if flags & 2 != 0 => FaultKind::WriteProtect,
            () => FaultKind::Missing,
        };
        *model.entry((*address as usize & !4095, kind)).or_insert(false) |= flags & 1 != 0;
    }
    let seen: Vec<_> = seen.iter().map(|fault| ((fault.address, fault.kind), fault.write)).collect();
    assert_eq!(seen, model.into_iter().collect::<Vec<_>>());
}
