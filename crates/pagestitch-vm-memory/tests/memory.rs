//! Guest memory of regions does as `GuestMemoryMmap` does.

use pagestitch::{Chunk, ErrorKind, Inline, Manual, Pool, Readahead, Region, SharedRegion};
use pagestitch_testkit::scripted::{Scripted, byte_at};
use pagestitch_testkit::{child, this_test};
use pagestitch_vm_memory::{GuestRegion, GuestRegionError};
use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollection, GuestRegionCollectionError, MemoryRegionAddress, Permissions, VolatileMemory,
};

const PAGE: usize = 4096;
const SIGBUS: i32 = 7;
/// Two regions that touch, a hole, and one whose length is no multiple of a page.
const REGIONS: [(u64, usize); 3] = [(0x1000, 3 * PAGE), (0x4000, 2 * PAGE), (0x10_0000, PAGE + 100)];

fn pool() -> Pool {
    Pool::builder().workers(2).start().unwrap()
}

fn region(chunk: impl Into<Chunk>, pool: &Pool) -> SharedRegion {
    let builder = Region::builder().name("low").chunk(chunk.into()).readahead(Readahead::None);
    builder.writable().build_shared(pool).unwrap()
}

/// The same bytes in regions and in plain mappings.
fn both() -> (GuestRegionCollection<GuestRegion>, GuestMemoryMmap) {
    let pool = pool();
    let plain = GuestMemoryMmap::<()>::from_ranges(&REGIONS.map(|(at, bytes)| (GuestAddress(at), bytes)));
    let plain = plain.unwrap();
    let ours = REGIONS.map(|(at, bytes)| {
        let content: Vec<u8> = (0..bytes).map(|offset| byte_at(at + offset as u64)).collect();
        plain.write_slice(&content, GuestAddress(at)).unwrap();
        let region = region(content, &pool);
        // Calls of the kernel into absent pages are refused to some users.
        if !region.serves_system_calls() {
            region.populate(..).unwrap();
        }
        GuestRegion::new(region, GuestAddress(at)).unwrap()
    });
    (GuestRegionCollection::from_regions(ours.into()).unwrap(), plain)
}

/// The answers of all accesses at an address, as text.
fn answers<M: GuestMemory + Bytes<GuestAddress>>(memory: &M, at: u64, bytes: usize) -> Vec<String>
where
    M::E: Debug,
{
    let (at, mut said) = (GuestAddress(at), Vec::new());
    let mut into = vec![0; bytes];
    said.push(format!("{:?} {into:?}", memory.read(&mut into, at)));
    said.push(format!("{:?} {into:?}", memory.read_slice(&mut into, at)));
    said.push(format!("{:?}", memory.write(&vec![1; bytes], at)));
    said.push(format!("{:?}", memory.write_slice(&vec![2; bytes / 2], at)));
    said.push(format!("{:?} {:?}", memory.write_obj(0x1122_3344_u32, at), memory.read_obj::<u64>(at)));
    let mut source = &vec![3; bytes][..];
    said.push(format!("{:?} {}", memory.read_volatile_from(at, &mut source, bytes), source.len()));
    said.push(format!("{:?}", memory.read_exact_volatile_from(at, &mut &vec![4; bytes][..], bytes)));
    let mut into: Vec<u8> = Vec::new();
    said.push(format!("{:?} {into:?}", memory.write_volatile_to(at, &mut into, bytes)));
    said.push(format!("{:?} {into:?}", memory.write_all_volatile_to(at, &mut into, bytes)));
    let stored = memory.store(0x55_u16, at, Ordering::Release);
    said.push(format!("{stored:?} {:?}", memory.load::<u16>(at, Ordering::Acquire)));
    said.push(format!("{:?}", memory.load::<u64>(at, Ordering::Acquire)));
    said.push(format!("{}", memory.check_range(at, bytes, Permissions::Read)));
    let slices = memory.get_slices(at, bytes, Permissions::ReadWrite);
    said.push(format!(
        "{:?}",
        slices.map(|slices| slices.map(|slice| slice.map(|slice| slice.len())).collect::<Vec<_>>())
    ));
    said
}

#[test]
fn each_access_answers_as_that_of_a_plain_mapping() {
    let (ours, plain) = both();
    let ends = REGIONS.iter().flat_map(|&(at, bytes)| [at, at + bytes as u64]);
    for end in ends {
        for at in [end - 9, end - 8, end - 2, end - 1, end, end + 1, end + 3000] {
            for bytes in [0, 1, 7, 8, 9, 5000] {
                assert_eq!(answers(&ours, at, bytes), answers(&plain, at, bytes), "{bytes} bytes at {at:#x}");
            }
        }
    }
    for (one, other) in ours.iter().zip(plain.iter()) {
        let (mut bytes, mut expected) = (vec![0; one.len() as usize], vec![0; other.len() as usize]);
        one.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        other.read_slice(&mut expected, MemoryRegionAddress(0)).unwrap();
        assert!(bytes == expected);
        assert_eq!((one.start_addr(), one.last_addr()), (other.start_addr(), other.last_addr()));
    }
    assert_eq!(
        format!("{:?}", ours.read_obj::<u64>(GuestAddress(u64::MAX))),
        "Err(InvalidGuestAddress(GuestAddress(18446744073709551615)))"
    );
}

#[test]
fn files_are_read_into_absent_pages_and_written_from_them() {
    let (ours, plain) = both();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![9; 2 * PAGE]).unwrap();
    let read = |file: &File, at| {
        let mut file = file.try_clone().unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        format!("{:?}", ours.read_volatile_from(GuestAddress(at), &mut file, 5000))
    };
    assert_eq!(read(&file, 0x3f00), "Ok(5000)");
    assert_eq!(ours.read_obj::<u8>(GuestAddress(0x4000)).unwrap(), 9);
    let mut out = tempfile::tempfile().unwrap();
    ours.write_all_volatile_to(GuestAddress(0x10_0010), &mut out, PAGE).unwrap();
    let (mut written, mut expected) = (vec![0; PAGE], vec![0; PAGE]);
    out.read_exact_at(&mut written, 0).unwrap();
    plain.read_slice(&mut expected, GuestAddress(0x10_0010)).unwrap();
    assert!(written == expected);
}

#[test]
fn regions_have_an_order_and_holes_and_do_not_overlap() {
    use GuestRegionCollectionError::{MemoryRegionOverlap, NoMemoryRegion, UnsortedMemoryRegions};
    let pool = pool();
    let guest =
        |at: u64| GuestRegion::new(region(Chunk::hole(2 * PAGE as u64), &pool), GuestAddress(at)).unwrap();
    let collect = |at: &[u64]| GuestRegionCollection::from_regions(at.iter().map(|at| guest(*at)).collect());
    assert!(matches!(collect(&[]), Err(NoMemoryRegion)));
    assert!(matches!(collect(&[0, 0x1fff]), Err(MemoryRegionOverlap)));
    assert!(matches!(collect(&[0x4000, 0]), Err(UnsortedMemoryRegions)));
    let memory = collect(&[0, 0x4000]).unwrap();
    let memory = memory.insert_region(Arc::new(guest(0x2000))).unwrap();
    assert!(memory.iter().map(|region| region.start_addr().0).eq([0, 0x2000, 0x4000]));
    memory.write_slice(&[5; 4 * PAGE], GuestAddress(0x1800)).unwrap();
    let (memory, removed) = memory.remove_region(GuestAddress(0x2000), 2 * PAGE as u64).unwrap();
    assert_eq!(removed.read_obj::<u8>(MemoryRegionAddress(0)).unwrap(), 5);
    assert!(
        memory.read_obj::<u8>(GuestAddress(0x2000)).is_err()
            && memory.find_region(GuestAddress(0x3fff)).is_none()
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x4000)).unwrap(), 5);
}

#[test]
fn one_region_may_be_at_two_addresses_and_each_server_fills_it() {
    let manual = Manual::new().unwrap();
    let region = region(vec![7; 2 * PAGE], &pool());
    let region = Arc::new(region);
    let both = [0, 0x10_0000].map(|at| GuestRegion::new(Arc::clone(&region), GuestAddress(at)).unwrap());
    let memory = GuestRegionCollection::from_regions(both.into()).unwrap();
    memory.write_obj(1u8, GuestAddress(5)).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(0x10_0005)).unwrap(), 0x0701);
    let builder = || Region::builder().chunk(vec![7; PAGE]).writable();
    let (inline, loops) = (builder().build_shared(Inline).unwrap(), builder().build_shared(&manual).unwrap());
    loops.populate(..).unwrap();
    for region in [inline, loops] {
        let guest = GuestRegion::new(region, GuestAddress(0)).unwrap();
        assert_eq!(guest.read_obj::<u32>(MemoryRegionAddress(100)).unwrap(), 0x0707_0707);
    }
}

#[test]
fn a_region_that_cannot_be_guest_memory_is_refused_with_the_remedy() {
    let pool = pool();
    let refused = |region: SharedRegion, at| GuestRegion::new(region, GuestAddress(at)).unwrap_err();
    let empty = Region::builder().name("log").capacity(1 << 20).writable().build_shared(&pool).unwrap();
    assert!(matches!(refused(empty, 0), GuestRegionError::Empty { region } if region == "log"));
    let high = refused(region(vec![7; PAGE], &pool), u64::MAX - 4094);
    assert!(matches!(&high, GuestRegionError::TooHigh { bytes: 4096, .. }), "{high}");
    let read_only = Region::builder().chunk(vec![7; PAGE]).build_shared(&pool).unwrap();
    match refused(read_only, 0) {
        GuestRegionError::Region(error) => assert_eq!(error.kind(), ErrorKind::ReadOnly),
        other => panic!("{other}"),
    }
    match GuestRegion::tracked(region(vec![7; PAGE], &pool), GuestAddress(0)).unwrap_err() {
        GuestRegionError::Region(error) => assert_eq!(error.kind(), ErrorKind::OptionConflict),
        other => panic!("{other}"),
    }
    let private = GuestRegion::new(region(vec![7; PAGE], &pool), GuestAddress(0)).unwrap();
    assert!(private.file_offset().is_none());
    let error = private.shared_file().unwrap_err();
    assert!(matches!(&error, GuestRegionError::NoFile { region } if region == "low"), "{error}");
}

#[test]
fn offsets_outside_a_region_have_no_host_address_and_no_slice() {
    let guest = GuestRegion::new(region(vec![7; PAGE + 10], &pool()), GuestAddress(0)).unwrap();
    let (last, behind) = (MemoryRegionAddress(PAGE as u64 + 9), MemoryRegionAddress(PAGE as u64 + 10));
    let start = guest.region().as_ptr().addr().get();
    assert_eq!(guest.get_host_address(last).unwrap().addr(), start + PAGE + 9);
    assert!(guest.get_host_address(behind).is_err());
    assert_eq!(guest.get_slice(last, 1).unwrap().len(), 1);
    assert_eq!(guest.get_slice(behind, 0).unwrap().len(), 0);
    for (offset, bytes) in [(last, 2), (behind, 1), (MemoryRegionAddress(u64::MAX), 1), (last, usize::MAX)] {
        assert!(guest.get_slice(offset, bytes).is_err(), "{bytes} bytes at {offset:?}");
    }
    let all = guest.as_volatile_slice().unwrap();
    assert_eq!(all.get_ref::<u16>(PAGE + 8).unwrap().load(), 0x0707);
}

#[test]
fn the_file_of_a_region_on_a_memfd_has_the_bytes_of_the_guest() {
    let (pool, source) = (pool(), Arc::new(Scripted::new(4 * PAGE as u64)));
    let builder = Region::builder().chunk(Chunk::source(source)).writable().on_memfd();
    let region = builder.build_shared(&pool).unwrap();
    region.populate(..).unwrap();
    let guest = GuestRegion::new(region, GuestAddress(0x8000)).unwrap();
    guest.write_obj(0xabcd_u16, MemoryRegionAddress(5000)).unwrap();
    let offset = guest.shared_file().unwrap();
    let mut seen = [0; 3];
    offset.file().read_exact_at(&mut seen, offset.start() + 5000).unwrap();
    assert_eq!(seen, [0xcd, 0xab, byte_at(5002)]);
    // A back end writes a buffer.
    guest.file_offset().unwrap().file().write_all_at(b"reply", 9000).unwrap();
    let mut reply = [0; 5];
    guest.read_slice(&mut reply, MemoryRegionAddress(9000)).unwrap();
    assert_eq!(&reply, b"reply");
}

fn page(page: usize) -> std::ops::Range<usize> {
    page * PAGE..(page + 1) * PAGE
}

#[test]
fn dirty_pages_are_those_written_here_by_a_mark_or_found_by_a_scan() {
    let builder = Region::builder().chunk(Chunk::hole(100 * PAGE as u64)).writable().track_changes();
    let region = match builder.build_shared(&pool()) {
        Err(error) if error.kind() == ErrorKind::Unsupported => return println!("SKIPPED: {error}"),
        built => built.unwrap(),
    };
    region.write_at(3 * PAGE as u64, b"before").unwrap();
    let guest = GuestRegion::tracked(region, GuestAddress(0)).unwrap();
    assert_eq!(guest.dirty_pages().take(), vec![page(3)], "written before it was guest memory");
    // By this VMM.
    guest.write_obj(1u64, MemoryRegionAddress(5 * PAGE as u64 - 4)).unwrap();
    guest.store(1u32, MemoryRegionAddress(9 * PAGE as u64), Ordering::Relaxed).unwrap();
    let slice = guest.get_slice(MemoryRegionAddress(20 * PAGE as u64 + 5), 100).unwrap();
    slice.subslice(50, 10).unwrap().copy_from(&[1u8; 10]);
    assert!([4, 5, 9, 20].iter().all(|page| guest.bitmap().dirty_at(page * PAGE)));
    assert!([0, 3, 6, 19, 21].iter().all(|page| !guest.bitmap().dirty_at(page * PAGE)));
    // By a virtual CPU: the kernel records it, and no call of this crate sees it.
    guest.region().write_at(70 * PAGE as u64, b"virtual CPU").unwrap();
    assert!(!guest.dirty_pages().dirty_at(70 * PAGE));
    guest.scan().unwrap();
    assert!(guest.dirty_pages().dirty_at(70 * PAGE));
    let pages = [4..6, 9..10, 20..21, 70..71].map(|run| run.start * PAGE..run.end * PAGE);
    assert_eq!(guest.dirty_pages().take(), pages);
    // By a back end, which logs its writes.
    guest.bitmap().mark_dirty(99 * PAGE, PAGE);
    guest.scan().unwrap();
    assert_eq!(guest.dirty_pages().take(), vec![page(99)]);
    // Reads leave no mark.
    guest.read_obj::<u64>(MemoryRegionAddress(50 * PAGE as u64)).unwrap();
    guest.scan().unwrap();
    assert_eq!(guest.dirty_pages().take(), []);
}

#[test]
fn an_unreadable_page_is_an_error_of_populate_and_a_signal_for_a_touch() {
    let end = child::run(this_test!(), || {
        let source = Arc::new(Scripted::new(4 * PAGE as u64).failing(0..1));
        let guest = GuestRegion::new(region(Chunk::source(source), &pool()), GuestAddress(0)).unwrap();
        assert_eq!(guest.read_obj::<u8>(MemoryRegionAddress(5000)).unwrap(), byte_at(5000));
        assert!(guest.region().populate(..PAGE as u64).is_err());
        println!("populate has failed");
        let _ = guest.read_obj::<u8>(MemoryRegionAddress(10));
    });
    assert!(end.output().contains("populate has failed"), "{}", end.output());
    assert_eq!(end.signal(), Some(SIGBUS), "{}", end.output());
}
