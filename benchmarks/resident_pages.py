"""Find which pages of a file are in memory (on Linux), to see what a run has read."""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moec.weights.shard import TensorEntry

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADV_RANDOM, _MADV_DONTNEED = 1, 4
PAGE = mmap.PAGESIZE


def drop_pages(path: Path) -> None:
    """Empty the page cache of `path`, and stop read-ahead in this process's mappings of it.

    Read-ahead would bring in pages that nobody asked for. Mappings must be read-only.
    """
    for start, size in _mappings(path):
        for advice in (_MADV_DONTNEED, _MADV_RANDOM):
            _check(_LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice))
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # pages that are not yet written would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def resident_bytes(entries: Iterable[TensorEntry], whole: bool = False) -> int:
    """The bytes of the pages in memory that hold parts of `entries`.

    With `whole`, pages that also hold other bytes are not counted.
    """
    by_file: dict[Path, set[int]] = {}
    for entry in entries:
        start, end = entry.offset, entry.offset + entry.nbytes
        inner, outer = (-(-start // PAGE), end // PAGE), (start // PAGE, -(-end // PAGE))
        by_file.setdefault(entry.file, set()).update(range(*(inner if whole else outer)))
    return sum(int(_resident(f)[list(pages)].sum()) for f, pages in by_file.items()) * PAGE


def _resident(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each page of `path` is in memory."""
    size = path.stat().st_size
    found = np.zeros(-(-size // PAGE), np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        start, flags = (ctypes.c_void_p(array.ctypes.data) for array in (view, found))
        _check(_LIBC.mincore(start, ctypes.c_size_t(size), flags))
        del view  # otherwise the mapping cannot be closed
    return (found & 1).astype(bool)


def _mappings(path: Path) -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if fields[5:] == [str(path.resolve())]:
            start, end = (int(edge, 16) for edge in fields[0].split("-"))
            yield start, end - start


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
