"""Load weights onto a device, and read the stored tensors of a joined tensor into one place.

A rank loads its part of the decoder. It reads no other bytes where its part is made of long runs,
as it is where outputs are divided. Where inputs are divided its part is short pieces of every row:
it reads all rows, which takes less time than to read the pieces.
"""

import math

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.runtime.engines.reading import Piece, Reader
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import is_scale
from moec.spec.sharding import ALONE, Rank, cut_of, local, span
from moec.weights.joined import PROGRAM_TENSORS
from moec.weights.shard import TensorEntry, nbytes
from moec.weights.view import STORED, view


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
    found: dict[str, Tensor] = {}
    kinds = PROGRAM_TENSORS[manifest.dialect](local(spec, rank), manifest.compute, part)
    with Reader(device) as read:
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
                        read(entry, to, piece)
                    else:
                        to.copy_(_cast(entry, joined.dtype, piece))
                at += size
            if at != place.numel():
                refuse(
                    f"{artefact.path}: {name}",
                    f"{at} bytes in {', '.join(joined.sources)}",
                    f"{place.numel()} bytes",
                    "build the artefact again",
                )
    return found


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
