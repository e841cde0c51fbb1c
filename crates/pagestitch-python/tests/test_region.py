"""Regions as Python programs use them."""

import ctypes
import errno
import gc
import io
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import types

import numpy
import pagestitch
import pytest

PAGE = mmap.PAGESIZE


@pytest.fixture(params=[None, "eager", "pool"])
def server(request):
    return pagestitch.Pool(2) if request.param == "pool" else request.param


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(numpy.arange(5 * PAGE // 8, dtype="<u8").tobytes())
    return path


def test_chunks_of_all_sorts_lie_end_to_end(server, file):
    content = file.read_bytes()
    chunks = [
        b"head",
        memoryview(b"0123456789")[2:5],
        pagestitch.Hole(5000),
        file,
        str(file),
        (file, 100, 200),
        pagestitch.File(file, 8, in_place=False),
        numpy.frombuffer(b"\1\0\0\0\2\0\0\0", dtype="<i4"),
    ]
    expected = b"head234" + bytes(5000) + 2 * content + content[100:300] + content[8:] + b"\1\0\0\0\2\0\0\0"
    region = pagestitch.Region(chunks, name="all", server=server)
    assert len(region) == len(expected)
    assert region.read_at(0, len(expected)) == expected
    assert bytes(region) == expected
    assert region.chunks()[:3] == [(0, 4), (4, 3), (7, 5000)]
    assert "memory" in region.plan() and region.metrics()["source_errors"] == 0
    assert "all" in repr(region)


def test_numpy_shows_a_region_without_a_copy(file):
    region = pagestitch.Region([file], page_aligned=True)
    array = numpy.frombuffer(region, dtype="<u8")
    assert array.sum() == sum(range(5 * PAGE // 8)) and not array.flags.writeable
    with pytest.raises(BufferError, match="1 buffers"):
        region.close()
    del array
    region.close()
    assert region.closed


def test_an_open_file_is_a_chunk_and_may_be_closed(server, file):
    with open(file, "rb") as opened:
        opened.read(5)
        region = pagestitch.Region([opened, pagestitch.File(opened.fileno(), 8, 16), (opened, 0, 4)], server=server)
    content = file.read_bytes()
    assert bytes(region) == content + content[8:24] + content[:4]


def test_a_memfd_is_written_through_a_region():
    memfd = os.memfd_create("shown")
    os.truncate(memfd, PAGE)
    region = pagestitch.Region([pagestitch.File(memfd)], writable=True)
    region.write_at(5, b"seen")
    assert os.pread(memfd, 4, 5) == b"seen"
    os.close(memfd)


def test_parts_of_a_region_are_bytes_and_views():
    region = pagestitch.Region([b"head", pagestitch.Hole(PAGE), b"tail"])
    assert region[0] == ord("h") and region[-1] == ord("l") and len(region[4:]) == PAGE + 4
    assert bytes(region[-4:]) == b"tail" and bytes(region[:4:2]) == b"ha" and isinstance(region[:1], memoryview)
    for wrong, error in [(PAGE + 8, IndexError), ("a", TypeError), (None, TypeError)]:
        with pytest.raises(error):
            region[wrong]
    part = region[1:3]
    with pytest.raises(BufferError, match="release"):
        region.close()
    part.release()
    region.close()
    with pytest.raises(BufferError, match="closed"):
        region[0]


def test_a_writable_region_keeps_its_chunks():
    chunk = b"unchanged"
    region = pagestitch.Region([chunk], writable=True)
    memoryview(region)[:2] = b"XX"
    region.write_at(7, b"YY")
    assert bytes(region) == b"XXchangYY" and chunk == b"unchanged"


def test_a_touched_page_is_read_and_no_other(file):
    region = pagestitch.Region([pagestitch.File(file, in_place=False)], server=pagestitch.Pool(1))
    assert memoryview(region)[3 * PAGE + 8] == (3 * PAGE + 8) // 8 % 256
    metrics = region.metrics()
    assert 1 <= metrics["faults"] <= 2 and sum(v for k, v in metrics.items() if k in ("pages_copied", "pages_buffered")) <= 2


def test_a_region_may_be_closed_and_left_by_with():
    with pagestitch.Region([b"bytes"]) as region:
        assert bytes(memoryview(region)) == b"bytes"
    assert region.closed and "closed" in repr(region)
    region.close()
    for use in (lambda: len(region), lambda: region.read_at(0, 1), lambda: region.populate(), region.plan):
        with pytest.raises(ValueError, match="closed"):
            use()
    with pytest.raises(BufferError, match="closed"):
        memoryview(region)


def test_a_region_of_four_times_its_budget_has_its_bytes():
    chunks = [bytes([n]) * (1 << 20) for n in range(64)]
    region = pagestitch.Region(chunks, budget=16 << 20, server=pagestitch.Pool(2))
    assert (numpy.frombuffer(region, dtype="u1")[:: mmap.PAGESIZE] == numpy.repeat(numpy.arange(64, dtype="u1"), 256)).all()
    with pytest.raises(pagestitch.Error, match="budget"):
        pagestitch.Region([b"x"], budget=1)
    # A touch of a page that has left after populate() would be SIGBUS.
    with pytest.raises(ValueError, match="leave out budget"):
        pagestitch.Region([Squares()], budget=16 << 20)


def test_a_view_keeps_its_region_and_a_region_its_chunks():
    chunk = bytes(range(256)) * 64
    count = sys.getrefcount(chunk)
    view = memoryview(pagestitch.Region([chunk]))
    assert sys.getrefcount(chunk) > count
    gc.collect()
    assert view[5000] == 5000 % 256
    del view
    gc.collect()
    assert sys.getrefcount(chunk) == count


class Squares:
    """A source in Python."""

    size = 3 * PAGE

    def __init__(self):
        self.reads = 0

    def read_at(self, offset, length):
        self.reads += 1
        return bytes((i * i) % 251 for i in range(offset, offset + length))


def test_a_source_in_python_fills_by_populate_and_read_at(server):
    source = Squares()
    region = pagestitch.Region([source, b"end"], server=server)
    expected = bytes((i * i) % 251 for i in range(3 * PAGE)) + b"end"
    assert region.read_at(5, 300) == expected[5:305]
    if server == "eager":
        assert bytes(memoryview(region)) == expected
    else:
        with pytest.raises(BufferError, match="populate"):
            memoryview(region)
    region.populate()
    assert bytes(memoryview(region)) == expected


def test_a_source_in_python_runs_while_other_threads_do():
    region = pagestitch.Region([Squares() for _ in range(50)], server=pagestitch.Pool(2))
    threads = [threading.Thread(target=region.populate) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert len(bytes(region)) == 150 * PAGE


def test_a_source_in_python_may_read_another_region():
    below = pagestitch.Region([Squares()])
    source = Squares()
    source.read_at = below.read_at
    region = pagestitch.Region([source, source])
    region.populate()
    assert bytes(memoryview(region)) == 2 * below.read_at(0, 3 * PAGE)


@pytest.mark.parametrize(
    "answer, error, text",
    [
        (lambda offset, length: b"short", pagestitch.Error, "returned 5 bytes"),
        (lambda offset, length: 7, pagestitch.Error, "bytes"),
        (lambda offset, length: 1 / 0, pagestitch.Error, "division"),
        (lambda offset, length: (_ for _ in ()).throw(OSError(errno.EIO, "broken")), OSError, "broken"),
    ],
)
def test_a_source_in_python_that_fails_is_an_exception(answer, error, text):
    source = Squares()
    source.read_at = answer
    region = pagestitch.Region([source])
    with pytest.raises(error, match=text):
        region.populate()
    with pytest.raises(error, match=text):
        region.read_at(0, 10)


class Broken:
    """A source in Python that fails."""

    size = 3 * PAGE

    def read_at(self, offset, length):
        raise OSError(errno.EIO, "broken")


def closed(thing):
    thing.close()
    return thing


def released(view):
    view.release()
    return view


def missing(tmp_path):
    return tmp_path / "no such file"


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda path: [], pagestitch.Error, "chunk"),
        (lambda path: 7, TypeError, "iterable"),
        (lambda path: "/proc/self/exe", TypeError, "are a list"),
        (lambda path: b"bytes", TypeError, "are a list"),
        (lambda path: [7], TypeError, "type int is no chunk"),
        (lambda path: [None], TypeError, "NoneType is no chunk"),
        (lambda path: [bytearray(b"x")], BufferError, "toreadonly"),
        (lambda path: [numpy.zeros(9)[::2]], BufferError, "contiguous"),
        (lambda path: [b""], pagestitch.Error, "chunk 0"),
        (lambda path: [pagestitch.Hole(0)], pagestitch.Error, "chunk 0"),
        (lambda path: [missing(path)], OSError, "no such file"),
        (lambda path: [path], pagestitch.Error, "directory"),
        (lambda path: [("/proc/self/exe", -1, 5)], TypeError, "negative"),
        (lambda path: [("/proc/self/exe", 5)], TypeError, "path, offset, length"),
        (lambda path: [("/proc/self/exe", 2**64 - 1, 5)], ValueError, r"5 bytes from .* past 2\*\*64 - 1"),
        (lambda path: [pagestitch.Hole(2**63), pagestitch.Hole(2**63)], pagestitch.Error, r"2\^64"),
        (lambda path: [("/proc/self/exe", 2**40, 5)], pagestitch.Error, "chunk 0"),
        (lambda path: [closed(open("/proc/self/exe", "rb"))], ValueError, "closed file"),
        (lambda path: [closed(mmap.mmap(-1, PAGE))], ValueError, "closed"),
        (lambda path: [pagestitch.Region([b"x"]).__enter__().close()], TypeError, "NoneType"),
        (lambda path: [closed(pagestitch.Region([b"x"]))], BufferError, "closed"),
        (lambda path: [released(memoryview(b"x"))], ValueError, "released"),
        (lambda path: [io.BytesIO(b"x")], OSError, "fileno"),
        (lambda path: [pagestitch.File(-1)], ValueError, "descriptor is -1"),
        (lambda path: [pagestitch.File(2**31 - 1)], OSError, f"descriptor {2**31 - 1}: Bad file descriptor"),
        (lambda path: [pagestitch.File(os.open("/dev/null", os.O_RDONLY))], pagestitch.Error, "descriptor [0-9]+: neither"),
        (lambda path: [pagestitch.File(os.open("/dev/null", os.O_RDONLY), in_place=False)], pagestitch.Error, "descriptor [0-9]+: "),
        (lambda path: [ctypes.create_string_buffer(4)], BufferError, r"pass bytes\(x\)"),
        (lambda path: [pagestitch.File(None)], TypeError, "fileno"),
        (lambda path: [os.pipe()], TypeError, "path, offset, length"),
        (lambda path: [pagestitch.File(os.open(path, os.O_RDONLY))], pagestitch.Error, "directory"),
    ],
)
def test_a_wrong_chunk_is_an_exception_that_names_it(tmp_path, make, error, text):
    with pytest.raises(error, match=text):
        pagestitch.Region(make(tmp_path))


def test_the_exception_of_a_wrong_chunk_has_its_number():
    with pytest.raises(BufferError) as raised:
        pagestitch.Region([b"right", bytearray(b"wrong")])
    assert raised.value.__notes__ == ["chunk 1"]


def test_wrong_arguments_are_exceptions():
    with pytest.raises(TypeError, match="eager"):
        pagestitch.Region([b"x"], server="fast")
    with pytest.raises(pagestitch.Error):
        pagestitch.Pool(0)
    region = pagestitch.Region([b"bytes"])
    for offset, length in [(3, 3), (6, 0), (6, 1), (0, 2**40), (2**63, 1), (2**64 - 1, 2**64 - 1)]:
        for call in (region.read_at, region.populate, region.prefetch):
            with pytest.raises(IndexError, match=f"bytes {offset}..{offset + length} are not inside region region of 5 bytes"):
                call(offset, length)
    with pytest.raises(IndexError, match="bytes 2..6 are not inside"):
        pagestitch.Region([b"bytes"], writable=True).write_at(2, b"long")
    with pytest.raises(IndexError):
        region.populate(6)
    assert region.read_at(5, 0) == b"" and region.populate(5) is None
    with pytest.raises(pagestitch.Error, match="writable"):
        region.write_at(0, b"x")
    with pytest.raises(TypeError):
        memoryview(region)[0] = 1


@pytest.mark.parametrize(
    "name, call",
    [
        ("length", pagestitch.Hole),
        ("offset", lambda number: pagestitch.File("/proc/self/exe", number)),
        ("length", lambda number: pagestitch.File("/proc/self/exe", 0, number)),
        ("workers", pagestitch.Pool),
        ("budget", lambda number: pagestitch.Region([b"x"], budget=number)),
        ("offset", lambda number: pagestitch.Region([b"x"]).read_at(number, 1)),
        ("length", lambda number: pagestitch.Region([b"x"]).read_at(0, number)),
        ("offset", lambda number: pagestitch.Region([b"x"], writable=True).write_at(number, b"x")),
        ("offset", lambda number: pagestitch.Region([b"x"]).populate(number)),
        ("length", lambda number: pagestitch.Region([b"x"]).populate(0, number)),
        ("length", lambda number: pagestitch.Region([b"x"]).prefetch(0, number)),
        ("size", lambda number: pagestitch.Region([types.SimpleNamespace(size=number, read_at=bytes)])),
    ],
)
def test_a_number_that_is_none_or_out_of_range_is_an_exception_that_names_the_argument(name, call):
    for number in (-1, 2**64, -(2**70)):
        with pytest.raises(OverflowError, match=f"{name} is {number}: pass a number from 0 to"):
            call(number)
    with pytest.raises(TypeError, match=f"{name} is of the type float: pass an integer"):
        call(1.5)


def test_the_exception_of_a_closed_descriptor_has_its_number():
    with open("/proc/self/exe", "rb") as opened:
        number = opened.fileno()
    with pytest.raises(OSError, match=f"descriptor {number}: Bad file descriptor") as raised:
        pagestitch.File(number)
    assert raised.value.errno == errno.EBADF


def test_the_remedies_of_errors_are_words_of_python():
    with pytest.raises(ValueError, match="leave out writable or budget"):
        pagestitch.Region([b"x"], writable=True, budget=64 << 20)
    with pytest.raises(pagestitch.Error, match="region r is read-only: build it with writable=True"):
        pagestitch.Region([b"x"], name="r").write_at(0, b"y")


@pytest.mark.parametrize(
    "arguments",
    [
        lambda view: ([view, b""], {}),
        lambda view: ([view, 7], {}),
        lambda view: ([view, missing], {}),
        lambda view: ((view if n == 0 else 1 / 0 for n in range(2)), {}),
        lambda view: ([view], {"budget": 1}),
        lambda view: ([view], {"budget": 64 << 20, "server": "eager"}),
        lambda view: ([view, Broken()], {"server": "eager"}),
    ],
)
def test_a_build_that_fails_gives_the_buffers_of_its_chunks_up(arguments):
    lent = bytearray(b"x" * 5000)
    with memoryview(lent) as whole, whole.toreadonly() as view:
        with pytest.raises((pagestitch.Error, ArithmeticError, TypeError, BufferError, OSError)):
            chunks, options = arguments(view)
            pagestitch.Region(chunks, **options)
    lent.extend(b"y")


def test_an_eager_region_gives_the_buffers_of_its_chunks_up():
    lent = bytearray(b"x" * 5000)
    with memoryview(lent) as whole, whole.toreadonly() as view:
        region = pagestitch.Region([view, b"y"], server="eager")
    lent.clear()
    assert bytes(region) == b"x" * 5000 + b"y"


def test_a_path_of_bytes_in_an_object_is_a_path(file):
    with os.scandir(os.fsencode(file.parent)) as entries:
        (entry,) = entries
    assert isinstance(entry.path, bytes)
    assert bytes(pagestitch.Region([entry])) == file.read_bytes()


def child(code):
    """Runs a program, and returns its exit status and diagnostics."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("in_place", [True, False])
def test_a_truncated_file_is_sigbus_with_the_stack_of_python(file, in_place):
    status, stderr = child(f"""
        import faulthandler, os, pagestitch
        faulthandler.enable()
        region = pagestitch.Region([pagestitch.File({str(file)!r}, in_place={in_place})])
        view = memoryview(region)
        os.truncate({str(file)!r}, 0)
        def touches():
            view[9000]
        touches()
    """)
    assert status == -signal.SIGBUS and "touches" in stderr


def test_a_forked_child_has_the_region_if_it_inherits(file):
    status, stderr = child(f"""
        import os, pagestitch
        inherited = pagestitch.Region([pagestitch.File({str(file)!r}, in_place=False)], inherit_on_fork=True)
        alone = pagestitch.Region([b"bytes"])
        if os.fork() == 0:
            try:
                memoryview(alone)
            except BufferError as error:
                assert "inherit_on_fork" in str(error)
                assert memoryview(inherited)[8] == 1
                assert bytes(pagestitch.Region([b"of the child"])) == b"of the child"
                os._exit(3)
            os._exit(4)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
    """)
    assert status == 0, stderr


def test_the_interpreter_ends_beside_a_region():
    status, stderr = child("""
        import pagestitch, threading
        region = pagestitch.Region([b"x" * 100_000_000])
        view = memoryview(region)
        def touch():
            for i in range(0, len(view), 4096):
                view[i]
        threading.Thread(target=touch, daemon=True).start()
    """)
    assert status == 0, stderr
