"""One tensor out of many shard files, without reading the others.

A header and the shards lie end to end in one region, which is itself a file of safetensors: `safetensors.deserialize`
takes `bytes(shards.region)`. A tensor is a view of its bytes, so that only its pages are read.

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

BLOCK = 2 << 20  # a huge page


class Shards:
    """The tensors of several files of safetensors, by name."""

    def __init__(self, paths):
        self.tensors, gaps, pieces, end = {}, {}, [], 0
        for path in paths:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                tensors, size = json.loads(file.read(length)), os.fstat(file.fileno()).st_size
            tensors.pop("__metadata__", None)
            # Each shard starts in a block of its own, so that the kernel shows its pages in place, and many at once.
            gap = -end % BLOCK
            start, data = end + gap, end + gap + 8 + length
            pieces += [pagestitch.Hole(gap), path] if gap else [path]
            for name, tensor in tensors.items():
                self.tensors[name] = tensor | {"data_offsets": [data + offset for offset in tensor["data_offsets"]]}
            # The format allows no bytes outside of tensors.
            gaps[f"before the tensors of {path}"] = {"dtype": "U8", "shape": [data - end], "data_offsets": [end, data]}
            end = start + size
        header = json.dumps(self.tensors | gaps).encode()
        header += b" " * (-(8 + len(header)) % BLOCK)
        self.region = pagestitch.Region([struct.pack("<Q", len(header)) + header, *pieces], name="shards")
        self.bytes = numpy.frombuffer(self.region, dtype="u1")[8 + len(header) :]

    def __getitem__(self, name):
        tensor = self.tensors[name]
        start, end = tensor["data_offsets"]
        return self.bytes[start:end].view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])


if __name__ == "__main__":
    shards = Shards(sys.argv[1:])
    for name in shards.tensors:
        tensor = shards[name]
        print(f"{name}: {tensor.dtype} {list(tensor.shape)}")
