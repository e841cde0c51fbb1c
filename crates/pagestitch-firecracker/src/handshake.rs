//! The message that Firecracker sends when it connects: the addresses of the guest's memory, with
//! the userfaultfd of that memory.
//!
//! ```text
//!   [{"base_host_virt_addr": 139968, "size": 536870912, "offset": 0, "page_size": 4096, "page_size_kib": 4096}, ...]
//!                                                               + one descriptor (SCM_RIGHTS), no answer
//! ```
//!
//! | version | page size in |
//! |---|---|
//! | up to 1.6 | none: 4 KiB |
//! | from 1.7 | `page_size_kib`, in bytes in spite of its name |
//! | from 1.12 | `page_size`, in bytes, beside it |

use crate::error::counted;
use pagestitch_kernel::fd_passing::Received;
use serde::Deserialize;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// A range of a guest's memory, as its VMM has mapped it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestMapping {
    /// Its address in the VMM.
    pub base_host_virt_addr: u64,
    /// Its length in bytes.
    pub size: u64,
    /// The offset of its bytes in the memory file.
    pub offset: u64,
}

/// A range as Firecracker sends it.
#[derive(Deserialize)]
struct SentMapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default)]
    page_size: Option<u64>,
    #[serde(default)]
    page_size_kib: Option<u64>,
}

/// All of a guest's memory: ranges that lie end to end in the memory file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestMappings {
    ranges: Vec<GuestMapping>,
    page_bytes: u64,
}

/// The reason for which a client is refused. `Display` is a line for a person that names the received
/// data and the expected data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The message is no JSON array of mappings. Holds a short reason.
    #[error("sent no list of memory mappings ({0}): expected the JSON array that Firecracker sends")]
    Garbage(String),
    /// The message is too long.
    #[error("sent more than {} KiB, which is no list of memory mappings", LONGEST / 1024)]
    TooLong,
    /// The client closed the connection too early.
    #[error(
        "closed the connection after {} and {}: expected a JSON array and one userfaultfd",
        counted(.bytes, "byte"),
        counted(.fds, "descriptor")
    )]
    Closed {
        /// The number of bytes that came.
        bytes: usize,
        /// The number of descriptors that came.
        fds: usize,
    },
    /// The client sent no complete handshake within this time. Holds the number of bytes and of
    /// descriptors that came.
    #[error("sent no complete handshake within {0:?}: {bytes} and {fds} came", bytes = counted(.1, "byte"), fds = counted(.2, "descriptor"))]
    TimedOut(Duration, usize, usize),
    /// The client sent several descriptors.
    #[error("sent {0} descriptors: expected one, the userfaultfd")]
    Descriptors(usize),
    /// The client sent more descriptors than this process may open.
    #[error("sent more descriptors than this process may open: raise the limit on open files (ulimit -n)")]
    NoDescriptors,
    /// The client sent a descriptor of this other kind.
    #[error("sent a descriptor that is no userfaultfd but {0}: expected the userfaultfd of its memory")]
    NotUserfaultfd(String),
    /// The array is empty.
    #[error("sent an empty list: a guest has memory")]
    Empty,
    /// The mappings have several page sizes.
    #[error("mixes page sizes of {0} and {1} bytes: all memory of a guest has one")]
    MixedPages(u64, u64),
    /// The mappings have an unsupported page size.
    #[error("has pages of {0} bytes: supported are 4096 and 2097152")]
    PageSize(u64),
    /// The mappings do not match the memory file.
    #[error(
        "maps bytes {start:#x}..{end:#x} of the memory file: expected a range from {expected:#x} on, because ranges lie end to end"
    )]
    Gap {
        /// The start of the mapping in the file.
        start: u64,
        /// Its end.
        end: u64,
        /// The end of the mapping before it.
        expected: u64,
    },
    /// The mappings and the memory file differ in length.
    #[error(
        "has {} of memory, but the memory file has {file}: name the memory file of this guest's snapshot",
        counted(.guest, "byte")
    )]
    Size {
        /// The bytes of the guest.
        guest: u64,
        /// The bytes of the file.
        file: u64,
    },
    /// An address or a length is beyond 2^64.
    #[error("has a mapping of {size:#x} bytes at {address:#x}, which ends beyond 2^64")]
    Overflow {
        /// The address.
        address: u64,
        /// The length.
        size: u64,
    },
    /// The connection failed.
    #[error("has a connection that cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The memory cannot be served.
    #[error("cannot be served: {0}")]
    Adopt(#[from] pagestitch::Error),
    /// The process of the client cannot be identified.
    #[error(
        "cannot be identified ({0}): it has ended, or (before Linux 6.5) has another PID namespace or user: run the handler as root in \
         the host's PID namespace"
    )]
    Peer(#[source] io::Error),
    /// The process cannot be killed, which unavailable bytes would require.
    #[error(
        "cannot be killed ({0}), which unavailable bytes would require: run the handler as its user or root, in its PID namespace or \
         the host's, or choose to poison lost pages (Linux 6.6)"
    )]
    CannotKill(#[source] io::Error),
    /// The client had no complete handshake when many others had come.
    #[error("had no complete handshake when {MAX_CLIENTS} others had come: send the handshake at once")]
    TooManyClients,
    /// The handler shut down before the handshake was complete.
    #[error("had no complete handshake when the handler shut down")]
    ShuttingDown,
}

/// Data of a peer in a form for a log: short, and on one line.
pub(crate) fn brief(what: impl fmt::Display) -> String {
    let escaped = what.to_string();
    let mut short: String = escaped.chars().take(BRIEF).flat_map(char::escape_debug).collect();
    if short.len() > BRIEF || escaped.chars().nth(BRIEF).is_some() {
        let fits = (0..=BRIEF).rev().find(|&end| short.is_char_boundary(end));
        short.truncate(fits.unwrap_or(0));
        short.push_str("...");
    }
    short
}

impl SentMapping {
    /// The size of its pages in bytes.
    fn page_bytes(&self) -> u64 {
        self.page_size.or(self.page_size_kib).unwrap_or(4096)
    }

    fn end(&self) -> Result<u64, HandshakeError> {
        let past = HandshakeError::Overflow { address: self.base_host_virt_addr, size: self.size };
        let fits =
            self.base_host_virt_addr.checked_add(self.size).and_then(|_| self.offset.checked_add(self.size));
        fits.ok_or(past)
    }

    const fn into_mapping(self) -> GuestMapping {
        let Self { base_host_virt_addr, size, offset, .. } = self;
        GuestMapping { base_host_virt_addr, size, offset }
    }
}

impl GuestMappings {
    /// Parses the message. `Ok(None)`: the message is incomplete.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`] if no continuation can make it a valid list of mappings.
    ///
    /// ```
    /// use pagestitch_firecracker::GuestMappings;
    ///
    /// let message = br#"[{"base_host_virt_addr": 4194304, "size": 8192, "offset": 0, "page_size": 4096}]"#;
    /// let mappings = GuestMappings::parse(message)?.expect("it is complete");
    /// assert_eq!((mappings.bytes(), mappings.page_bytes(), mappings.ranges().len()), (8192, 4096, 1));
    /// assert!(GuestMappings::parse(&message[..20])?.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn parse(message: &[u8]) -> Result<Option<Self>, HandshakeError> {
        match serde_json::from_slice::<Vec<SentMapping>>(message) {
            Ok(ranges) => Self::check(ranges).map(Some),
            Err(error) if error.is_eof() && message.len() < LONGEST => Ok(None),
            Err(error) if error.is_eof() => Err(HandshakeError::TooLong),
            Err(error) => Err(HandshakeError::Garbage(brief(error))),
        }
    }

    fn check(mut ranges: Vec<SentMapping>) -> Result<Self, HandshakeError> {
        ranges.sort_by_key(|range| range.offset);
        let page_bytes = ranges.first().ok_or(HandshakeError::Empty)?.page_bytes();
        let mut expected = 0;
        for range in &ranges {
            let end = range.end()?;
            if range.page_bytes() != page_bytes {
                return Err(HandshakeError::MixedPages(page_bytes, range.page_bytes()));
            }
            if range.offset != expected {
                return Err(HandshakeError::Gap { start: range.offset, end, expected });
            }
            expected = end;
        }
        if !matches!(page_bytes, 4096 | HUGE) {
            return Err(HandshakeError::PageSize(page_bytes));
        }
        Ok(Self { ranges: ranges.into_iter().map(SentMapping::into_mapping).collect(), page_bytes })
    }

    /// The ranges, in the order of the memory file, end to end from its start.
    #[must_use]
    pub fn ranges(&self) -> &[GuestMapping] {
        &self.ranges
    }

    /// The addresses of the ranges.
    pub(crate) fn addresses(&self) -> Vec<Range<usize>> {
        let range = |range: &GuestMapping| {
            range.base_host_virt_addr as usize..(range.base_host_virt_addr + range.size) as usize
        };
        self.ranges.iter().map(range).collect()
    }

    /// The size of the guest's pages in bytes.
    #[must_use]
    pub const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The bytes of the guest's memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }
}

/// A complete handshake.
#[derive(Debug)]
pub(crate) struct Handshake {
    pub(crate) mappings: GuestMappings,
    pub(crate) uffd: OwnedFd,
}

/// The part of a handshake that has arrived.
#[derive(Debug, Default)]
pub(crate) struct PartialHandshake {
    message: Vec<u8>,
    fds: Vec<OwnedFd>,
    mappings: Option<GuestMappings>,
    reader: Reader,
}

impl PartialHandshake {
    /// Adds data. Returns the handshake once it is complete. The message may come in any parts, and
    /// the descriptor with any of them.
    pub(crate) fn take(
        &mut self,
        bytes: &[u8],
        received: Received,
    ) -> Result<Option<Handshake>, HandshakeError> {
        self.fds.extend(received.fds);
        if received.cut {
            return Err(HandshakeError::NoDescriptors);
        }
        if self.fds.len() > 1 {
            return Err(HandshakeError::Descriptors(self.fds.len()));
        }
        if bytes.is_empty() {
            return Err(HandshakeError::Closed { bytes: self.message.len(), fds: self.fds.len() });
        }
        if let Some(other) = self.fds.first().and_then(other_than_userfaultfd) {
            return Err(HandshakeError::NotUserfaultfd(other));
        }
        self.message.extend_from_slice(bytes);
        if self.reader.is_worth_parsing(bytes, self.message.len()) {
            self.mappings = GuestMappings::parse(&self.message)?;
        }
        if self.mappings.is_none() || self.fds.is_empty() {
            return Ok(None);
        }
        Ok(self.mappings.take().zip(self.fds.pop()).map(|(mappings, uffd)| Handshake { mappings, uffd }))
    }

    /// Takes the userfaultfds, and the addresses of the memory if these have come. Other
    /// descriptors stay, because closing them may block.
    pub(crate) fn give_up(&mut self) -> (Vec<OwnedFd>, Vec<Range<usize>>) {
        let told = self.mappings.take().map(|mappings| mappings.addresses()).unwrap_or_default();
        let all = mem::take(&mut self.fds).into_iter();
        let (userfaultfds, others) = all.partition(|fd| other_than_userfaultfd(fd).is_none());
        self.fds = others;
        (userfaultfds, told)
    }

    /// Turns a complete handshake that cannot be served back into a partial one.
    pub(crate) fn of(handed: Handshake) -> Self {
        Self { fds: vec![handed.uffd], mappings: Some(handed.mappings), ..Self::default() }
    }

    pub(crate) fn late(&self, after: Duration) -> HandshakeError {
        HandshakeError::TimedOut(after, self.message.len(), self.fds.len())
    }
}

/// Describes a descriptor that is no userfaultfd. This never blocks, whatever the descriptor is.
fn other_than_userfaultfd(fd: &OwnedFd) -> Option<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match link {
        Ok(link) if link.as_os_str() == "anon_inode:[userfaultfd]" => None,
        Ok(link) => Some(brief(link.display())),
        Err(error) => Some(format!("of unknown kind ({error})")),
    }
}

/// Finds the moments when a message may be complete, so that it is not parsed anew for each byte.
#[derive(Debug, Default)]
struct Reader {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The length of the message at its last parse.
    parsed: usize,
}

impl Reader {
    /// True if the message, which ends with these bytes, may be a list, or has doubled since its
    /// last parse.
    fn is_worth_parsing(&mut self, bytes: &[u8], length: usize) -> bool {
        let closed = bytes.iter().filter(|&&byte| self.closes(byte)).count() > 0;
        let outside = self.depth == 0 && !self.in_string && !bytes.trim_ascii().is_empty();
        let worth = closed || outside || length >= (self.parsed * 2).min(LONGEST);
        if worth {
            self.parsed = length;
        }
        worth
    }

    /// True if a byte ends the list.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        matches!(byte, b']' | b'}') && self.depth == 0
    }
}

/// The most clients with incomplete handshakes.
pub(crate) const MAX_CLIENTS: usize = 128;
/// The most bytes of a peer's data in one line of a log.
const BRIEF: usize = 160;
/// Longer than any list: some 10,000 mappings.
const LONGEST: usize = 1 << 20;
const HUGE: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(message: &str) -> Result<Option<GuestMappings>, HandshakeError> {
        GuestMappings::parse(message.as_bytes())
    }

    fn refused(message: &str) -> HandshakeError {
        parse(message).unwrap_err()
    }

    fn mapping(offset: u64, size: u64, rest: &str) -> String {
        format!(r#"{{"base_host_virt_addr":4096000,"size":{size},"offset":{offset}{rest}}}"#)
    }

    fn fds(count: usize) -> Received {
        let fd = || -> OwnedFd {
            pagestitch_testkit::guest::Guest::new(&[4096], false)
                .unwrap()
                .uffd()
                .try_clone_to_owned()
                .unwrap()
        };
        Received { bytes: 0, fds: std::iter::repeat_with(fd).take(count).collect(), cut: false }
    }

    #[test]
    fn messages_of_every_firecracker_version_are_parsed() {
        for (rest, page) in [
            ("", 4096),
            (r#","page_size_kib":4096"#, 4096),
            (r#","page_size":2097152,"page_size_kib":2097152"#, 2 << 20),
            (r#","page_size":4096,"page_size_kib":4,"from_the_future":{"a":[1,2]}"#, 4096),
            (r#","page_size":null"#, 4096),
        ] {
            let message = format!("[{}, {}]", mapping(8192, 4096, rest), mapping(0, 8192, rest));
            let mappings = parse(&message).unwrap().unwrap();
            assert_eq!((mappings.page_bytes(), mappings.bytes()), (page, 12_288), "{rest}");
            assert_eq!(mappings.ranges()[0].offset, 0, "in the file's order");
        }
    }

    #[test]
    fn a_bad_message_is_refused_with_its_defect() {
        use HandshakeError::{Empty, Gap, Garbage, MixedPages, Overflow, PageSize, TooLong};
        assert!(matches!(refused("[]"), Empty));
        for garbage in ["GET / HTTP/1.1", "{}", r#"[{"size":1}]"#, "[] trailing"] {
            assert!(matches!(refused(garbage), Garbage(_)), "{garbage}");
        }
        let gap = refused(&format!("[{}]", mapping(4096, 4096, "")));
        assert!(matches!(gap, Gap { start: 4096, end: 8192, expected: 0 }));
        let mixed = format!("[{},{}]", mapping(0, 4096, ""), mapping(4096, 4096, r#","page_size":2097152"#));
        assert!(matches!(refused(&mixed), MixedPages(4096, HUGE)));
        let gigantic = format!("[{}]", mapping(0, 4096, r#","page_size":1073741824"#));
        assert!(matches!(refused(&gigantic), PageSize(0x4000_0000)));
        assert!(matches!(refused(&format!("[{}]", mapping(0, u64::MAX, ""))), Overflow { .. }));
        assert!(matches!(refused(&("[".to_owned() + &" ".repeat(LONGEST))), TooLong));
    }

    #[test]
    fn a_descriptor_that_is_no_userfaultfd_is_refused_by_name() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let received = Received { bytes: 1, fds: vec![null.into()], cut: false };
        let refused = PartialHandshake::default().take(b"[", received).unwrap_err();
        assert!(matches!(refused, HandshakeError::NotUserfaultfd(kind) if kind == "/dev/null"));
    }

    #[test]
    fn an_error_quotes_few_bytes_of_a_message() {
        for hostile in ["\n\u{1b}".repeat(300_000), "\u{fe0f}".repeat(300_000), "\u{10ffff}".repeat(300_000)]
        {
            let text = refused(&format!("[{}]", serde_json::to_string(&hostile).unwrap())).to_string();
            assert!(text.len() < 300 && !text.contains(['\n', '\u{1b}']), "{} bytes", text.len());
        }
        assert_eq!(brief("as it is"), "as it is");
    }

    /// A message that comes byte by byte is parsed a few times, not once for each byte.
    #[test]
    fn a_message_is_parsed_only_if_it_may_be_complete() {
        let message = format!("[{},", mapping(0, 4096, r#","note":"]]}}\\\"]""#)).repeat(1000);
        let mut reader = Reader::default();
        let parsed = (1..=message.len())
            .filter(|&length| reader.is_worth_parsing(&message.as_bytes()[length - 1..length], length))
            .count();
        assert!(parsed <= 20, "{parsed} times");
    }

    #[test]
    fn a_handshake_needs_one_descriptor_which_may_come_last() {
        let message = format!("[{}]", mapping(0, 4096, ""));
        let mut handshake = PartialHandshake::default();
        assert!(handshake.take(message.as_bytes(), fds(0)).unwrap().is_none());
        assert!(handshake.take(b" ", fds(1)).unwrap().is_some());
        let two = PartialHandshake::default().take(message.as_bytes(), fds(2)).unwrap_err();
        assert!(matches!(two, HandshakeError::Descriptors(2)));
        let mut closed = PartialHandshake::default();
        closed.take(message.as_bytes(), fds(0)).unwrap();
        assert!(matches!(closed.take(b"", fds(0)).unwrap_err(), HandshakeError::Closed { fds: 0, .. }));
    }

    proptest! {
        #[test]
        fn a_message_may_come_in_any_parts(cuts in prop::collection::vec(1usize..200, 1..20), ranges in 1u64..40) {
            let message: Vec<_> = (0..ranges).map(|range| mapping(range * 4096, 4096, "")).collect();
            let message = format!("[{}]", message.join(","));
            let mut handshake = PartialHandshake::default();
            let (mut rest, mut cuts) = (message.as_bytes(), cuts.into_iter().cycle());
            handshake.fds = fds(1).fds;
            loop {
                let (now, later) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                let taken = handshake.take(now, fds(0)).unwrap();
                prop_assert_eq!(taken.is_some(), later.is_empty());
                if later.is_empty() {
                    prop_assert_eq!(taken.unwrap().mappings.bytes(), ranges * 4096);
                    break;
                }
                rest = later;
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = GuestMappings::parse(&bytes);
        }
    }
}
