//! An append-only log: one thread appends lines while others read the region as one slice.

use pagestitch::{Pool, Region};
use std::thread;

fn main() -> Result<(), pagestitch::Error> {
    let pool = Pool::new()?;
    // 1 TiB of addresses. A byte takes memory once it is appended and touched.
    let log = Region::builder().name("log").capacity(1 << 40).build(&pool)?;
    thread::scope(|scope| {
        for reader in 0..2 {
            let log = &log;
            scope.spawn(move || {
                let (mut seen, mut lines) = (0, 0);
                while lines < LINES {
                    // A slice ends at the length at its call, and stays valid while the log grows.
                    let new = &log.as_slice()[seen..];
                    lines += new.iter().filter(|&&byte| byte == b'\n').count();
                    seen += new.len();
                }
                println!("reader {reader} has seen {lines} lines in {seen} bytes");
            });
        }
        (0..LINES).try_for_each(|line| log.append(format!("this is line {line}\n")).map(drop))
    })?;
    let last = log.chunk_slice(LINES - 1).expect("the last line");
    print!("{}", String::from_utf8_lossy(last));
    assert_eq!(last, format!("this is line {}\n", LINES - 1).as_bytes());
    Ok(())
}

const LINES: usize = 10_000;
