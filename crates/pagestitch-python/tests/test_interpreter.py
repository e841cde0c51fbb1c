"""The interpreter during a call: it is released, and a signal is not left waiting for the end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pagestitch
import pytest

TRIES = 1000
"""A thread is seen at work in one of so many calls, however busy the machine is."""


def test_a_populate_of_a_file_lets_other_threads_run(tmp_path):
    """With an interval that never ends, a thread gives the interpreter away by a release only."""
    (tmp_path / "file").write_bytes(os.urandom(8 << 20))
    file, turns, ended = pagestitch.File(tmp_path / "file", in_place=False), [0], []

    def turn():
        while not ended:
            turns[0] += 1
            time.sleep(1e-5)

    thread, before = threading.Thread(target=turn), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1e6)
    try:
        for _ in range(TRIES):
            region = pagestitch.Region([file], server=pagestitch.Pool(1))
            first = turns[0]
            region.populate()
            if turns[0] != first:
                break
        assert turns[0] != first
    finally:
        sys.setswitchinterval(before)
        ended.append(True)
        thread.join()


class Signalled(Exception):
    pass


def raise_signalled(number, frame):
    raise Signalled


def filled(region):
    return region.metrics()["pages_zeroed"]


def test_a_signal_ends_a_long_populate():
    """It comes while pages are filled; `populate` looks for it between its parts."""
    before = signal.signal(signal.SIGUSR1, raise_signalled)
    try:
        for _ in range(TRIES):
            region = pagestitch.Region([pagestitch.Hole(1 << 30)], server=pagestitch.Pool(1))
            thread = threading.Thread(target=send_when_filling, args=[region])
            with pytest.raises(Signalled):
                thread.start()
                region.populate()
                thread.join()
            thread.join()
            if filled(region) < (1 << 30) // 4096:
                return
    finally:
        signal.signal(signal.SIGUSR1, before)
    raise AssertionError(f"each of {TRIES} calls has filled all pages")


def send_when_filling(region):
    while filled(region) == 0:
        time.sleep(1e-5)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)


IN_SUBINTERPRETERS = """
try:
    import _interpreters
    make = lambda: _interpreters.create("legacy")
    run = lambda number, code: _interpreters.exec(number, code)
except ImportError:
    import _xxsubinterpreters as _interpreters
    make = lambda: _interpreters.create(isolated=False)
    run = _interpreters.run_string
CODE = '''
try:
    import pagestitch
except ImportError as error:
    assert "pagestitch works in the main interpreter only" in str(error), error
else:
    pagestitch.Region([b"x"], server="eager")
    raise AssertionError("the import has succeeded")
'''
first, second = make(), make()
assert not run(first, CODE)
import pagestitch
assert bytes(pagestitch.Region([b"of the main interpreter"])) == b"of the main interpreter"
assert not run(second, CODE)
"""


def test_a_subinterpreter_refuses_the_import_and_the_process_ends():
    """Before and after the import in the main interpreter. A process that hangs at its end runs into the limit."""
    done = subprocess.run([sys.executable, "-c", IN_SUBINTERPRETERS], capture_output=True, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
