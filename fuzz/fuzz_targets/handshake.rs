//! Any message of a client is accepted or refused. Accepted ranges lie end to end, and do not
//! overflow.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagestitch_firecracker::GuestMappings;

fuzz_target!(|message: &[u8]| {
    let Ok(Some(mappings)) = GuestMappings::parse(message) else { return };
    let mut expected = 0;
    for range in mappings.ranges() {
        assert_eq!(range.offset, expected);
        assert!(range.base_host_virt_addr.checked_add(range.size).is_some());
        expected += range.size;
    }
    assert_eq!(mappings.bytes(), expected);
    assert!(matches!(mappings.page_bytes(), 4096 | 2_097_152));
});
