//! Output files: each is replaced as a whole, after success, and leaves no part.

use super::{concatenated, error_line, files, out, pagestitch};
use pagestitch_testkit::wait::until;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

#[test]
fn an_output_file_is_replaced_as_a_whole_after_success() {
    let directory = files();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("map.svg"), "old").unwrap();
    fs::write(path("written"), vec![1; 20_000]).unwrap();
    // A part that the build refuses leaves the old file.
    error_line(
        &pagestitch(directory.path(), &["stitch", "a:0+99999", "-o", "written", "--heatmap", "map.svg"]),
        1,
    );
    assert_eq!(
        (fs::read(path("map.svg")).unwrap(), fs::metadata(path("written")).unwrap().len()),
        (b"old".to_vec(), 20_000)
    );
    out(&pagestitch(directory.path(), &["stitch", "a", "-o", "written", "--heatmap", "map.svg"]));
    assert!(fs::read_to_string(path("map.svg")).unwrap().ends_with("</svg>\n"));
    assert!(fs::read(path("written")).unwrap() == concatenated(directory.path(), &["a"]));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5, "nothing else is left");
}

/// The names of the files in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until a process has written some megabytes.
fn wait_for_output(child: &Child) {
    let counters = format!("/proc/{}/io", child.id());
    let written = || -> u64 {
        let text = fs::read_to_string(&counters).unwrap();
        text.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap()
    };
    until("ten megabytes are written", || written() >= 10 << 20);
}

fn interrupt(child: Child) {
    let id = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::SIGINT).unwrap();
    assert!(!child.wait_with_output().unwrap().status.success());
}

#[test]
fn an_output_that_is_not_completed_leaves_the_old_file_and_no_part() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let file = fs::File::create(path("big")).unwrap();
    let start = || {
        file.set_len(2 << 30).unwrap();
        // A shell has its background jobs ignore SIGINT, and with them the tests of such a job.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_pagestitch")]);
        command.current_dir(directory.path()).args(["stitch", "big", "-o", "written"]);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        wait_for_output(&child);
        child
    };
    for old in [None, Some(b"old".to_vec())] {
        old.iter().for_each(|old| fs::write(path("written"), old).unwrap());
        let expected = if old.is_some() { &["big", "written"][..] } else { &["big"] };
        let check = || {
            assert_eq!(
                (fs::read(path("written")).ok(), names(directory.path())),
                (old.clone(), expected.iter().map(|&name| name.to_owned()).collect())
            );
        };
        interrupt(start());
        check();
        let child = start();
        file.set_len(4096).unwrap();
        error_line(&child.wait_with_output().unwrap(), 1);
        check();
    }
}

#[test]
fn an_interrupted_output_leaves_no_part_where_every_file_has_a_name() {
    let directory = TempDir::new().unwrap();
    fs::File::create(directory.path().join("big")).unwrap().set_len(2 << 30).unwrap();
    // Without procfs, a file without a name cannot get one, as on a file system that has none.
    let hidden = "mount -t tmpfs none /proc || exit 77; exec \"$0\" stitch big -o written";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", hidden, env!("CARGO_BIN_EXE_pagestitch")]).current_dir(directory.path());
    if !nix::unistd::Uid::effective().is_root() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED an_interrupted_output_leaves_no_part_where_every_file_has_a_name: only root can hide procfs"
        );
        return;
    }
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for_output(&child);
    assert_eq!(names(directory.path()), ["big".to_owned(), format!("written.{}.part", child.id())]);
    interrupt(child);
    assert_eq!(names(directory.path()), ["big"]);
}

#[test]
fn a_new_output_has_its_bytes_and_an_existing_one_its_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let directory = files();
    let path = directory.path().join("written");
    for _ in 0..2 {
        out(&pagestitch(directory.path(), &["stitch", "a", "-o", "written"]));
        assert!(fs::read(&path).unwrap() == concatenated(directory.path(), &["a"]));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    out(&pagestitch(directory.path(), &["stitch", "b", "-o", "written"]));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(fs::read(&path).unwrap() == concatenated(directory.path(), &["b"]));
    let piped = pagestitch(directory.path(), &["stitch", "a", "-o", "/dev/stdout", "--sha256"]);
    assert!(piped.stdout == concatenated(directory.path(), &["a"]), "the summary goes to standard error");
    out(&pagestitch(directory.path(), &["stitch", "a", "-o", "/dev/null"]));
    let said = error_line(&pagestitch(directory.path(), &["stitch", "a", "-o", "/dev/full"]), 1);
    assert!(said.contains("cannot write /dev/full: No space left"), "{said}");
}
