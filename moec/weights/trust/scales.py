"""Check the values of a checkpoint's FP8 scales: all of them, many at once.

A model with tens of thousands of experts has as many tensors of scales, a few kilobytes each. To
map them one by one would take seconds; to read them in the order of the file takes little.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import BinaryIO

import torch

from moec.spec.errors import refuse
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED, refuse_short

#: bytes that are checked at once, but for a tensor that has more
_AT_ONCE = 1 << 24


def check_scales(scales: Iterable[tuple[str, TensorEntry]]) -> None:
    """Refuse scales that are not finite and above 0; each comes with its key in the checkpoint.

    Raises:
        MoecError: the message names the first tensor, in the order of files and offsets.
    """
    ordered = sorted(scales, key=lambda each: (each[1].file, each[1].dtype, each[1].offset))
    for (path, dtype), group in groupby(ordered, lambda each: (each[1].file, each[1].dtype)):
        with path.open("rb", buffering=0) as file:
            for some in _batches(group):
                _check(file, STORED[dtype], some)


def _batches(
    scales: Iterable[tuple[str, TensorEntry]],
) -> Iterator[list[tuple[str, TensorEntry]]]:
    batch, size = list[tuple[str, TensorEntry]](), 0
    for key, entry in scales:
        if batch and size + entry.nbytes > _AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append((key, entry))
        size += entry.nbytes
    yield batch


def _check(file: BinaryIO, dtype: torch.dtype, some: Sequence[tuple[str, TensorEntry]]) -> None:
    """Check the scales `some`, which lie in one file and have one type."""
    found = bytearray()
    for _, entry in some:
        data = os.pread(file.fileno(), entry.nbytes, entry.offset)
        if len(data) < entry.nbytes:
            refuse_short(entry)
        found += data
    if not found:
        return
    values = torch.frombuffer(found, dtype=dtype)
    wrong = ~(values.isfinite() & (values > 0))
    if not wrong.any():
        return
    counts = [entry.nbytes // dtype.itemsize for _, entry in some]
    owns, offs = torch.split(values, counts), torch.split(wrong, counts)
    for (key, entry), own, off in zip(some, owns, offs, strict=True):
        if off.any():
            refuse(
                f"{entry.file}: {key}",
                f"a scale of {own[off][0].item()} ({int(off.sum())} bad scales of {len(own)})",
                "scales that are finite and above 0",
                "download the shard again",
            )
