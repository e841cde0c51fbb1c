//! The library as C and C++ programs use it: each file of `tests/c` and `examples/c`, by each compiler there is.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn the_public_header_is_generated_from_the_crate() {
    let config = cbindgen::Config::from_file(Path::new(CRATE).join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(CRATE).with_config(config).generate().unwrap();
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    compare("include/pagestitch.h", &String::from_utf8(generated).unwrap());
}

#[test]
fn the_library_exports_the_listed_symbols_only() {
    let listing =
        run(Command::new("nm").args(["-D", "--defined-only", "--format=just-symbols"]).arg(library("so")));
    let mut symbols: Vec<_> = listing.lines().filter(|symbol| !symbol.starts_with("rust_eh")).collect();
    symbols.sort_unstable();
    compare("tests/symbols.txt", &(symbols.join("\n") + "\n"));
}

/// cargo-c takes minutes to build, so this checks only what it asks of the manifest; the workflow of the packages runs it.
#[test]
fn the_manifest_has_the_entries_of_cargo_c() {
    let manifest = fs::read_to_string(Path::new(CRATE).join("Cargo.toml")).unwrap();
    for entry in ["\ncapi = []\n", "from = \"include/pagestitch.h\"", "name = \"pagestitch\"\nfilename"] {
        assert!(manifest.contains(entry), "Cargo.toml has no {entry:?}");
    }
}

/// Compares a committed file with its generated content. `UPDATE_LISTINGS=1` writes it.
fn compare(file: &str, content: &str) {
    let path = Path::new(CRATE).join(file);
    if env::var_os("UPDATE_LISTINGS").is_some() {
        fs::write(&path, content).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == content,
        "{file} is old: write it by UPDATE_LISTINGS=1 cargo test -p pagestitch-capi"
    );
}

#[test]
fn c_programs_use_each_call_with_each_server() {
    let folder = tempfile::tempdir().unwrap();
    for compiler in compilers() {
        let program = compiler.build("tests/c/calls.c", folder.path(), &[]);
        let servers: &[_] = match compiler.command {
            "gcc" => &["pool", "inline", "eager", "best"],
            _ => &["pool"],
        };
        for server in servers {
            run(Command::new(&program).arg(server).arg(folder.path()));
        }
    }
}

#[test]
fn wrong_arguments_are_errors_that_name_the_thing_and_the_remedy() {
    each_compiler_runs("bad_input", &[]);
}

#[test]
fn random_calls_return_with_a_line_for_each_error() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, compiler) in compilers().enumerate() {
        let program = compiler.build("tests/c/random_calls.c", folder.path(), &[ASSERTIONS]);
        run(Command::new(&program).args([&seed.to_string(), "3000"]));
    }
}

#[test]
fn an_event_loop_serves_the_faults_of_another_thread() {
    each_compiler_runs("manual", &[]);
}

#[test]
fn calls_at_the_end_of_a_thread_return_their_errors() {
    each_compiler_runs("thread_end", &[]);
}

#[test]
fn callbacks_ask_regions_and_free_none_and_a_source_is_released_once() {
    each_compiler_runs("callbacks", &[]);
}

#[test]
fn a_callback_that_does_not_return_ends_the_process_or_keeps_its_region() {
    let folder = tempfile::tempdir().unwrap();
    // A sanitizer sees the jump across frames of the library.
    for compiler in compilers().filter(|compiler| !compiler.flags.concat().contains("sanitize")) {
        let program = compiler.build("tests/c/leaves.c", folder.path(), &["-pthread"]);
        assert_eq!(run(Command::new(&program).arg("longjmp")), "goes on\n");
        for way in ["pthread_exit", "exception"] {
            let Output { status, stdout, .. } = Command::new(&program).arg(way).output().unwrap();
            assert_eq!((status.signal(), stdout.len()), (Some(6), 0), "{way}: {status}");
        }
    }
}

#[test]
fn truncated_files_forks_and_freed_manual_servers_give_errors() {
    let folder = tempfile::tempdir().unwrap();
    each_compiler_runs("ends", &[folder.path()]);
}

#[test]
fn threads_share_the_handles_of_a_server_a_builder_a_budget_and_a_region() {
    each_compiler_runs("threads", &[]);
}

/// The program links the archive, so that only `dlopen` loads the shared library.
#[test]
fn the_handler_of_sigbus_stays_after_dlclose() {
    let folder = tempfile::tempdir().unwrap();
    let program = COMPILERS[0].build("tests/c/unload.c", folder.path(), &["-pthread"]);
    run(Command::new(program).arg(library("so")));
}

/// The guests of `tests/guest` run the program, because this kernel may map no memory of its own.
#[test]
fn the_program_of_physical_memory_is_valid_c_and_cpp() {
    let folder = tempfile::tempdir().unwrap();
    for compiler in compilers() {
        compiler.build("tests/c/physical.c", folder.path(), &[]);
    }
}

/// Builds a file of `tests/c` by each compiler, and runs it.
fn each_compiler_runs(program: &str, arguments: &[&Path]) {
    let folder = tempfile::tempdir().unwrap();
    for compiler in compilers() {
        let flags = ["-pthread", ASSERTIONS];
        let program = compiler.build(&format!("tests/c/{program}.c"), folder.path(), &flags);
        run(Command::new(program).args(arguments));
    }
}

/// Tells a program whether the library finds freed handles.
const ASSERTIONS: &str = if cfg!(debug_assertions) { "-DDEBUG_ASSERTIONS" } else { "-DRELEASE" };

/// Valgrind has no userfaultfd, so it runs the eager server.
#[test]
fn the_library_reads_and_frees_its_memory_correctly_under_valgrind() {
    if !is_there("valgrind") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = COMPILERS[0].build("tests/c/calls.c", folder.path(), &[]);
    let valgrind = ["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"];
    run(Command::new("valgrind").args(valgrind).arg(program).arg("eager").arg(folder.path()).arg("valgrind"));
}

#[test]
fn the_examples_run_as_c_and_as_cpp() {
    let folder = tempfile::tempdir().unwrap();
    for compiler in compilers() {
        let view = compiler.build("../../examples/c/contiguous_view.c", folder.path(), &[]);
        assert_eq!(run(&mut Command::new(view)), "29997 bytes: aabc\n");
        let answers = compiler.build("../../examples/c/three_answers.c", folder.path(), &[]);
        let answers = run(&mut Command::new(answers));
        let (shown, refused) =
            (answers.matches("one range of addresses"), answers.matches("ps_region_of_frames"));
        assert_eq!(shown.count() + refused.count(), 3, "{answers}");
    }
}

#[test]
fn the_programs_of_the_guide_run_as_c_and_as_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let guide = fs::read_to_string(Path::new(CRATE).join("../../docs/c.md")).unwrap();
    let blocks = guide.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next());
    let programs: Vec<_> = blocks.filter(|block| block.contains("main")).collect();
    assert_eq!(programs.len(), 1);
    let source = folder.path().join("guide.c");
    fs::write(&source, programs[0]).unwrap();
    for compiler in &COMPILERS[..2] {
        let program = compiler.build(source.to_str().unwrap(), folder.path(), &[]);
        assert_eq!(run(&mut Command::new(program)), "the first ELF\n");
    }
}

/// A compiler, with its language and the library that it links.
struct Compiler {
    command: &'static str,
    flags: &'static [&'static str],
    library: &'static str,
}

const COMPILERS: [Compiler; 5] = [
    Compiler { command: "gcc", flags: &["-std=c11", "-pedantic"], library: "a" },
    Compiler { command: "g++", flags: &["-x", "c++", "-std=c++17"], library: "so" },
    Compiler { command: "clang", flags: &["-std=c11", "-pedantic"], library: "so" },
    Compiler { command: "clang++", flags: &["-x", "c++", "-std=c++17"], library: "so" },
    Compiler {
        command: "gcc",
        flags: &["-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        library: "so",
    },
];

fn compilers() -> impl Iterator<Item = &'static Compiler> {
    COMPILERS.iter().filter(|compiler| is_there(compiler.command))
}

impl Compiler {
    fn build(&self, source: &str, into: &Path, more: &[&str]) -> PathBuf {
        let source = Path::new(CRATE).join(source);
        let program =
            into.join(format!("{}-{}", source.file_stem().unwrap().to_string_lossy(), self.command));
        let library = library(self.library);
        let rpath = format!("-Wl,-rpath,{}", library.parent().unwrap().display());
        let mut command = Command::new(self.command);
        command.args(self.flags).args(["-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-I"]);
        command.arg(Path::new(CRATE).join("include")).args(more).arg(&source);
        run(command.args(["-x", "none"]).arg(library).arg(rpath).arg("-lm").arg("-o").arg(&program));
        program
    }
}

/// False, with a line that says so, if a tool is not installed. Only `gcc` always is, because Rust links with it.
fn is_there(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(env::var_os("PAGESTITCH_REQUIRE_ALL").is_none(), "{tool} is not installed");
        // A single write past the test runner's capture, so that CI can count skips.
        let _ = std::io::stderr()
            .write_all(format!("SKIPPED programs of {tool}: it is not installed\n").as_bytes());
    }
    there
}

/// The library that cargo has built for this test, beside it.
fn library(extension: impl AsRef<OsStr>) -> PathBuf {
    let test = env::current_exe().unwrap();
    let library = test.parent().unwrap().join("libpagestitch_capi").with_extension(extension.as_ref());
    assert!(library.exists(), "{} is missing: cargo builds it with this test", library.display());
    library
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}
