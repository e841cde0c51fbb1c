"""One tensor out of many shard files, without reading the others.

The shards lie end to end in one region. A tensor is a view of its bytes, so that only its pages are read.

    pip install ./crates/pagestitch-python numpy safetensors
    python examples/safetensors_shards.py model-00001.safetensors model-00002.safetensors ...
"""

import json
import sys

import numpy
import pagestitch

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


class Shards:
    """The tensors of several files of safetensors, by name."""

    def __init__(self, paths):
        self.region = pagestitch.Region(paths, name="shards", page_aligned=True)
        self.bytes = numpy.frombuffer(self.region, dtype="u1")
        self.tensors = {}
        for start, _ in self.region.pieces():
            length = int(self.bytes[start : start + 8].view("<u8")[0])
            header = json.loads(self.bytes[start + 8 : start + 8 + length].tobytes())
            header.pop("__metadata__", None)
            data = start + 8 + length
            self.tensors |= {name: (data, tensor) for name, tensor in header.items()}

    def __getitem__(self, name):
        data, tensor = self.tensors[name]
        start, end = tensor["data_offsets"]
        return self.bytes[data + start : data + end].view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])


if __name__ == "__main__":
    shards = Shards(sys.argv[1:])
    for name in shards.tensors:
        tensor = shards[name]
        print(f"{name}: {tensor.dtype} {list(tensor.shape)}")
