"""The weights that a TensorRT engine takes as inputs, on a device: each a tensor of its own.

The bytes of an expert, or of several stored tensors that are joined, go straight to where they
belong. Slices of one large tensor would do, but for those that start where TensorRT takes none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moec.runtime.engines.weights import Reader
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED


def load_bindings(parts: Mapping[str, tuple[TensorEntry, ...]], device: str) -> dict[str, Tensor]:
    """Each of `parts`, one entry behind the other, as a flat tensor [elements] on `device`.

    Raises:
        MoecError: a file was cut short.
    """
    reader, found = Reader(device), dict[str, Tensor]()
    for name, entries in parts.items():
        dtype, size = STORED[entries[0].dtype], sum(each.nbytes for each in entries)
        found[name] = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        place, at = found[name].view(torch.uint8), 0
        for each in entries:
            reader(each, place[at : at + each.nbytes])
            at += each.nbytes
    reader.finish()
    return found
