"""One tensor out of many shard files, without reading the others.

A header and the shards lie end to end in one region, which is itself a file of safetensors: `safetensors.deserialize`
takes `bytes(shards.region)`. A tensor is a view of its bytes. Its pages are read when it is asked for or touched, and no
others.

    pip install ./crates/pagestitch-python numpy safetensors
    python examples/safetensors_shards.py model-00001.safetensors model-00002.safetensors ...
"""

import json
import os
import struct
import sys

import numpy
import pagestitch

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}

PAGE, BLOCK = 4096, 2 << 20  # a page, a huge page


def read_header(path):
    """The tensors of a file of safetensors, the offset of their bytes, and the size of the file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors, size = json.loads(file.read(length)), os.fstat(file.fileno()).st_size
    tensors.pop("__metadata__", None)
    return tensors, 8 + length, size


def arrange(shards, base):
    """Where the tensors of the shards lie, if they begin `base` bytes into the region: tensors, pieces, and a header."""
    tensors, gaps, pieces, end = {}, {}, [], 0
    for path, (names, offset, size) in shards.items():
        # Each shard starts in a block of its own, so that the kernel shows its pages in place, and many at once.
        gap = -(base + end) % BLOCK
        data = end + gap + offset
        pieces += [pagestitch.Hole(gap), path] if gap else [path]
        for name, tensor in names.items():
            tensors[name] = tensor | {"data_offsets": [data + at for at in tensor["data_offsets"]]}
        # The format allows no bytes outside of tensors.
        gaps[f"before the tensors of {path}"] = {"dtype": "U8", "shape": [data - end], "data_offsets": [end, data]}
        end += gap + size
    header = json.dumps(tensors | gaps, ensure_ascii=False, separators=(",", ":"))
    return tensors, pieces, header.encode()


def header_room(shards):
    """The most bytes that the header takes: the headers of the shards, with longer numbers, and an entry for each gap."""
    longer = sum(40 * len(names) for names, _, _ in shards.values())
    gaps = sum(160 + 6 * len(os.fsencode(path)) for path in shards)
    return 8 + sum(offset for _, offset, _ in shards.values()) + longer + gaps


class Shards:
    """The tensors of several files of safetensors, by name."""

    def __init__(self, paths):
        shards = {path: read_header(path) for path in paths}
        # The header has the places of the tensors, which depend on its length.
        base = -(-header_room(shards) // PAGE) * PAGE
        self.tensors, pieces, header = arrange(shards, base)
        header = struct.pack("<Q", base - 8) + header.ljust(base - 8)
        self.region = pagestitch.Region([header, *pieces], name="shards")
        self.base, self.bytes = base, numpy.frombuffer(self.region, dtype="u1")[base:]

    def __getitem__(self, name):
        tensor = self.tensors[name]
        start, end = tensor["data_offsets"]
        # Touches alone would have the kernel read pages before and behind, too.
        self.region.prefetch(self.base + start, end - start)
        return self.bytes[start:end].view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])


if __name__ == "__main__":
    shards = Shards(sys.argv[1:])
    for name in shards.tensors:
        tensor = shards[name]
        print(f"{name}: {tensor.dtype} {list(tensor.shape)}")
