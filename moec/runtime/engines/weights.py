"""Load weights onto a device, and read the stored tensors of a joined tensor into one place.

Files are read and not mapped, and the pages leave the operating system's cache at once. Neither
cached pages nor a second copy on the host then take memory beside the weights, which may fill it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.spec.errors import refuse
from moec.weights.joined import PROGRAM_TENSORS
from moec.weights.shard import TensorEntry, nbytes
from moec.weights.view import STORED, read_into, view

#: bytes that are read at once; with CUDA two buffers of this size take turns
BLOCK = 64 << 20


def load(artefact: Artefact, device: str = "cpu", part: str = "model") -> dict[str, Tensor]:
    """Load every weight of a part of an artefact of target `torch` onto `device`, by name.

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
    kinds = PROGRAM_TENSORS[manifest.dialect](spec, manifest.compute, part)
    for name, joined in kinds.items():
        found[name] = torch.empty(joined.shape, dtype=STORED[joined.dtype], device=device)
        place, at = found[name].view(-1).view(torch.uint8), 0
        for source in joined.sources:
            entry = stored[names.get(source, source)]
            size = nbytes(entry.shape, joined.dtype)
            if at + size <= place.numel():  # too many bytes are refused below
                to = place[at : at + size]
                if entry.dtype == joined.dtype:
                    reader(entry, to)
                else:
                    reader.finish()
                    to.copy_(_cast(entry, joined.dtype))
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


def _cast(entry: TensorEntry, dtype: str) -> Tensor:
    """The bytes of a tensor in another type than it is stored in."""
    return view(entry).to(STORED[dtype]).contiguous().flatten().view(torch.uint8)


class Reader:
    """Reads bytes of files into byte tensors on `device`, one block after another."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.turn = 0
        self.buffers = [
            torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self.cuda)
        ]
        self.copied: list[Any] = [torch.cuda.Event() for _ in self.buffers]  # type: ignore[no-untyped-call]

    def __call__(self, entry: TensorEntry, to: Tensor) -> None:
        """Read the bytes of `entry` into `to`, which has the same size.

        On CUDA the copy may still be running afterwards; see `finish`.
        """
        for start, stop in _blocks(entry.nbytes):
            if not self.cuda:
                read_into(entry, start, to[start:stop])
                continue
            buffer, copied = self.buffers[self.turn], self.copied[self.turn]
            copied.synchronize()  # the earlier copy from this buffer is done
            read_into(entry, start, buffer[: stop - start])
            to[start:stop].copy_(buffer[: stop - start], non_blocking=True)
            copied.record()
            self.turn = 1 - self.turn

    def finish(self) -> None:
        """Wait until all copies are done."""
        for each in self.copied:
            each.synchronize()


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
