"""Regions beside `multiprocessing`."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

import pagestitch
import pytest

PIECE = b"of the parent"
REGION = None


def in_a_forked_child(_):
    """The errors of uses of the parent's region, and the bytes of a region of the child."""
    errors = []
    for use in (memoryview, bytes, lambda region: region.read_at(0, 1), lambda region: region.populate()):
        try:
            use(REGION)
        except (BufferError, pagestitch.Error) as error:
            errors.append(str(error))
    return errors, bytes(pagestitch.Region([b"of the child"])), len(REGION)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_while_a_region_ends_has_regions_of_its_own():
    """A lock that another thread has at the fork is never released in the child."""
    pool, ends, took = pagestitch.Pool(1), [], 0
    for part in range(21):
        region = pagestitch.Region([PIECE] * 10_000, server=pool)
        if part == 0:
            start = time.monotonic()
            region.close()
            took = time.monotonic() - start
            continue
        thread = threading.Thread(target=region.close)
        thread.start()
        # Each child is forked at another moment of that call.
        time.sleep(part / 20 * took)
        child = os.fork()
        if child == 0:
            use_a_region_of_its_own()
        ends.append(os.waitpid(child, 0)[1])
        thread.join()
    assert set(ends) == {0}


def use_a_region_of_its_own():
    """In a forked child, which ends."""
    # A child that hangs is ended by the signal.
    signal.alarm(60)
    try:
        with pagestitch.Region([PIECE]) as region:
            assert region.read_at(0, len(PIECE)) == PIECE
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def built_there(path):
    with pagestitch.Region([path, b"there"]) as region:
        return bytes(region)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_builds_regions_of_its_own():
    global REGION
    REGION = pagestitch.Region([PIECE], server=pagestitch.Pool(1))
    with multiprocessing.get_context("fork").Pool(2) as workers:
        for errors, own, length in workers.map(in_a_forked_child, range(4)):
            assert len(errors) == 4 and all("fork" in error or "child" in error for error in errors), errors
            assert own == b"of the child" and length == len(PIECE)
    assert bytes(REGION) == PIECE
    REGION = None


def test_a_spawned_worker_gets_paths_and_builds_a_region(tmp_path):
    (tmp_path / "file").write_bytes(b"built ")
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        assert workers.apply(built_there, [tmp_path / "file"]) == b"built there"
        with pytest.raises(TypeError, match="build it there"):
            workers.apply(len, [pagestitch.Region([PIECE])])


def test_threads_build_touch_and_close_regions_at_once():
    """The interpreter switches threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    shared, failures = pagestitch.Region([bytes(1 << 20)], server=pagestitch.Pool(2)), []

    def work(number):
        try:
            for _ in range(20):
                with pagestitch.Region([bytes([number]) * 9000, pagestitch.Hole(9000)]) as region:
                    assert region[8999] == number and sum(region[9000:]) == 0
                assert sum(shared[number :: 4096]) == 0
                shared.populate(number * 4096)
                with pytest.raises((ValueError, BufferError)):
                    region.read_at(0, 1)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    sys.setswitchinterval(before)
    assert not failures and not any(thread.is_alive() for thread in threads)
