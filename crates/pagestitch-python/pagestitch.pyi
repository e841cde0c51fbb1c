"""Scattered memory and files as one buffer, filled on first touch.

>>> import pagestitch
>>> region = pagestitch.Region([b"head", pagestitch.Hole(5000), b"tail"])
>>> bytes(memoryview(region)[5004:])
b'tail'

`memoryview(region)`, `numpy.frombuffer(region, dtype)`, `torch.frombuffer` and `pyarrow.py_buffer` show the region without a
copy. A page gets its bytes when it is first touched. A page whose bytes cannot be had raises SIGBUS, which ends the process:
`read_at` and `populate` raise an exception instead.
"""

from collections.abc import Iterable
from os import PathLike
from types import TracebackType
from typing import Protocol, Self, TypeAlias, final, overload

from typing_extensions import Buffer

__all__ = ["Error", "File", "Hole", "Pool", "Region"]

class _Source(Protocol):
    """A source that Python code implements.

    `populate`, `read_at` and the build of an "eager" region read it, in the calling thread. Its pages are shown after `populate()` of
    the whole region only, because no Python code can run behind a touch of a page: the touching thread may hold the interpreter's lock.
    It may read other regions, but must not wait for a thread that reads its own one.
    """

    @property
    def size(self) -> int:
        """The number of its bytes."""
    def read_at(self, offset: int, length: int) -> bytes:
        """So many bytes from `offset` on. Each thread that fills pages calls it, also several at once.

        An exception ends the call that reads. It is the cause of that call's `Error`; an `OSError`, and one that is no `Exception`
        (`KeyboardInterrupt`), is raised itself.
        """

class _Open(Protocol):
    def fileno(self) -> int: ...

_Path: TypeAlias = str | PathLike[str]
_File: TypeAlias = _Path | _Open | int
_Chunk: TypeAlias = Buffer | _Path | _Open | tuple[_File, int, int] | File | Hole | _Source

class Error(Exception):
    """A region cannot do what was asked; the text names the remedy. Refusals of the kernel are OSError, with their errno."""

@final
class Hole:
    """So many zeros, without memory."""

    def __new__(cls, length: int) -> Self: ...
    @property
    def length(self) -> int: ...

@final
class File:
    """A part of a file; without `length`, up to its end.

    `file` is a path, or an open file: an object with `fileno()`, or its number. That one is duplicated, so it may be closed
    at once; its position does not matter.

    `in_place` shows its whole pages as `mmap` does: without a copy, and with all later changes of the file. A page past the
    end of a truncated file is SIGBUS. Without it, and at the edges of pages, the bytes are read on first touch.
    """

    def __new__(cls, file: _File, offset: int = 0, length: int | None = None, *, in_place: bool = True) -> Self: ...

@final
class Pool:
    """Threads that answer the page faults of regions. Without `workers`, one for each CPU."""

    def __new__(cls, workers: int | None = None) -> Self: ...
    @property
    def workers(self) -> int: ...

@final
class Region:
    """Chunks as one buffer.

    A chunk is `bytes` or another read-only buffer, a path, an open file, a tuple `(path, offset, length)`, a `File`, a `Hole`, or an object with
    `size` and `read_at(offset, length)`.
    A buffer that can be written is refused: pass `memoryview(x).toreadonly()`, and leave its bytes alone.

    `server` is a `Pool`; `"eager"`, which fills the region when it is built; or None, for a pool of the process, or `"eager"`
    where the process may not use userfaultfd. `page_aligned` starts each chunk in a page of its own, at its offset within a page of
    its file; `chunks()` tells where. The bytes between chunks mean nothing: they may be those of a file beside its chunk.
    `budget` bounds the bytes of memory of a region that is only read: pages beyond it leave, and come back when they are
    touched. No chunk may be read by Python code then. A child of `fork` (`multiprocessing`) has the region with `inherit_on_fork` or
    `"eager"` only; chunks that Python code reads need `"eager"` for it.
    """

    def __new__(
        cls,
        chunks: Iterable[_Chunk],
        *,
        name: str = "region",
        server: Pool | str | None = None,
        writable: bool = False,
        page_aligned: bool = False,
        inherit_on_fork: bool = False,
        budget: int | None = None,
    ) -> Self: ...
    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on. Bytes that cannot be had are an exception, and not SIGBUS."""
    def write_at(self, offset: int, data: bytes) -> None:
        """Writes bytes from `offset` on, if the region is writable."""
    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """Fills the absent pages of a range. Other threads run meanwhile. Pages whose source has failed before are tried again.

        Of files in place, it reads the pages of the range from the disk, and no others."""
    def prefetch(self, offset: int = 0, length: int | None = None) -> None:
        """Asks the server to fill the absent pages of a range, and does not wait. Chunks that Python code reads need `populate`.

        Of files in place, it reads the pages of the range from the disk, and no others."""
    def plan(self) -> str:
        """How the pages of each chunk come, and why."""
    def metrics(self) -> dict[str, int]:
        """The counters of the region by name."""
    def chunks(self) -> list[tuple[int, int]]:
        """The offset and length of each chunk."""
    def close(self) -> None:
        """Gives the addresses up. Raises BufferError while a memoryview or an array shows them."""
    @property
    def closed(self) -> bool: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int, /) -> int:
        """A byte."""
    @overload
    def __getitem__(self, key: slice, /) -> memoryview:
        """A view of a part, without a copy."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
