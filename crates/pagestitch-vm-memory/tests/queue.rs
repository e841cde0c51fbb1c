//! A virtio queue in a snapshot file: the device reads descriptors behind faults.

use pagestitch::source::FileSource;
use pagestitch::{Pool, Readahead, Region};
use pagestitch_vm_memory::GuestRegion;
use std::io::Write;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestRegionCollection};

const SNAPSHOT: usize = 16 << 20;
const HIGH: u64 = 1 << 32;
const DESCRIPTORS: usize = 0x10_0000;
const AVAILABLE: usize = 0x20_0000;
const USED: usize = 0x30_0000;
const REQUEST: usize = 0x80_0ffa;
const REPLY: usize = 0x90_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The memory of a guest whose driver has made a chain of two buffers available.
fn snapshot() -> Vec<u8> {
    let mut memory = vec![0; SNAPSHOT];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    let request = Descriptor::new(HIGH + REQUEST as u64, 13, NEXT, 1);
    let reply = Descriptor::new(REPLY as u64, 4096, WRITE, 0);
    put(DESCRIPTORS, RawDescriptor::from(request).as_slice());
    put(DESCRIPTORS + 16, RawDescriptor::from(reply).as_slice());
    // Flags, the index behind the last entry, and the first entry: the chain at descriptor 0.
    put(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
    put(REQUEST, b"across a page");
    memory
}

#[test]
fn a_queue_reads_the_pages_of_a_descriptor_chain_and_no_others() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&snapshot()).unwrap();
    let pool = Pool::builder().workers(2).start().unwrap();
    let region = || {
        let snapshot = FileSource::open(file.path()).unwrap();
        let builder = Region::builder().chunk(snapshot).writable().readahead(Readahead::None);
        builder.build_shared(&pool).unwrap()
    };
    // The second half of the guest's memory has the same bytes.
    let halves = [0, HIGH].map(|at| GuestRegion::new(region(), GuestAddress(at)).unwrap());
    let memory = GuestRegionCollection::from_regions(halves.into()).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(16);
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));

    let chain = queue.pop_descriptor_chain(&memory).expect("an available chain");
    let head = chain.head_index();
    let descriptors: Vec<_> = chain.collect();
    assert_eq!(descriptors.len(), 2);
    let mut request = vec![0; descriptors[0].len() as usize];
    memory.read_slice(&mut request, descriptors[0].addr()).unwrap();
    assert_eq!(request, b"across a page");
    assert!(descriptors[1].is_write_only());
    memory.write_slice(b"reply", descriptors[1].addr()).unwrap();
    queue.add_used(&memory, head, 5).unwrap();
    assert!(queue.pop_descriptor_chain(&memory).is_none());

    // The driver finds the reply.
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED as u64 + 2)).unwrap().to_le(), 1);
    let mut reply = [0; 5];
    memory.read_slice(&mut reply, GuestAddress(REPLY as u64)).unwrap();
    assert_eq!(&reply, b"reply");
    let filled: u64 = memory.iter().map(|region| region.region().metrics().pages_installed()).sum();
    assert!(filled <= 6, "{filled} pages are filled for four structures and two pages of a request");
}
