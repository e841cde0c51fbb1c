//! Any file is a recording or an error, and a recording survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagestitch::Recording;

fuzz_target!(|bytes: &[u8]| {
    // Random input never has the right checksum (FNV-1a), so the second try appends it.
    let mut whole = [b"pgstrec1".as_slice(), bytes].concat();
    let sum = whole
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    whole.extend(sum.to_le_bytes());
    for encoded in [bytes, &whole] {
        if let Ok(recording) = Recording::from_bytes(encoded) {
            let again = Recording::from_bytes(&recording.to_bytes()).expect("what was written is read");
            assert_eq!(again, recording);
            assert_eq!(recording.offsets().take(1000).count(), recording.len().min(1000));
        }
    }
});
