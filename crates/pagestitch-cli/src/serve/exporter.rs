//! Answers scrapes of Prometheus. One thread holds a few connections, each for a few seconds and
//! with a short request, so that no client delays a guest, and a silent one delays no scrape. A
//! flood of connections may end a scrape before its answer.

use super::figures::Figures;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

/// A listening socket for scrapes.
#[derive(Debug)]
pub(super) struct Exporter {
    listener: TcpListener,
    address: SocketAddr,
}

impl Exporter {
    pub(super) fn bind(address: SocketAddr) -> Result<Self, String> {
        let bound = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(Self { address: listener.local_addr()?, listener })
        });
        bound.map_err(|error| {
            format!("cannot listen at {address} for --metrics: {error}: name another address or port")
        })
    }

    /// The address, with the port that the kernel has chosen for port 0.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers scrapes until the process ends.
    pub(super) fn start(self, figures: Figures) -> io::Result<()> {
        thread::Builder::new().name("metrics".into()).spawn(move || self.answer(&figures)).map(drop)
    }

    fn answer(self, figures: &Figures) {
        let mut clients: Vec<Client> = Vec::new();
        loop {
            self.wait(&clients);
            match self.listener.accept() {
                Ok((stream, _)) => clients.extend(Client::new(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // No descriptor is left: the connection stays in the backlog.
                Err(_) => thread::sleep(PAUSE),
            }
            clients.drain(..clients.len().saturating_sub(MAX_CLIENTS));
            clients.retain_mut(|client| client.advance(figures));
        }
    }

    /// Waits until a client can go on, or its time is over.
    fn wait(&self, clients: &[Client]) {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let wanted =
            |client: &Client| if client.answer.is_some() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        fds.extend(clients.iter().map(|client| PollFd::new(client.stream.as_fd(), wanted(client))));
        let next = clients.iter().map(|client| client.deadline).min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()) + ROUNDING);
        let left =
            left.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        if poll(&mut fds, left).is_err() {
            thread::sleep(PAUSE);
        }
    }
}

/// A connection: first its request is read, then its answer is written.
#[derive(Debug)]
struct Client {
    stream: TcpStream,
    deadline: Instant,
    request: Vec<u8>,
    /// The rest of the answer.
    answer: Option<Vec<u8>>,
}

impl Client {
    fn new(stream: TcpStream) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        Some(Self { stream, deadline: Instant::now() + TIME_LIMIT, request: Vec::new(), answer: None })
    }

    /// Reads or writes as much as is possible now. False if the connection is over.
    fn advance(&mut self, figures: &Figures) -> bool {
        if Instant::now() >= self.deadline {
            return false;
        }
        let done = if self.answer.is_none() { self.read(figures) } else { Ok(false) };
        match done.and_then(|_| self.write()) {
            Ok(over) => !over,
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Reads the request. The answer is ready after its end.
    fn read(&mut self, figures: &Figures) -> io::Result<bool> {
        let mut part = [0; MAX_REQUEST];
        match self.stream.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => self.request.extend(&part[..bytes]),
        }
        let complete = self.request.windows(4).any(|end| end == b"\r\n\r\n");
        if complete || self.request.len() >= MAX_REQUEST {
            self.answer = Some(answer(&self.request, complete, figures));
        }
        Ok(complete)
    }

    /// Writes the answer. True at its end.
    fn write(&mut self) -> io::Result<bool> {
        let Some(answer) = &mut self.answer else { return Ok(false) };
        let bytes = self.stream.write(answer)?;
        answer.drain(..bytes);
        Ok(answer.is_empty())
    }
}

/// The answer to a request, with its head.
fn answer(request: &[u8], complete: bool, figures: &Figures) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|&byte| byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        _ if !complete => ("431 Request Header Fields Too Large", String::from("the request is too long\n")),
        (b"GET", b"/metrics") => ("200 OK", figures.page()),
        (b"GET", _) => ("404 Not Found", String::from("the figures are at /metrics\n")),
        _ => ("405 Method Not Allowed", String::from("say GET /metrics\n")),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

/// Parses the address for scrapes.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| String::from("say an IP address and a port: --metrics 127.0.0.1:9470"))
}

/// The most connections. One more replaces the oldest.
const MAX_CLIENTS: usize = 8;
/// The most bytes of a request.
const MAX_REQUEST: usize = 4096;
/// The time limit of a connection.
const TIME_LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// Added to a wait, because one that ends too early would repeat in a loop.
const ROUNDING: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> SocketAddr {
        let exporter = Exporter::bind(address("127.0.0.1:0").unwrap()).unwrap();
        let address = exporter.address();
        exporter.start(Figures::of_snapshot(4096)).unwrap();
        address
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = Vec::new();
        // The rest of a request that is too long may reset the connection after the answer.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn a_scrape_is_answered_and_another_request_refused() {
        let address = started();
        let page = ask(address, b"GET /metrics?name=x HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, body) = page.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("version=0.0.4"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}", body.len())) && body.ends_with('\n'), "{page}");
        assert!(body.contains("\npagestitch_snapshot_bytes 4096\n"), "{body}");
        for (request, status) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
            (b"\xff\r\n\r\n", "405"),
            (b"\r\n\r\n", "405"),
            (&[b'x'; MAX_REQUEST], "431"),
        ] {
            let answer = ask(address, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
        }
    }

    #[test]
    fn silent_clients_delay_no_scrape() {
        let address = started();
        let mut silent: Vec<TcpStream> =
            (0..3 * MAX_CLIENTS).map(|_| TcpStream::connect(address).unwrap()).collect();
        silent.iter_mut().for_each(|stream| drop(stream.write(b"GET /met")));
        let asked = Instant::now();
        assert!(ask(address, b"GET /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 OK"));
        assert!(asked.elapsed() < TIME_LIMIT, "{:?}", asked.elapsed());
        // The thread has closed the oldest ones, and closes the others after their time.
        silent.iter_mut().for_each(|stream| drop(stream.read(&mut [0])));
        assert!(asked.elapsed() < 3 * TIME_LIMIT, "{:?}", asked.elapsed());
    }

    #[test]
    fn an_address_in_use_is_an_error_with_a_remedy() {
        let taken = started();
        let error = Exporter::bind(taken).unwrap_err();
        assert!(error.contains(&format!("cannot listen at {taken} for --metrics")), "{error}");
        assert!(["", "9470", "localhost:9470", "127.0.0.1"].iter().all(|bad| address(bad).is_err()));
    }
}
