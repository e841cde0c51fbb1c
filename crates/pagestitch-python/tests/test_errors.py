"""Errors: their remedies are words of Python, and those of the kernel have their errno."""

import array
import mmap
import subprocess
import sys
import textwrap

import pagestitch
import pytest

RUST = ("copy_on_write", "Eager", "()", "::")
"""Parts of names of Rust that no option of a region has in Python."""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(200_000))
    return path


def read_only_descriptor_in_a_writable_region(path):
    with open(path, "rb") as opened:
        pagestitch.Region([opened], writable=True)


@pytest.mark.parametrize(
    "build, remedy",
    [
        (read_only_descriptor_in_a_writable_region, r"or pass File\(\.\.\., in_place=False\)"),
        (
            lambda path: pagestitch.Region([b"x"], budget=64 << 20, server="eager"),
            'server="eager" has no thread that evicts pages: leave out budget, or pass a Pool as the server',
        ),
        (
            lambda path: pagestitch.Region([b"x"], budget=64 << 20, inherit_on_fork=True, server=pagestitch.Pool(1)),
            "leave out inherit_on_fork or budget$",
        ),
        (
            lambda path: pagestitch.Region([b"x"], budget=4 << 20, server=pagestitch.Pool(64)),
            "or a Pool of fewer workers$",
        ),
    ],
)
def test_an_error_names_arguments_of_python(path, build, remedy):
    with pytest.raises(pagestitch.Error, match=remedy) as raised:
        build(path)
    assert not any(name in str(raised.value) for name in RUST)


def test_a_copied_file_that_is_open_for_reading_may_be_written_to_in_a_region(path):
    """The remedy of the error holds."""
    with open(path, "rb") as opened:
        region = pagestitch.Region([pagestitch.File(opened, in_place=False)], writable=True)
    region.write_at(0, b"written")
    assert region.read_at(0, 7) == b"written" and path.read_bytes()[:7] == bytes(7)


def run(code):
    """Runs a program, whose assertions are the test."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr


def test_the_error_of_a_forked_child_names_the_argument_that_it_lacks():
    run("""
        import os, pagestitch
        region = pagestitch.Region([bytes(5000)], server=pagestitch.Pool(1))
        child = os.fork()
        if child == 0:
            try:
                region.read_at(0, 1)
            except pagestitch.Error as error:
                os._exit(3 if "or with inherit_on_fork=True" in str(error) else 4)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    """)


def test_the_error_of_a_missing_capability_names_the_argument_that_needs_it():
    run("""
        import os, pagestitch
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            pagestitch.Region([b"x"], inherit_on_fork=True, server=pagestitch.Pool(1))
        except (pagestitch.Error, OSError) as error:
            text = str(error)
            assert "inherit_on_fork=True needs CAP_SYS_PTRACE" in text or "userfaultfd" in text, text
            assert "inherit_on_fork()" not in text, text
        else:
            raise AssertionError("the process has the capability")
    """)


@pytest.mark.parametrize(
    "open_many",
    [
        "[pagestitch.File(opened) for _ in range(MANY)]",
        "pagestitch.Region([pagestitch.File(opened)] * MANY)",
        "pagestitch.Region([pagestitch.File(opened, in_place=False)] * MANY)",
        "pagestitch.Region([opened.name] * MANY)",
        "pagestitch.Region([pagestitch.File(opened.name, in_place=False)] * MANY)",
    ],
)
def test_without_descriptors_the_error_has_its_errno_and_names_the_limit(path, open_many):
    """Both limits are low, because opening a file raises the soft one to the hard one."""
    run(f"""
        import errno, pagestitch, resource
        MANY = 100
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY, MANY))
        opened = open({str(path)!r}, "rb")
        try:
            {open_many}
        except OSError as error:
            assert error.errno == errno.EMFILE and "raise" in str(error) and "ulimit -n" in str(error), error
            assert "pass an open one" not in str(error), error
        else:
            raise AssertionError("no limit was met")
    """)


class Sized:
    @property
    def size(self):
        return self.no_such_attribute

    def read_at(self, offset, length):
        return bytes(length)


def test_an_attribute_error_of_a_size_is_raised_itself():
    with pytest.raises(AttributeError, match="no_such_attribute"):
        pagestitch.Region([Sized()])


@pytest.mark.parametrize(
    "chunks",
    [b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), array.array("d", [1.0]), mmap.mmap(-1, 4096), "path"],
)
def test_a_buffer_or_path_in_the_place_of_the_list_is_told_of_the_list(chunks):
    with pytest.raises(TypeError, match=r"pass \[x\]"):
        pagestitch.Region(chunks)


def test_a_number_of_thousands_of_digits_is_an_overflow_error(capfd):
    for call in (pagestitch.Hole, lambda number: pagestitch.Region([b"x"]).read_at(number, 1)):
        with pytest.raises(OverflowError, match="is a number of thousands of digits: pass a number from 0 to"):
            call(10**5000)
    assert "ignored" not in capfd.readouterr().err


def test_a_descriptor_past_all_integers_is_a_value_error():
    with pytest.raises(ValueError, match=f"the descriptor is {2**70}: pass an open one"):
        pagestitch.File(2**70)


def test_a_plan_names_arguments_of_python(path):
    plan = pagestitch.Region([b"x", path], server="eager").plan()
    assert '(server="eager")' in plan and "Eager" not in plan
    assert "has a budget that is too small" in pagestitch.Region([bytes(9000)], server=pagestitch.Pool(1), budget=8 << 20).plan()
