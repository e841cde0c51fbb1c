//! Inputs that the command refuses: the line names the thing and the remedy, and nothing is lost.

use super::{error_line, files, out, pagestitch, start_on_terminal};
use pagestitch_testkit::wait::until;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn a_file_without_a_length_is_refused_with_the_remedy() {
    let directory = files();
    fs::write(directory.path().join("empty"), "").unwrap();
    for (arguments, expected) in [
        (
            &["stitch", "/proc/cpuinfo"][..],
            "/proc/cpuinfo is empty, or has no length, as files of /proc: omit",
        ),
        (&["stitch", "a", "/proc/self/maps:0+1"], "send it to standard input as the part -"),
        (&["stitch", "a", "empty"], "empty is empty, or"),
        (&["demo", "--file", "/proc/cpuinfo"], "/proc/cpuinfo is empty, or has no length"),
    ] {
        let output = pagestitch(directory.path(), arguments);
        let said = error_line(&output, 1);
        assert!(said.contains(expected) && said.lines().count() == 1, "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "the command announces nothing before it looks at the file");
    }
}

#[test]
fn a_file_with_fewer_bytes_than_its_length_is_refused_with_the_remedy() {
    let directory = files();
    let sysfs = "/sys/kernel/mm/transparent_hugepage/enabled";
    if !Path::new(sysfs).exists() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED a_file_with_fewer_bytes_than_its_length_is_refused_with_the_remedy: no huge pages"
        );
        return;
    }
    let refused =
        format!("pagestitch: {sysfs} has fewer bytes than its length, as files of sysfs: omit this");
    for more in [&[][..], &["--copy"], &["--copy", "--touch", "random"]] {
        let said = error_line(&pagestitch(directory.path(), &[&["stitch", "a", sysfs], more].concat()), 1);
        assert!(said.starts_with(&refused) && said.contains("standard input as the part -"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    // Its bytes are available.
    let part = format!("{sysfs}:0+5");
    let piped = pagestitch(directory.path(), &["stitch", &part, "-o", "-"]);
    assert_eq!(piped.stdout, fs::read(sysfs).unwrap()[..5]);
    let said = error_line(&pagestitch(directory.path(), &["demo", "--file", sysfs]), 1);
    assert!(said.contains("as files of sysfs have: name another file"), "{said}");
}

#[test]
fn a_page_that_cannot_be_read_is_told_once() {
    let directory = files();
    let big = File::create(directory.path().join("big")).unwrap();
    big.set_len(64 << 20).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
    let command = command.args(["stitch", "big", "a", "-", "--copy"]).current_dir(directory.path());
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The command opens its parts in order, and reads the standard input to its end: the first part has its
    // length when the second one is open.
    let opened = || {
        let files = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|path| path.ends_with("a")))
    };
    until("the second part is opened", opened);
    big.set_len(4096).unwrap();
    child.stdin.take().unwrap().write_all(b"the end").unwrap();
    let said = error_line(&child.wait_with_output().unwrap(), 1);
    assert!(said.starts_with("pagestitch: part 1 (big)") && said.lines().count() == 1, "{said}");
}

#[test]
fn a_demo_of_more_than_the_memory_is_refused_by_name() {
    let directory = files();
    File::create(directory.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
    let said = error_line(&pagestitch(directory.path(), &["demo", "--file", "sparse"]), 1);
    assert!(said.contains("sparse has 1.0 TiB, and the demo holds 4 copies"), "{said}");
    assert!(said.contains("of memory that are left: name a smaller file"), "{said}");
    let said = out(&pagestitch(directory.path(), &["demo", "--file", "b"]));
    assert!(said.contains("b (1 byte) is cut into 1 piece at odd offsets"), "{said}");
}

#[test]
fn two_outputs_in_one_file_are_refused() {
    let directory = files();
    std::os::unix::fs::symlink(directory.path(), directory.path().join("here")).unwrap();
    let copied = ["stitch", "a", "--copy", "--touch", "random"];
    let stitch = |more: &[&'static str]| [&copied[..], more].concat();
    let serve = ["serve", "firecracker", "--memory", "a", "--socket", "s"];
    let serve = |more: &[&'static str]| [&serve[..], more].concat();
    for (arguments, expected) in [
        (stitch(&["--record", "r", "--heatmap", "./r"]), "the map ./r is the recording r, which"),
        (stitch(&["--record", "r", "--heatmap", "here/r"]), "the map here/r is the recording r, which"),
        (stitch(&["-o", "r", "--heatmap", "r"]), "the map r is the output r, which"),
        (stitch(&["-o", "r", "--record", "r"]), "the recording r is the output r, which"),
        (serve(&["--record", "r", "--heatmap", "r"]), "the map r is the recording r, which"),
        (serve(&["--heatmap", "s"]), "the map s is the socket s, which"),
    ] {
        let said = error_line(&pagestitch(directory.path(), &arguments), 2);
        assert!(said.contains(expected) && said.contains("name another file"), "{arguments:?}: {said}");
    }
    out(&pagestitch(directory.path(), &stitch(&["-o", "/dev/null", "--heatmap", "/dev/null"])));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4, "nothing was written");
}

#[test]
fn an_output_that_cannot_be_written_names_the_remedy() {
    let directory = files();
    fs::create_dir(directory.path().join("folder")).unwrap();
    for (arguments, expected) in [
        (
            &["stitch", "a", "-o", "folder"][..],
            "cannot write folder: Is a directory (os error 21): name a file",
        ),
        (&["stitch", "a", "-o", "no/where"], "No such file or directory (os error 2): make its folder first"),
        (&["stitch", "a", "--heatmap", "no/where"], "make its folder first"),
        (&["bench", "--report", "no/where"], "make its folder first"),
        (
            &["man", "missing"],
            "cannot write to missing: No such file or directory (os error 2): name an existing folder",
        ),
        (&["man", "no/where"], "cannot write to no/where: No such file or directory (os error 2): name an"),
        (&["man", "a"], "name an existing folder"),
    ] {
        let said = error_line(&pagestitch(directory.path(), arguments), 1);
        assert!(said.contains(expected) && said.lines().count() == 1, "{arguments:?}: {said}");
    }
}

#[test]
fn an_error_of_standard_output_names_it() {
    let directory = files();
    for arguments in [&["probe"][..], &["stitch", "a"], &["stitch", "a", "-o", "-"], &["man"], &["--help"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagestitch"));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let command = command.current_dir(directory.path()).args(arguments).stdout(full);
        let said = error_line(&command.stderr(Stdio::piped()).output().unwrap(), 1);
        assert_eq!(
            said, "pagestitch: cannot write standard output: No space left on device (os error 28)\n",
            "{arguments:?}"
        );
    }
}

#[test]
fn a_region_has_no_invented_name_in_an_error() {
    let directory = files();
    let said = error_line(&pagestitch(directory.path(), &["stitch", "a:9000+2000"]), 1);
    assert!(said.starts_with("pagestitch: part 1 ("), "{said}");
    let said = error_line(&pagestitch(directory.path(), &["--json", "stitch", "a:9000+2000"]), 1);
    assert!(
        said.starts_with("{\"error\":\"part 1 (") && said.contains("\"kind\":\"InvalidChunk\""),
        "{said}"
    );
}

#[test]
fn a_negative_number_is_refused_as_a_number() {
    let serve = ["serve", "firecracker", "--socket", "s", "--memory", "a"];
    for (arguments, option) in [
        (vec!["stitch", "a", "--workers", "-1"], "--workers"),
        (vec!["stitch", "a", "--seed", "-1"], "--seed"),
        (vec!["demo", "--seed", "-1"], "--seed"),
        (vec!["stress", "--seconds", "-1"], "--seconds"),
        (vec!["stress", "--seed", "-1"], "--seed"),
        (vec!["bench", "--rounds", "-1"], "--rounds"),
        ([&serve[..], &["--workers", "-1"]].concat(), "--workers"),
        ([&serve[..], &["--handshake-timeout", "-1"]].concat(), "--handshake-timeout"),
    ] {
        let said = error_line(&pagestitch(Path::new("/"), &arguments), 2);
        let expected = format!("invalid value '-1' for '{option} ");
        assert!(said.contains(&expected) && !said.contains("tip:"), "{arguments:?}: {said}");
    }
}

#[test]
fn a_comparison_with_no_row_is_refused_before_the_measurement() {
    let directory = files();
    fs::write(directory.path().join("empty"), "\n").unwrap();
    fs::write(directory.path().join("binary"), [0xff, 0xfe]).unwrap();
    for (file, expected) in [("empty", "it has no row: name the output"), ("binary", "it is no text: name")] {
        let said = error_line(&pagestitch(directory.path(), &["bench", "--compare", file]), 1);
        assert!(said.contains(&format!("cannot compare with {file}: {expected}")), "{said}");
    }
}

#[test]
fn a_diff_that_is_no_file_of_pages_has_no_extents() {
    let directory = files();
    fs::write(directory.path().join("empty"), "").unwrap();
    assert!(Command::new("mkfifo").arg("pipe").current_dir(directory.path()).status().unwrap().success());
    for (diff, expected) in [
        ("pipe", "the holes of pipe are unknown, because only a regular file has holes"),
        ("empty", "empty has 0 bytes, which is not a whole number of pages"),
        ("a", "a has 10000 bytes, which is not a whole number of pages"),
    ] {
        let said = error_line(&pagestitch(directory.path(), &["extents", diff]), 1);
        assert!(said.contains(expected), "{diff}: {said}");
    }
}

#[test]
fn a_socket_that_cannot_be_made_names_the_remedy() {
    let directory = files();
    fs::write(directory.path().join("memory"), vec![0; 4096]).unwrap();
    let long = "s".repeat(108);
    for (socket, expected) in
        [(long.as_str(), "a socket has at most 107 bytes"), ("no/where", "make its folder first")]
    {
        let arguments = ["serve", "firecracker", "--memory", "memory", "--socket", socket];
        let said = error_line(&pagestitch(directory.path(), &arguments), 1);
        assert!(said.contains("cannot listen at ") && said.contains(expected), "{said}");
    }
}

#[test]
fn a_long_touch_shows_its_progress() {
    let directory = files();
    File::create(directory.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
    let touch = ["stitch", "sparse", "--touch", "sequential"];
    let (mut child, mut terminal) = start_on_terminal(directory.path(), &touch, &[]);
    let (mut shown, mut some) = (String::new(), [0; 4096]);
    while !shown.contains("touching ") {
        let count = terminal.read(&mut some).unwrap();
        shown += &String::from_utf8_lossy(&some[..count]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
