//! The memory of a reader, seen from outside.

use nix::poll::{PollFd, PollFlags, poll};
use std::fs;
use std::os::fd::AsFd;

/// Looks at the anonymous memory of a process every 10 ms until it writes to a pipe, or ends. Returns the most bytes.
pub(super) fn most_until(pipe: &impl AsFd, process: u32) -> Option<u64> {
    let mut most = None;
    loop {
        most = most.max(anonymous_bytes(process));
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, EVERY_MS) != Ok(0) {
            return most;
        }
    }
}

/// The bytes of anonymous memory that a process has.
fn anonymous_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

const EVERY_MS: u16 = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systems::PAGE;
    use nix::unistd::pipe;
    use std::fs::File;
    use std::io::Write;
    use std::process;

    #[test]
    fn memory_is_seen_until_the_pipe_has_bytes() {
        let (from, into) = pipe().unwrap();
        File::from(into).write_all(b"figures").unwrap();
        let before = most_until(&from, process::id()).unwrap();
        let memory = pagestitch::source::Pages::without_huge_pages(64 << 20);
        let mut memory = memory.unwrap();
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        // Other tests of this process may free less meanwhile.
        assert!(most_until(&from, process::id()).unwrap() > before + (16 << 20));
    }
}
