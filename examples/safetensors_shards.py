"""One tensor out of many shard files, without reading the others.

A header and the shards lie end to end in one region, which is itself a file of safetensors: `safetensors.deserialize`
takes `bytes(shards.region)`. A tensor is a view of its bytes. Its pages are read when it is asked for or touched, and no
others.

    pip install ./crates/pagestitch-python numpy safetensors
    python examples/safetensors_shards.py model-00001.safetensors model-00002.safetensors ...
"""

import json
import math
import os
import struct
import sys

import numpy
import pagestitch

# The types of safetensors that numpy has. It lacks BF16 and floats of 8 bits and fewer: `Shards.raw` has their bytes.
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "BOOL": "?"}
TYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}

PAGE, BLOCK = 4096, 2 << 20  # a page, a huge page


def read_header(path):
    """The tensors of a file of safetensors, the offset of their bytes, and the size of the file."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        try:
            tensors = parse(file.read(length) if length <= size - 8 else b"", size - 8 - length)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has no header of safetensors, or is cut off: {error!r}") from error
    return tensors, 8 + length, size


def parse(header, bytes_of_tensors):
    """The tensors that a header tells of, if they lie in the file."""
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    for name, tensor in tensors.items():
        (start, end), count = tensor["data_offsets"], math.prod(tensor["shape"])
        if not 0 <= start <= end <= bytes_of_tensors:
            raise ValueError(f"tensor {name!r} has the bytes {start}..{end} of {bytes_of_tensors}")
        if tensor["dtype"] in TYPES and end - start != count * numpy.dtype(TYPES[tensor["dtype"]]).itemsize:
            raise ValueError(f"tensor {name!r} has {end - start} bytes for {count} numbers of the type {tensor['dtype']}")
    return tensors


def arrange(shards, base):
    """Where the tensors of the shards lie, if they begin `base` bytes into the region: tensors, pieces, and a header."""
    tensors, shard_of, gaps, pieces, end = {}, {}, {}, [], 0
    for path, (names, offset, size) in shards.items():
        # Each shard starts in a block of its own, so that the kernel shows its pages in place, and many at once.
        gap = -(base + end) % BLOCK
        data = end + gap + offset
        pieces += [pagestitch.Hole(gap), path] if gap else [path]
        for name, tensor in names.items():
            if shard_of.setdefault(name, path) is not path:
                raise ValueError(f"tensor {name!r} is in {shard_of[name]} and in {path}: pass the shards of one model")
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
        if tensor["dtype"] not in TYPES:
            raise TypeError(
                f"tensor {name!r} has the type {tensor['dtype']}, which numpy lacks: take its bytes, shards.raw({name!r}), "
                "and view them as a type of ml_dtypes or torch"
            )
        return self.raw(name).view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])

    def raw(self, name):
        """The bytes of a tensor: for BF16, `torch.from_numpy(shards.raw(name)).view(torch.bfloat16)`."""
        start, end = self.tensors[name]["data_offsets"]
        # Touches alone would have the kernel read pages before and behind, too.
        self.region.prefetch(self.base + start, end - start)
        return self.bytes[start:end]


if __name__ == "__main__":
    shards = Shards(sys.argv[1:])
    for name, tensor in shards.tensors.items():
        print(f"{name}: {tensor['dtype']} {tensor['shape']}, {shards.raw(name).nbytes} bytes")
