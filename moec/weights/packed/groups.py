"""Quantise a weight to 4-bit integers while it is read, some rows at a time.

Each `block` elements of an output share a scale. Experts are stored as [in, out], so that rows are
whole blocks of all outputs; their integers are put together before they are written.
"""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from moec.weights.arrange import arrange, store
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED, read_into

#: elements that are worked on at once, which stay in the processor's cache
STEP = 1 << 19


#: the stored tensors of a matrix in pieces, each with the CRC-32 of what was read so far
Pieces = Iterator[tuple[tuple[Tensor, ...], int]]


def in_groups(packing: Packing, entry: TensorEntry, index: int) -> Pieces:
    """The stored tensors of matrix `index` of a weight in pieces, and the CRC-32 of what was read.

    The pieces come in the order in which they are written. A stack is several matrices, any other
    weight is matrix 0.
    """
    rows, columns = entry.shape[-2:]
    turned = packing.arrange == "transpose"
    step = max(1, STEP // columns)
    if turned:
        step = max(1, step // packing.block) * packing.block
    memory = torch.empty(min(step, rows), columns, dtype=STORED[entry.dtype])
    found: list[tuple[Tensor, ...]] = []
    crc = 0
    for start in range(0, rows, step):
        some = memory[: min(step, rows - start)]
        read_into(entry, (index * rows + start) * columns, some)
        crc = zlib.crc32(memoryview(some.flatten().view(torch.uint8).numpy()), crc)  # type: ignore[arg-type]
        parts = store(packing, arrange(packing, some).contiguous())
        if turned:
            found.append(parts)
        else:
            yield parts, crc
    if turned:
        yield tuple(torch.cat(each, 1) for each in zip(*found, strict=True)), crc
