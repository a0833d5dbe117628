"""Weights on a device: each joined tensor once, its pieces read straight to where they belong.

Files are read, not mapped, and what was read leaves the system's cache: neither pages of the file
nor a second copy on the host build up beside weights that may fill the memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.spec.errors import refuse
from moec.weights.joined import joined_tensors
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED, read_into

#: bytes that are read at once; with CUDA two buffers of this size take turns
PIECE = 64 << 20


def load(artefact: Artefact, device: str = "cpu", part: str = "model") -> dict[str, Tensor]:
    """Every weight of a part of an artefact of target `torch`, by name, on `device`.

    Raises:
        MoecError: the artefact has no weights yet, or a file is gone, changed or cut short.
    """
    manifest = artefact.manifest
    spec, stored = manifest.spec, artefact.stored()
    wide = {packing.source: packing.names(spec.dtype)[0] for packing in manifest.packings.values()}
    reader = Reader(device)
    found: dict[str, Tensor] = {}
    for name, joined in joined_tensors(spec, manifest.compute, part).items():
        found[name] = torch.empty(joined.shape, dtype=STORED[joined.dtype], device=device)
        # Rows of all pieces are outputs: joining is writing one behind the other.
        place, at = found[name].view(-1).view(torch.uint8), 0
        for piece in joined.sources:
            entry = stored[wide.get(piece, piece)]
            if at + entry.nbytes <= place.numel():  # refused below, if there is too much
                reader(entry, place[at : at + entry.nbytes])
            at += entry.nbytes
        if at != place.numel():
            refuse(
                f"{artefact.path}: {name}",
                f"{at} bytes in {', '.join(joined.sources)}",
                f"{place.numel()} bytes",
                "build the artefact again",
            )
    reader.finish()
    return found


class Reader:
    """Reads bytes of files into tensors of bytes on `device`, in pieces."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.turn = 0
        self.buffers = [
            torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self.cuda)
        ]
        self.copied: list[Any] = [torch.cuda.Event() for _ in self.buffers]  # type: ignore[no-untyped-call]

    def __call__(self, entry: TensorEntry, to: Tensor) -> None:
        """Read `entry` to `to`, which is as long; on CUDA it may still be on its way."""
        for start, stop in _pieces(entry.nbytes):
            if not self.cuda:
                read_into(entry, start, to[start:stop])
                continue
            buffer, copied = self.buffers[self.turn], self.copied[self.turn]
            copied.synchronize()  # what this buffer held before has arrived
            read_into(entry, start, buffer[: stop - start])
            to[start:stop].copy_(buffer[: stop - start], non_blocking=True)
            copied.record()
            self.turn = 1 - self.turn

    def finish(self) -> None:
        """Wait until all has arrived."""
        for each in self.copied:
            each.synchronize()


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))
