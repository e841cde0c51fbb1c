//! What Firecracker sends when it connects: where the guest's memory is, and the userfaultfd that it is registered with.
//!
//! ```text
//!   [{"base_host_virt_addr": 139968, "size": 536870912, "offset": 0, "page_size": 4096, "page_size_kib": 4096}, ...]
//!                                                               + one descriptor (SCM_RIGHTS), no answer
//! ```
//!
//! | version | page size in |
//! |---|---|
//! | up to 1.6 | nothing: 4 KiB |
//! | from 1.7 | `page_size_kib`, which holds bytes, whatever it is called |
//! | from 1.12 | `page_size`, in bytes, beside it |

use pagestitch_kernel::fd_passing::Received;
use serde::Deserialize;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// A range of a guest's memory, as its VMM has mapped it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GuestMapping {
    /// Where it is, in the VMM.
    pub base_host_virt_addr: u64,
    /// How many bytes it has.
    pub size: u64,
    /// Where its bytes are in the memory file.
    pub offset: u64,
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

/// A client is not served. `Display` is a line for a person: what came, and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// What it sent is no JSON array of mappings: why, in a few words.
    #[error("sent no list of memory mappings ({0}): expected the JSON array that Firecracker sends")]
    Garbage(String),
    /// It goes on and on.
    #[error("sent more than {} KiB, which is no list of memory mappings", LONGEST / 1024)]
    TooLong,
    /// It hung up in between.
    #[error(
        "closed the connection after {bytes} bytes and {fds} descriptors: expected a JSON array and one userfaultfd"
    )]
    Closed {
        /// How many bytes had come.
        bytes: usize,
        /// How many descriptors had.
        fds: usize,
    },
    /// It has not sent all in time.
    #[error("sent nothing complete within {0:?}: {bytes} bytes and {fds} descriptors", bytes = .1, fds = .2)]
    TimedOut(Duration, usize, usize),
    /// It sent several descriptors.
    #[error("sent {0} descriptors: expected one, the userfaultfd")]
    Descriptors(usize),
    /// It sent more descriptors than this process may have.
    #[error("sent descriptors that this process cannot have: raise the limit on open files (ulimit -n)")]
    NoDescriptors,
    /// It sent a descriptor of this.
    #[error(
        "sent a descriptor that is no userfaultfd but {0}: expected the one that its memory is registered with"
    )]
    NotUserfaultfd(String),
    /// The array is empty.
    #[error("sent an empty list: a guest has memory")]
    Empty,
    /// GuestMappings of several page sizes.
    #[error("mixes page sizes of {0} and {1} bytes: all memory of a guest has one")]
    MixedPages(u64, u64),
    /// A page size that cannot be served.
    #[error("has pages of {0} bytes: 4096 and 2097152 can be served")]
    PageSize(u64),
    /// GuestMappings that are not the memory file's.
    #[error(
        "maps bytes {start:#x}..{end:#x} of the memory file where {expected:#x} was to come next: ranges have to lie end to end"
    )]
    Gap {
        /// Where a mapping begins in the file.
        start: u64,
        /// Where it ends.
        end: u64,
        /// Where the one before it ended.
        expected: u64,
    },
    /// GuestMappings that are more or less than the memory file.
    #[error("has {guest} bytes of memory, and the memory file {file}: this is another guest's snapshot")]
    Size {
        /// What the guest has.
        guest: u64,
        /// What the file has.
        file: u64,
    },
    /// An address or length past 2^64.
    #[error("has a mapping of {size:#x} bytes at {address:#x}, past the end of all addresses")]
    Overflow {
        /// Its address.
        address: u64,
        /// Its length.
        size: u64,
    },
    /// The connection failed.
    #[error("cannot be read from: {0}")]
    Io(#[from] io::Error),
    /// Its memory cannot be served.
    #[error("cannot be served: {0}")]
    Adopt(#[from] pagestitch::Error),
    /// Its process cannot be held.
    #[error(
        "cannot be told from other processes ({0}): it ended meanwhile, or, before Linux 6.5, is in another PID namespace or of \
         another user: run the handler as root, in the host's"
    )]
    Peer(#[source] io::Error),
    /// Its process cannot be ended, which is what was declared for bytes that cannot be had.
    #[error(
        "cannot be ended ({0}) where its bytes cannot be had: run the handler as its user or root, and in its PID namespace or the \
         host's, or declare that lost pages are poisoned (Linux 6.6)"
    )]
    CannotKill(#[source] io::Error),
    /// Other peers of its user came after it, and it was not done.
    #[error("was not done when {MAX_CLIENTS} others had come: send the handshake at once")]
    TooManyClients,
    /// The handler was told to stop.
    #[error("was not done when the handler was told to stop")]
    ShuttingDown,
}

/// What a peer has sent, as it can be written to a log: in a few words, and on one line.
pub(crate) fn brief(what: impl fmt::Display) -> String {
    let escaped = what.to_string();
    let mut short: String = escaped.chars().take(BRIEF).flat_map(char::escape_debug).collect();
    if short.len() > BRIEF || escaped.chars().nth(BRIEF).is_some() {
        short.truncate(short.floor_char_boundary(BRIEF));
        short.push_str("...");
    }
    short
}

impl GuestMapping {
    /// The size of its pages, in bytes.
    fn page_bytes(&self) -> u64 {
        self.page_size.or(self.page_size_kib).unwrap_or(4096)
    }

    fn end(&self) -> Result<u64, HandshakeError> {
        let past = HandshakeError::Overflow { address: self.base_host_virt_addr, size: self.size };
        let fits =
            self.base_host_virt_addr.checked_add(self.size).and_then(|_| self.offset.checked_add(self.size));
        fits.ok_or(past)
    }
}

impl GuestMappings {
    /// Reads the message. `Ok(None)`: it is not complete.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`] where it can never become a list of mappings, or is one that cannot be.
    pub fn parse(message: &[u8]) -> Result<Option<Self>, HandshakeError> {
        match serde_json::from_slice::<Vec<GuestMapping>>(message) {
            Ok(ranges) => Self::check(ranges).map(Some),
            Err(error) if error.is_eof() && message.len() < LONGEST => Ok(None),
            Err(error) if error.is_eof() => Err(HandshakeError::TooLong),
            Err(error) => Err(HandshakeError::Garbage(brief(error))),
        }
    }

    fn check(mut ranges: Vec<GuestMapping>) -> Result<Self, HandshakeError> {
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
        Ok(Self { ranges, page_bytes })
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

    /// The size of the guest's pages, in bytes.
    #[must_use]
    pub const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// How many bytes of memory the guest has.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }
}

/// A handshake that is complete.
#[derive(Debug)]
pub(crate) struct Handshake {
    pub(crate) mappings: GuestMappings,
    pub(crate) uffd: OwnedFd,
}

/// What has come of a handshake so far.
#[derive(Debug, Default)]
pub(crate) struct PartialHandshake {
    message: Vec<u8>,
    fds: Vec<OwnedFd>,
    mappings: Option<GuestMappings>,
    reader: Reader,
}

impl PartialHandshake {
    /// Takes what came; `Some` when it is all there. In whatever parts, and the descriptor with whichever.
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

    /// The userfaultfds that came, and where the memory is, if that has come. Other descriptors stay: to close them may wait.
    pub(crate) fn give_up(&mut self) -> (Vec<OwnedFd>, Vec<Range<usize>>) {
        let told = self.mappings.take().map(|mappings| mappings.addresses()).unwrap_or_default();
        let userfaultfds = self.fds.extract_if(.., |fd| other_than_userfaultfd(fd).is_none());
        (userfaultfds.collect(), told)
    }

    /// What is left of a handshake that was complete, and cannot be served.
    pub(crate) fn of(handed: Handshake) -> Self {
        Self { fds: vec![handed.uffd], mappings: Some(handed.mappings), ..Self::default() }
    }

    pub(crate) fn late(&self, after: Duration) -> HandshakeError {
        HandshakeError::TimedOut(after, self.message.len(), self.fds.len())
    }
}

/// What a descriptor is, if it is no userfaultfd. To ask for that waits for nothing, whatever it is.
fn other_than_userfaultfd(fd: &OwnedFd) -> Option<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match link {
        Ok(link) if link.as_os_str() == "anon_inode:[userfaultfd]" => None,
        Ok(link) => Some(brief(link.display())),
        Err(error) => Some(format!("cannot be told ({error})")),
    }
}

/// Finds out when a message may be complete without parsing it anew for each byte of it.
#[derive(Debug, Default)]
struct Reader {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// How long the message was when it was parsed.
    parsed: usize,
}

impl Reader {
    /// Whether the message, with these bytes at its end, may be a list, or has doubled since that was tried.
    fn is_worth_parsing(&mut self, bytes: &[u8], length: usize) -> bool {
        let closed = bytes.iter().filter(|&&byte| self.closes(byte)).count() > 0;
        let outside = self.depth == 0 && !self.in_string && !bytes.trim_ascii().is_empty();
        let worth = closed || outside || length >= (self.parsed * 2).min(LONGEST);
        if worth {
            self.parsed = length;
        }
        worth
    }

    /// Whether a byte ends the list.
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

/// Handshakes that are not complete, at most.
pub(crate) const MAX_CLIENTS: usize = 128;
/// As much as a line tells of what a peer sent, in bytes.
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

    fn said(message: &str) -> String {
        parse(message).unwrap_err().to_string()
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
    fn every_version_of_the_message_is_understood() {
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
    fn what_cannot_be_is_refused_by_name() {
        assert!(said("[]").contains("empty"));
        assert!(said("GET / HTTP/1.1").contains("JSON array"));
        assert!(said("{}").contains("JSON array"));
        assert!(said(r#"[{"size":1}]"#).contains("missing field"));
        assert!(said(&format!("[{}]", mapping(4096, 4096, ""))).contains("0x0 was to come next"));
        let mixed = format!("[{},{}]", mapping(0, 4096, ""), mapping(4096, 4096, r#","page_size":2097152"#));
        assert!(said(&mixed).contains("mixes page sizes of 4096 and 2097152"));
        assert!(
            said(&format!("[{}]", mapping(0, 4096, r#","page_size":1073741824"#))).contains("1073741824")
        );
        assert!(said(&format!("[{}]", mapping(0, u64::MAX, ""))).contains("past the end"));
        assert!(said(&format!("[{}] trailing", mapping(0, 4096, ""))).contains("trailing"));
    }

    #[test]
    fn an_endless_message_is_refused() {
        let endless = "[".to_owned() + &" ".repeat(LONGEST);
        assert!(said(&endless).contains("more than 1024 KiB"));
    }

    #[test]
    fn a_descriptor_that_is_no_userfaultfd_is_refused_by_name() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let received = Received { bytes: 1, fds: vec![null.into()], cut: false };
        let said = PartialHandshake::default().take(b"[", received).unwrap_err().to_string();
        assert!(said.contains("is no userfaultfd but /dev/null"), "{said}");
    }

    #[test]
    fn an_error_tells_a_few_words_of_what_was_sent() {
        for hostile in ["\n\u{1b}".repeat(300_000), "\u{fe0f}".repeat(300_000), "\u{10ffff}".repeat(300_000)]
        {
            let said = said(&format!("[{}]", serde_json::to_string(&hostile).unwrap()));
            assert!(said.len() < 300 && !said.contains(['\n', '\u{1b}']), "{} bytes", said.len());
        }
        assert_eq!(brief("as it is"), "as it is");
    }

    /// A message that comes byte by byte is parsed a few times, not once for each byte.
    #[test]
    fn a_message_is_parsed_when_it_may_be_complete() {
        let message = format!("[{},", mapping(0, 4096, r#","note":"]]}}\\\"]""#)).repeat(1000);
        let mut reader = Reader::default();
        let parsed = (1..=message.len())
            .filter(|&length| reader.is_worth_parsing(&message.as_bytes()[length - 1..length], length))
            .count();
        assert!(parsed <= 20, "{parsed} times");
    }

    #[test]
    fn one_descriptor_has_to_come_and_may_come_late() {
        let message = format!("[{}]", mapping(0, 4096, ""));
        let mut handshake = PartialHandshake::default();
        assert!(handshake.take(message.as_bytes(), fds(0)).unwrap().is_none());
        assert!(handshake.take(b" ", fds(1)).unwrap().is_some());
        let two = PartialHandshake::default().take(message.as_bytes(), fds(2)).unwrap_err();
        assert!(two.to_string().contains("2 descriptors"));
        let mut gone = PartialHandshake::default();
        gone.take(message.as_bytes(), fds(0)).unwrap();
        assert!(gone.take(b"", fds(0)).unwrap_err().to_string().contains("0 descriptors"));
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
        fn anything_at_all_is_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = GuestMappings::parse(&bytes);
        }
    }
}
