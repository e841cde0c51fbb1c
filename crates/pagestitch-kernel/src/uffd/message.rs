//! The messages of a userfaultfd, which `read(2)` returns: `struct uffd_msg` of
//! `include/uapi/linux/userfaultfd.h`.
//!
//! A message is the number of its event, 7 reserved bytes, and three words:
//!
//! | event | word 0 | word 1 | word 2 |
//! |---|---|---|---|
//! | `UFFD_EVENT_PAGEFAULT` | flags | address | the thread's id, in the first half |
//! | `UFFD_EVENT_FORK` | the child's descriptor, in the first half | | |
//! | `UFFD_EVENT_REMAP` | old address | new address | length |
//! | `UFFD_EVENT_REMOVE`, `UFFD_EVENT_UNMAP` | first address | first address after it | |

use std::os::fd::RawFd;

/// The bytes of a message.
pub(crate) const MESSAGE: usize = size_of::<UffdMsg>();

/// `struct uffd_msg`.
#[repr(C)]
struct UffdMsg {
    event: u8,
    /// `reserved1`, `reserved2` and `reserved3`.
    reserved: [u8; 7],
    /// The union `arg`.
    arg: [u64; 3],
}

/// A message, as the kernel has written it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// `uffd_msg.arg.pagefault`.
    Pagefault { flags: u64, address: usize, thread: i32 },
    /// `uffd_msg.arg.fork`. `read(2)` has made the descriptor in this process.
    Fork { child: RawFd },
    /// `uffd_msg.arg.remap`.
    Remap { from: usize, to: usize, bytes: usize },
    /// `uffd_msg.arg.remove`.
    Remove { start: usize, end: usize },
    /// `uffd_msg.arg.remove`, which has two events.
    Unmap { start: usize, end: usize },
}

impl Message {
    /// `None` for an event that this version does not know.
    pub(crate) fn decode(bytes: &[u8; MESSAGE]) -> Option<Self> {
        let bytes_of = |index: usize| *bytes[ARG + index * 8..].first_chunk::<8>().expect("3 words");
        let word = |index: usize| u64::from_ne_bytes(bytes_of(index));
        let number = |index: usize| word(index) as usize;
        // The first half of a word, in either byte order.
        let half = |index: usize| i32::from_ne_bytes(*bytes_of(index).first_chunk().expect("8 bytes"));
        Some(match bytes[0] {
            EVENT_PAGEFAULT => Self::Pagefault { flags: word(0), address: number(1), thread: half(2) },
            EVENT_FORK => Self::Fork { child: half(0) },
            EVENT_REMAP => Self::Remap { from: number(0), to: number(1), bytes: number(2) },
            EVENT_REMOVE => Self::Remove { start: number(0), end: number(1) },
            EVENT_UNMAP => Self::Unmap { start: number(0), end: number(1) },
            _ => return None,
        })
    }
}

/// `UFFD_EVENT_PAGEFAULT`
const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_EVENT_FORK`
const EVENT_FORK: u8 = 0x13;
/// `UFFD_EVENT_REMAP`
const EVENT_REMAP: u8 = 0x14;
/// `UFFD_EVENT_REMOVE`
const EVENT_REMOVE: u8 = 0x15;
/// `UFFD_EVENT_UNMAP`
const EVENT_UNMAP: u8 = 0x16;
/// `UFFD_PAGEFAULT_FLAG_WRITE`
pub(crate) const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
/// `UFFD_PAGEFAULT_FLAG_WP`
pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
/// `UFFD_PAGEFAULT_FLAG_MINOR`
pub(crate) const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

const ARG: usize = std::mem::offset_of!(UffdMsg, arg);
const _: () = assert!(MESSAGE == 32 && ARG == 8);
const _: () = assert!(std::mem::offset_of!(UffdMsg, event) == 0);
const _: () = assert!(std::mem::offset_of!(UffdMsg, reserved) == 1);

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with this event and these bytes of the union, as the header packs them.
    fn decoded(event: u8, arg: &[u8]) -> Option<Message> {
        let mut bytes = [&[event, 1, 2, 3, 4, 5, 6, 7], arg].concat();
        bytes.resize(MESSAGE, 0xee);
        Message::decode(bytes.first_chunk().expect("32 bytes"))
    }

    #[test]
    fn each_event_has_its_fields_where_the_header_puts_them() {
        let words = [1, 2, 3].map(u64::to_ne_bytes).concat();
        assert_eq!(decoded(0x14, &words), Some(Message::Remap { from: 1, to: 2, bytes: 3 }));
        assert_eq!(decoded(0x15, &words), Some(Message::Remove { start: 1, end: 2 }));
        assert_eq!(decoded(0x16, &words), Some(Message::Unmap { start: 1, end: 2 }));
        assert_eq!(decoded(0x13, &7_u32.to_ne_bytes()), Some(Message::Fork { child: 7 }));
        let fault = [&words[..16], &9_u32.to_ne_bytes()].concat();
        assert_eq!(decoded(0x12, &fault), Some(Message::Pagefault { flags: 1, address: 2, thread: 9 }));
        assert_eq!(decoded(0x11, &words), None);
        assert_eq!(decoded(0x17, &words), None);
    }
}
