"""Load weights onto a device, and read the stored tensors of a joined tensor into one place.

Files are read and not mapped, and the pages leave the operating system's cache at once. Neither
cached pages nor a second copy on the host then take memory beside the weights, which may fill it.

A rank loads its part of the decoder. It reads no other bytes where its part is made of long runs,
as it is where outputs are divided. Where inputs are divided its part is short pieces of every row:
it reads all rows, which takes less time than to read the pieces.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import is_scale
from moec.spec.sharding import ALONE, Rank, cut_of, local, span
from moec.weights.joined import PROGRAM_TENSORS
from moec.weights.shard import TensorEntry, nbytes
from moec.weights.view import STORED, read_into, view

#: bytes that are read at once; with CUDA two buffers of this size take turns
BLOCK = 64 << 20
#: a run of fewer bytes is not read by itself
SHORT = 64 << 10


def load(
    artefact: Artefact, device: str = "cpu", part: str = "model", rank: Rank = ALONE
) -> dict[str, Tensor]:
    """Load every weight of a part of an artefact of target `torch` onto `device`, by name.

    A `rank` gets its part of each.

    Raises:
        MoecError: the artefact has no weights yet, or a file is missing, changed or cut short.
    """
    manifest = artefact.manifest
    spec, stored = manifest.spec, artefact.stored()
    # the names under which parameters are stored
    names = {
        packing.source: packing.names(spec.stored(packing.source))[0]
        for packing in manifest.packings.values()
    }
    reader = Reader(device)
    found: dict[str, Tensor] = {}
    kinds = PROGRAM_TENSORS[manifest.dialect](local(spec, rank), manifest.compute, part)
    for name, joined in kinds.items():
        found[name] = torch.empty(joined.shape, dtype=STORED[joined.dtype], device=device)
        place, at = found[name].view(-1).view(torch.uint8), 0
        for source in joined.sources:
            entry = stored[names.get(source, source)]
            piece = piece_of(spec, rank, source, entry.shape)
            size = nbytes(piece.shape, joined.dtype)
            if at + size <= place.numel():  # too many bytes are refused below
                to = place[at : at + size]
                if entry.dtype == joined.dtype:
                    reader(entry, to, piece)
                else:
                    reader.finish()
                    to.copy_(_cast(entry, joined.dtype, piece))
            at += size
        if at != place.numel():
            refuse(
                f"{artefact.path}: {name}",
                f"{at} bytes in {', '.join(joined.sources)}",
                f"{place.numel()} bytes",
                "build the artefact again",
            )
    reader.finish()
    return found


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


def piece_of(spec: ModelSpec, rank: Rank, source: str, shape: tuple[int, ...]) -> Piece:
    """What `rank` has of the stored tensor `source` of `spec`, by our name for it."""
    cut = cut_of(source)
    if cut is None or rank.count == 1:
        return Piece(shape, math.prod(shape), 0, math.prod(shape))
    axis = len(shape) - (1 if cut.axis == -1 or is_scale(source) else 2)
    start, stop = span(spec.text, cut.divided, rank)
    inner = math.prod(shape[axis + 1 :])
    own = (*shape[:axis], (stop - start) * cut.repeats, *shape[axis + 1 :])
    return Piece(own, shape[axis] // cut.repeats * inner, start * inner, stop * inner)


def _cast(entry: TensorEntry, dtype: str, piece: Piece) -> Tensor:
    """The bytes of a piece of a tensor in another type than it is stored in."""
    own = piece.of(view(entry)).to(STORED[dtype])
    return own.contiguous().flatten().view(torch.uint8)


class Reader:
    """Reads bytes of files into byte tensors on `device`, one block after another."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.turn = 0
        self.buffers = [
            torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self.cuda)
        ]
        self.copied: list[Any] = [torch.cuda.Event() for _ in self.buffers]  # type: ignore[no-untyped-call]

    def __call__(self, entry: TensorEntry, to: Tensor, piece: Piece | None = None) -> None:
        """Read `entry`, or a piece of it, into `to`, which has its size.

        On CUDA the copy may still be running afterwards; see `finish`.
        """
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
        """Read bytes of `entry`, from byte `first` on, until `to` is full."""
        for start, stop in _blocks(to.numel()):
            if not self.cuda:
                read_into(entry, first + start, to[start:stop])
                continue
            buffer, copied = self.buffers[self.turn], self.copied[self.turn]
            copied.synchronize()  # the earlier copy from this buffer is done
            read_into(entry, first + start, buffer[: stop - start])
            to[start:stop].copy_(buffer[: stop - start], non_blocking=True)
            copied.record()
            self.turn = 1 - self.turn

    def finish(self) -> None:
        """Wait until all copies are done."""
        for each in self.copied:
            each.synchronize()


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
