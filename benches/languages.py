"""The measurements of languages.rs in Python. Each run of this program is one measurement, and prints its figures."""

import importlib.util
import json
import mmap
import os
import pathlib
import struct
import sys
import time

SHARDS, TENSORS = 8, 10
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "safetensors_shards.py"


def timed(act):
    start = time.perf_counter_ns()
    act()
    print(time.perf_counter_ns() - start)


def start():
    """From the import on: a region of 1,000 pieces, and a touch of each."""
    begin = time.perf_counter_ns()
    import pagestitch

    region = pagestitch.Region([b"%4d" % n * 1024 for n in range(1000)])
    view = memoryview(region)
    assert sum(view[:: len(view) // 1000])
    print(time.perf_counter_ns() - begin)


def numbers(size):
    import numpy

    return numpy.arange(int(size) // 8, dtype="<i8")


def sum_region(size):
    """The sum of numbers that are touched first by it."""
    import numpy
    import pagestitch

    # In pieces of their own, as in languages.rs, and not in one array, because the allocator of numpy asks for huge pages,
    # of which fewer are left for the region then.
    region = pagestitch.Region([numbers(int(size) // 64).tobytes() for _ in range(64)])
    timed(numpy.frombuffer(region, dtype="<i8").sum)


def sum_array(size):
    timed(numbers(size).sum)


def make_shards(folder, size):
    """Files of safetensors. Only one tensor, and some megabytes around it, take space on the disk."""
    each = int(size) // TENSORS // 8 * 8
    for shard in range(SHARDS):
        names = {f"{shard}.{n}": {"dtype": "I64", "shape": [each // 8], "data_offsets": [n * each, (n + 1) * each]} for n in range(TENSORS)}
        header = json.dumps(names).encode()
        header += b" " * (-len(header) % 8)
        with open(pathlib.Path(folder) / f"{shard}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(file.tell() + TENSORS * each)
            if shard == 5:
                around = min(16 << 20, each)
                file.seek(8 + len(header) + 4 * each - around)
                for _ in range((each + 2 * around) // 8192):
                    file.write(struct.pack("<q", 3) * 1024)
            file.flush()
            os.fsync(file.fileno())


def shards(folder):
    return sorted(pathlib.Path(folder).iterdir())


def in_region(folder):
    spec = importlib.util.spec_from_file_location("safetensors_shards", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return lambda: example.Shards(shards(folder))["5.4"]


def in_mmap(folder):
    """Finds the tensor as the example does, in a plain map of each file."""
    import numpy

    def tensor():
        tensors = {}
        for path in shards(folder):
            with open(path, "rb") as file:
                content = numpy.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype="u1")
            length = int(content[:8].view("<u8")[0])
            header = json.loads(content[8 : 8 + length].tobytes())
            tensors |= {name: (content[8 + length :], tensor) for name, tensor in header.items()}
        content, tensor = tensors["5.4"]
        begin, end = tensor["data_offsets"]
        return content[begin:end].view("<i8")

    return tensor


def by_read(folder):
    import numpy

    def tensor():
        tensors = {}
        for path in shards(folder):
            with open(path, "rb", buffering=0) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                tensors |= {name: (path, 8 + length, tensor) for name, tensor in json.loads(file.read(length)).items()}
        path, data, tensor = tensors["5.4"]
        begin, end = tensor["data_offsets"]
        return numpy.fromfile(path, dtype="<i8", count=(end - begin) // 8, offset=data + begin)

    return tensor


def bytes_read():
    """The bytes that the kernel has read from disks for this process."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def tensor(way, temperature, folder):
    """Opens the files and sums one tensor. Prints the time, and the bytes read from the disk for each byte of the tensor."""
    import numpy
    import pagestitch

    bytes(pagestitch.Region([b"the pool runs"]))
    find = {"region": in_region, "mmap": in_mmap, "read": by_read}[way](folder)
    numpy.zeros(1).sum()
    for path in shards(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if temperature == "warm":
        # By the same reads for all, because the kernel chooses the sizes of folios by the way in which they are read.
        assert by_read(folder)().sum()
        assert find().sum()
    before, begin = bytes_read(), time.perf_counter_ns()
    numbers = find()
    total = int(numbers.sum())
    print(time.perf_counter_ns() - begin, (bytes_read() - before) / numbers.nbytes)
    assert total == 3 * len(numbers)


if __name__ == "__main__":
    {"start": start, "region": sum_region, "array": sum_array, "make": make_shards, "tensor": tensor}[sys.argv[1]](*sys.argv[2:])
