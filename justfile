# Each recipe is one command of this repository; `just` lists them. CONTRIBUTING.md says what each needs.

_list:
    @{{ just_executable() }} --list --unsorted

# compile all that there is, tests and benchmarks included
check:
    cargo check --workspace --all-targets

# every promise, on the running kernel
test *args:
    cargo test --workspace {{ args }}

# format, clippy, docs, unsafe code in its place, words
lint:
    ci/lint

# fetch the kernels of the guest tests, and run these
guests:
    ci/guest-kernels
    PAGESTITCH_REQUIRE_GUEST=1 cargo test -p pagestitch-guests -p pagestitch-tests --test guest --test physical

# the header and the exported symbols of the C library, after an intended change
header:
    UPDATE_LISTINGS=1 cargo test -p pagestitch-capi

# the Python package: builds its wheel, and tests it in an environment of its own
python:
    ci/python

# what a fault costs here, beside the plain ways
bench *args:
    cargo run --release -- bench {{ args }}

# one static file of the command, whose `bench scaling --table` prints how faults scale on the machine to which it is carried
many-cores *args:
    ci/many-cores {{ args }}

# the oldest Rust of each crate, with each combination of features
msrv:
    ci/msrv

# write the lists of public items, after an intended change
listings:
    UPDATE_LISTINGS=1 cargo test -p pagestitch-tests --test surface

# random regions in which everything fails on purpose; the kernel, too
stress seconds="60":
    cargo run --release --features inject -- stress --seconds {{ seconds }}

# the tests under AddressSanitizer and ThreadSanitizer
sanitize:
    ci/sanitize

# each fuzz target for so many seconds
fuzz seconds="60":
    ci/fuzz {{ seconds }}

# the orders in which threads can meet, and the pure parts under Miri
models:
    ci/models

# cut a real file into pieces, stitch them, prove the hash
demo:
    cargo run --release -- demo

# everything, from nothing (Debian, root)
ci:
    .ci/run
