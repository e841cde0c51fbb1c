"""Libraries that take buffers show a region without a copy. Those that are not installed are skipped."""

import gc
import hashlib
import struct

import numpy
import pagestitch
import pytest

NUMBERS = numpy.arange(10_000, dtype="<i8")


@pytest.fixture
def region():
    content = NUMBERS.tobytes()
    region = pagestitch.Region([content[:30_001], content[30_001:]], server=pagestitch.Pool(1))
    yield region
    gc.collect()
    region.close()


def address(region):
    return numpy.frombuffer(region, dtype="u1").ctypes.data


def test_the_standard_library(region):
    assert struct.unpack_from("<q", region, 8 * 4000) == (4000,)
    assert int.from_bytes(region[8:16], "little") == 1
    assert hashlib.sha256(region).digest() == hashlib.sha256(NUMBERS).digest()
    assert memoryview(region).cast("q")[9_999] == 9_999


def test_numpy(region):
    array = numpy.frombuffer(region, dtype="<i8", count=100, offset=8 * 3700)
    assert array.ctypes.data == address(region) + 8 * 3700 and (array == NUMBERS[3700:3800]).all()
    assert numpy.shares_memory(array, numpy.asarray(region[8 * 3700 :]))
    with pytest.raises(ValueError):
        array[0] = 1


def test_pyarrow(region):
    pyarrow = pytest.importorskip("pyarrow")
    compute = pytest.importorskip("pyarrow.compute")
    buffer = pyarrow.py_buffer(region)
    assert buffer.address == address(region) and buffer.size == len(region) and not buffer.is_mutable
    array = pyarrow.Array.from_buffers(pyarrow.int64(), len(NUMBERS), [None, buffer])
    assert array[9_999].as_py() == 9_999 and compute.sum(array).as_py() == NUMBERS.sum()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_torch(region):
    torch = pytest.importorskip("torch")
    tensor = torch.frombuffer(region, dtype=torch.int64)
    assert tensor.data_ptr() == address(region) and int(tensor.sum()) == NUMBERS.sum()
