"""Sources that Python implements: sizes, exceptions, and the objects that they refer to."""

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy
import pagestitch
import pytest

PAGE, LARGE = mmap.PAGESIZE, 64 << 20


class Pattern:
    """A source of bytes that tell their page, which notes the threads that read it."""

    def __init__(self, size):
        self.size, self.threads, self.reads = size, set(), 0

    def bytes(self, offset, length):
        pages = range(offset // PAGE, (offset + length - 1) // PAGE + 1)
        return b"".join(page.to_bytes(4, "little") * (PAGE // 4) for page in pages)[offset % PAGE :][:length]

    def read_at(self, offset, length):
        self.reads += 1
        self.threads.add(threading.get_ident())
        return self.bytes(offset, length)


def failing(*exceptions):
    """A source whose first reads raise these exceptions."""
    source, rest = Pattern(10 * PAGE), iter(exceptions)
    read = source.read_at

    def read_at(offset, length):
        for exception in rest:
            source.reads += 1
            raise exception
        return read(offset, length)

    source.read_at = read_at
    return source


def raise_or(exception, answer):
    if exception:
        raise exception
    return answer


@pytest.mark.parametrize("fill", ["populate", "read_at", "eager"])
def test_a_large_source_is_read_in_the_calling_thread(fill):
    source = Pattern(LARGE)
    region = pagestitch.Region([b"head", source], page_aligned=True, server="eager" if fill == "eager" else None)
    if fill == "read_at":
        shown = region.read_at(PAGE, LARGE)
    else:
        if fill == "populate":
            region.populate()
        shown = memoryview(region)[PAGE:]
    assert shown == source.bytes(0, LARGE)
    assert source.threads == {threading.get_ident()}


def test_an_eager_region_of_a_source_is_shown_at_once():
    source = Pattern(3 * PAGE)
    region = pagestitch.Region([source], server="eager")
    assert region[2 * PAGE] == 2 and sys.getrefcount(source) == 2


def test_prefetch_leaves_chunks_of_python_code_to_populate(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    file = pagestitch.File(tmp_path / "file", in_place=False)
    region = pagestitch.Region([Pattern(PAGE), file])
    region.prefetch(1 << 19)
    for range in [(), (0, 1), (PAGE, PAGE)]:
        with pytest.raises(ValueError, match=r"call populate\(\)"):
            region.prefetch(*range)
    region.populate()
    region.prefetch()
    assert region.metrics()["source_errors"] == 0


def test_sources_that_read_regions_of_sources_without_end_are_an_exception():
    class Endless:
        size = PAGE

        def __init__(self, **arguments):
            self.arguments = arguments

        def read_at(self, offset, length):
            return pagestitch.Region([Endless(**self.arguments)], **self.arguments).read_at(offset, length)

    for read in (lambda: Endless().read_at(0, 5), lambda: Endless(server="eager").read_at(0, 5)):
        with pytest.raises(pagestitch.Error, match="RecursionError") as raised:
            read()
        error = raised.value
        while error.__cause__:
            error = error.__cause__
        assert isinstance(error, RecursionError)


def test_a_region_that_is_closed_while_it_is_filled_gives_its_buffers_up():
    lent, source = bytearray(5000), Pattern(PAGE)
    with memoryview(lent) as whole, whole.toreadonly() as view:
        region = pagestitch.Region([source, view])

        def read_at(offset, length):
            region.close()
            return source.bytes(offset, length)

        source.read_at = read_at
        region.populate()
        assert region.closed
    lent.clear()


class Torn(Exception):
    pass


FILLS = [pagestitch.Region.populate, lambda region: region.read_at(0, 5)]


@pytest.mark.parametrize("fill", FILLS)
def test_an_exception_of_a_source_is_the_cause(fill):
    torn = Torn("tape 7")
    region = pagestitch.Region([b"x", failing(*[torn] * 20)])
    with pytest.raises(pagestitch.Error, match="chunk 1 .Pattern.*Torn: tape 7") as raised:
        fill(region)
    assert raised.value.__cause__ is torn
    assert any(entry.name == "read_at" for entry in pytest.ExceptionInfo.from_exception(torn).traceback)


@pytest.mark.parametrize("fill", FILLS)
def test_an_os_error_of_a_source_is_raised_itself(fill):
    missing = FileNotFoundError(errno.ENOENT, "gone", "/tape/7")
    with pytest.raises(FileNotFoundError) as raised:
        fill(pagestitch.Region([failing(*[missing] * 20)]))
    assert raised.value is missing and raised.value.filename == "/tape/7"
    assert any("chunk 0 (Pattern)" in note for note in raised.value.__notes__)


def test_an_os_error_without_a_number_is_raised_itself():
    for torn in (OSError("tape 7 is torn"), OSError(0, "none"), OSError(-5, "odd")):
        with pytest.raises(OSError) as raised:
            pagestitch.Region([failing(*[torn] * 20)]).populate()
        assert raised.value is torn


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_that_ends_the_program_is_raised_itself_and_ends_the_call(fill, end):
    source = failing(end("now"))
    region = pagestitch.Region([source])
    with pytest.raises(end):
        fill(region)
    # The call has not read on: page by page, it would succeed.
    assert source.reads == 1
    region.populate()
    assert bytes(region) == source.bytes(0, source.size)


@pytest.mark.parametrize("end", [KeyboardInterrupt("now"), Torn("now"), OSError(errno.EIO, "now")])
def test_an_exception_of_a_source_ends_an_eager_build(end):
    with pytest.raises((type(end), pagestitch.Error)) as raised:
        pagestitch.Region([failing(*[end] * 20)], server="eager")
    assert end in (raised.value, raised.value.__cause__)


def test_a_page_that_has_failed_is_tried_again_by_the_next_call():
    for fill in FILLS:
        source, exceptions = Pattern(10 * PAGE), [OSError(errno.EIO, "torn"), None]
        source.read_at = lambda offset, length: raise_or(exceptions[0], source.bytes(offset, length))
        region = pagestitch.Region([source])
        for _ in range(2):
            with pytest.raises(OSError, match="torn"):
                fill(region)
        del exceptions[0]
        fill(region)
        assert region.read_at(0, source.size) == source.bytes(0, source.size)


def test_the_exception_of_one_region_is_not_the_cause_of_another_ones_error():
    """A source reads another region, whose source fails, and goes on."""
    below, outer = pagestitch.Region([failing(*[Torn("below")] * 20)]), Pattern(PAGE)

    def read_at(offset, length):
        with pytest.raises(pagestitch.Error):
            below.read_at(offset, length)
        raise Torn("above")

    outer.read_at = read_at
    with pytest.raises(pagestitch.Error, match="above") as raised:
        pagestitch.Region([outer]).populate()
    assert str(raised.value.__cause__) == "above"


def test_an_answer_of_a_source_that_is_no_bytes_names_its_type():
    for answer, text in [(bytearray(PAGE), "bytearray"), (None, "NoneType"), (b"", "returned 0 bytes")]:
        source = Pattern(PAGE)
        source.read_at = lambda offset, length: answer
        with pytest.raises(pagestitch.Error, match=text):
            pagestitch.Region([source]).populate()


def test_an_interrupt_from_the_keyboard_ends_a_populate():
    source = Pattern(10 * PAGE)
    read = source.read_at

    def read_at(offset, length):
        if source.reads == 0:
            source.reads += 1
            signal.raise_signal(signal.SIGINT)
        return read(offset, length)

    source.read_at = read_at
    # A shell starts programs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pagestitch.Region([source]).populate()
    finally:
        signal.signal(signal.SIGINT, before)


class Cyclic(Pattern):
    """A source that holds its region."""

    def __init__(self, **arguments):
        super().__init__(3 * PAGE)
        self.region = pagestitch.Region([self, b"end"], **arguments)


class CyclicArray(numpy.ndarray):
    """An array that holds the region of it."""


def cycle_of_a_source():
    return Cyclic()


def cycle_of_an_eager_source():
    return Cyclic(server="eager")


def cycle_of_a_closed_region():
    source = Cyclic()
    source.region.close()
    return source


def cycle_of_a_view():
    source = Cyclic()
    source.region.populate()
    source.view = memoryview(source.region)
    return source


def cycle_of_a_buffer():
    lent = numpy.frombuffer(b"x" * 5000, "u1").view(CyclicArray)
    lent.region = pagestitch.Region([lent, memoryview(b"y" * 5000)])
    return lent


def cycle_of_two_regions():
    below, above = Cyclic(server="eager"), Pattern(PAGE)
    below.above = pagestitch.Region([memoryview(below.region), above])
    above.region = below.above
    return below


CYCLES = [
    cycle_of_a_source,
    cycle_of_an_eager_source,
    cycle_of_a_closed_region,
    cycle_of_a_view,
    cycle_of_a_buffer,
    cycle_of_two_regions,
]


@pytest.mark.parametrize("make", CYCLES)
def test_a_region_in_a_cycle_of_objects_is_collected(make):
    gc.collect()
    ended = []
    for _ in range(20):
        member = make()
        weakref.finalize(member.region, ended.append, True)
        weakref.finalize(member, ended.append, True)
        del member
    gc.collect()
    assert len(ended) == 40


@pytest.mark.parametrize("make", CYCLES)
def test_a_region_in_a_cycle_that_is_in_use_is_not_collected(make):
    member = make()
    for _ in range(3):
        gc.collect()
    if not member.region.closed:
        member.region.populate()
        assert len(bytes(member.region)) == len(member.region)


def test_the_collector_runs_beside_reads_of_sources():
    """It runs as often as it can, in all threads, while sources are read and regions end."""
    before, failures = gc.get_threshold(), []
    gc.set_threshold(1, 1, 1)

    def work():
        try:
            for _ in range(10):
                source = Cyclic(server="eager" if _ % 2 else None)
                source.region.populate()
                assert bytes(source.region) == source.bytes(0, source.size) + b"end"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    gc.set_threshold(*before)
    assert not failures


def child(code):
    done = subprocess.run([sys.executable, "-X", "dev", "-c", textwrap.dedent(code)], capture_output=True, timeout=120, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("code", ["time.sleep(0.001)", "lock.acquire()", "sum(range(1000))"])
def test_the_interpreter_ends_beside_a_populate_of_a_source(code):
    """It ends a daemon thread that asks for the interpreter, wherever that is."""
    for _ in range(3):
        status, output = child(f"""
            import pagestitch, threading, time
            entered, lock = threading.Event(), threading.Lock()
            class Source:
                size = 64 << 20
                def read_at(self, offset, length):
                    entered.set()
                    {code}
                    return bytes(length)
            region = pagestitch.Region([Source()])
            threading.Thread(target=region.populate, daemon=True).start()
            entered.wait()
        """)
        assert status == 0, output


def test_a_region_in_a_cycle_ends_with_the_interpreter():
    status, output = child("""
        import pagestitch
        class Source:
            size = 5000
            def __init__(self):
                self.region = pagestitch.Region([self])
            def read_at(self, offset, length):
                return bytes(length)
        source = Source()
        source.region.populate()
        source.view = memoryview(source.region)
    """)
    assert status == 0, output


def test_a_forked_child_has_an_eager_region_of_a_source():
    status, output = child("""
        import os, pagestitch
        class Source:
            size = 5000
            def read_at(self, offset, length):
                return b"s" * length
        regions = [pagestitch.Region([Source()], server="eager", inherit_on_fork=inherit) for inherit in (False, True)]
        if os.fork() == 0:
            shown = [bytes(memoryview(region)[4998:]) + region.read_at(0, 1) for region in regions]
            os._exit(3 if shown == [b"sss"] * 2 else 4)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
    """)
    assert status == 0, output


def test_a_source_in_python_cannot_serve_forked_children_or_pages_that_leave():
    source = Pattern(PAGE)
    with pytest.raises(ValueError, match="leave out inherit_on_fork"):
        pagestitch.Region([source], server=pagestitch.Pool(1), inherit_on_fork=True)
    with pytest.raises(ValueError, match="leave out budget"):
        pagestitch.Region([source], budget=64 << 20)
    assert sys.getrefcount(source) == 2
