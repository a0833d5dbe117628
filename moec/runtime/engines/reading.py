"""Read bytes of files into tensors on a device.

Files are read and not mapped, and the pages leave the operating system's cache at once. Neither
cached pages nor a second copy on the host then take memory beside the weights, which may fill it.
One thread reads, and the system reads ahead by itself: on the disks that were tried, several
threads took longer, and so did advice to read ahead.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moec.weights.shard import TensorEntry
from moec.weights.view import read_into

#: bytes that are read at once; with CUDA two buffers of this size take turns
BLOCK = 64 << 20
#: a run of fewer bytes is not read by itself
SHORT = 64 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank has of a stored tensor; its own shape is `shape`.

    Of each `every` elements, one after another, it has those from `start` up to `stop`.
    """

    shape: tuple[int, ...]
    every: int
    start: int
    stop: int

    def of(self, values: Tensor) -> Tensor:
        """The piece of a tensor that is at hand, [runs, elements of a run]."""
        return values.reshape(-1, self.every)[:, self.start : self.stop]


class Reader:
    """Reads bytes of files into byte tensors on `device`; at the end of its `with` all are there.

    Raises:
        MoecError: a file was cut short.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._turn = 0
        self._buffers = [
            torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self._cuda)
        ]
        #: what stands behind the last copy from each buffer
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for each in self._copied:
            each.synchronize()

    def __call__(self, entry: TensorEntry, to: Tensor, piece: Piece | None = None) -> None:
        """Read `entry`, or a piece of it, into `to`, which has its size."""
        if piece is None or to.numel() == entry.nbytes:
            self._read(entry, 0, to)
            return
        size = entry.nbytes // math.prod(entry.shape)
        every, start, stop = (size * each for each in (piece.every, piece.start, piece.stop))
        own = stop - start
        if own >= SHORT:
            for i in range(entry.nbytes // every):
                self._read(entry, i * every + start, to[i * own : (i + 1) * own])
        else:
            rows = max(1, BLOCK // every)
            block = torch.empty(rows * every, dtype=torch.uint8, device=to.device)
            for first in range(0, entry.nbytes // every, rows):
                here = block[: min(rows * every, entry.nbytes - first * every)]
                self._read(entry, first * every, here)
                mine = here.view(-1, every)[:, start:stop]
                to[first * own :][: mine.numel()].view(-1, own).copy_(mine)

    def _read(self, entry: TensorEntry, first: int, to: Tensor) -> None:
        """Read bytes of `entry`, from byte `first` on, until `to` is full.

        On CUDA the copy may still be running afterwards.
        """
        for start, stop in _blocks(to.numel()):
            if not self._cuda:
                read_into(entry, first + start, to[start:stop])
                continue
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            copied.synchronize()  # the earlier copy from this buffer is done
            read_into(entry, first + start, buffer[: stop - start])
            to[start:stop].copy_(buffer[: stop - start], non_blocking=True)
            copied.record()
            self._turn = 1 - self._turn


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
