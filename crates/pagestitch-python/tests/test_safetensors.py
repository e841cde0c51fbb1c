"""The example reads the tensors of several shards, and only those that are asked for."""

import ctypes
import importlib.util
import json
import mmap
import os
import pathlib
import struct
import subprocess
import sys

import numpy
import pagestitch
import pytest
import safetensors.numpy

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "safetensors_shards.py"
TENSORS, SHAPE = 8, (256, 1024)


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("safetensors_shards", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shards(tmp_path):
    """Two files, and the tensors that are in them."""
    random = numpy.random.default_rng(1)
    tensors = {f"layer.{n}": random.standard_normal(SHAPE, dtype="<f4") for n in range(2 * TENSORS)}
    names, paths = sorted(tensors), [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, part in zip(paths, (names[:TENSORS], names[TENSORS:])):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, path)
    return paths, tensors


def test_each_tensor_has_its_numbers(example, shards):
    paths, tensors = shards
    shown = example.Shards(paths)
    assert sorted(shown.tensors) == sorted(tensors)
    for name, expected in tensors.items():
        assert numpy.array_equal(shown[name], expected)
        assert not shown[name].flags.writeable


def bytes_read():
    """The bytes of this process's reads, as the kernel counts them."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_tensor_is_read_without_the_others(shards):
    paths, tensors = shards
    region = pagestitch.Region([pagestitch.File(path, in_place=False) for path in paths])
    wanted = tensors["layer.3"].tobytes()
    contents = [path.read_bytes() for path in paths]
    start = b"".join(contents).index(wanted)
    before = bytes_read()
    region.populate(start, len(wanted))
    assert numpy.array_equal(numpy.frombuffer(region, dtype="u1")[start : start + len(wanted)], numpy.frombuffer(wanted, "u1"))
    read = bytes_read() - before
    assert len(wanted) <= read <= 1.02 * len(wanted) + 2 * 4096


def resident(array):
    """The bytes of the mappings of an array's memory that this process has in its page table, by the kernel's account."""
    start, end = array.ctypes.data, array.ctypes.data + array.nbytes
    total, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(address, 16) for address in first.split("-"))
            inside = low < end and start < high
        elif first == "Rss:" and inside:
            total += int(line.split()[1]) * 1024
    return total


def test_a_tensor_in_place_is_mapped_without_the_others(example, shards):
    paths, tensors = shards
    shown = example.Shards(paths)
    before = resident(shown.bytes)
    assert numpy.array_equal(shown["layer.3"], tensors["layer.3"])
    # As in any file mapping, the kernel maps cached pages around a touched one.
    assert resident(shown.bytes) - before <= 2 * tensors["layer.3"].nbytes < shown.bytes.nbytes / 7


LARGE, BLOCK = (2048, 1024), 4096
"""The shape of a tensor of 8 MiB; the unit in which mincore(2) counts."""


def cached(path):
    """The bytes of a file that the page cache holds, by mincore(2)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * (-(-len(mapped) // BLOCK)))()
        first = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages)
        del first
        assert not failed, os.strerror(ctypes.get_errno())
        return BLOCK * sum(page & 1 for page in pages)


def drop_cached(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_cached_by(tensor, expected, paths):
    """The bytes of files that come from the disk to the page cache when a tensor is read."""
    [drop_cached(path) for path in paths]
    if any(cached(path) for path in paths):
        pytest.skip("the page cache keeps the files: they are on tmpfs, or in use")
    assert numpy.array_equal(tensor(), expected)
    return sum(cached(path) for path in paths)


def test_the_example_reads_one_tensor_and_nothing_around_it(example, tmp_path):
    """A plain mmap reads what the kernel reads ahead, too."""
    wanted, paths = numpy.random.default_rng(2).standard_normal(LARGE, dtype="<f4"), []
    for shard in range(2):
        paths.append(tmp_path / f"{shard}.safetensors")
        tensors = {f"{shard}.{n}": wanted if (shard, n) == (1, 1) else numpy.zeros(LARGE, "<f4") for n in range(6)}
        safetensors.numpy.save_file(tensors, paths[-1])
    start = paths[1].read_bytes().index(wanted.tobytes())
    by_example, by_mmap = [], []
    for _ in range(5):
        # Each mapping ends before the next one: a page that is mapped stays in the page cache.
        by_mmap.append(
            bytes_cached_by(lambda: numpy.memmap(paths[1], dtype="<f4", mode="r", offset=start, shape=LARGE), wanted, paths)
        )
        shown = example.Shards(paths)
        by_example.append(bytes_cached_by(lambda: shown["1.1"], wanted, paths))
        del shown
    assert wanted.nbytes <= max(by_example) <= wanted.nbytes + 2 * BLOCK and max(by_example) <= min(by_mmap)


def test_safetensors_reads_the_region_of_all_shards_as_one_file(example, shards):
    paths, tensors = shards
    content = bytes(example.Shards(paths).region)
    loaded = safetensors.numpy.load(content)
    assert all(numpy.array_equal(loaded[name], tensors[name]) for name in tensors)
    assert {name for name, _ in safetensors.deserialize(content)} >= set(tensors)


def shard(path, header, tensors=b""):
    """A file with a header, which is bytes or an object for JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensors)
    return path


def tensor(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", ["?", "u1", "<u2", "<u4", "<u8", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"])
def test_each_type_of_numpy_is_shown(example, tmp_path, dtype):
    expected = numpy.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    safetensors.numpy.save_file({"numbers": expected}, tmp_path / "1")
    shown = example.Shards([tmp_path / "1"])["numbers"]
    assert shown.dtype == expected.dtype and numpy.array_equal(shown, expected)


@pytest.mark.parametrize("dtype, size", [("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1)])
def test_a_type_that_numpy_lacks_is_an_error_that_names_the_tensor_and_raw_has_its_bytes(example, tmp_path, dtype, size):
    content = os.urandom(4 * size)
    path = shard(tmp_path / "1", {"w": tensor(dtype, [4], 0, 4 * size)}, content)
    shown = example.Shards([path])
    with pytest.raises(TypeError, match=rf"tensor 'w' has the type {dtype}, which numpy lacks: .*shards.raw\('w'\)"):
        shown["w"]
    assert shown.raw("w").tobytes() == content


def test_a_name_in_two_shards_is_an_error_that_names_both(example, tmp_path):
    paths = [shard(tmp_path / str(number), {"w": tensor("U8", [1], 0, 1)}, b"x") for number in range(2)]
    with pytest.raises(ValueError, match="tensor 'w' is in .*/0 and in .*/1"):
        example.Shards(paths)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff",
        [1],
        {"w": 1},
        {"w": {"dtype": "U8", "shape": [1]}},
        {"w": tensor("U8", [2], 0, 2)},
        {"w": tensor("U8", [1], 1, 0)},
        {"w": tensor("U8", [-1], -1, 0)},
        {"w": tensor("F32", [1], 0, 1)},
        {"w": tensor("U8", ["1"], 0, 1)},
        {"w": tensor(["U8"], [1], 0, 1)},
    ],
    ids=lambda header: repr(header)[:40],
)
def test_a_broken_header_is_an_error_that_names_the_file(example, tmp_path, header):
    with pytest.raises(ValueError, match="broken has no header of safetensors"):
        example.Shards([shard(tmp_path / "broken", header, b"x")])


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_file_that_is_cut_off_is_an_error_that_names_it(example, tmp_path, content):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(ValueError, match="broken has no header of safetensors, or is cut off"):
        example.Shards([tmp_path / "broken"])


def test_the_example_lists_the_tensors_of_its_arguments(tmp_path):
    path = shard(tmp_path / "1", {"w": tensor("BF16", [2, 1], 0, 4)}, bytes(4))
    done = subprocess.run([sys.executable, EXAMPLE, path], capture_output=True, timeout=120, text=True)
    assert (done.returncode, done.stdout) == (0, "w: BF16 [2, 1], 4 bytes\n"), done.stderr
