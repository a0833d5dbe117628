"""Load the weight inputs of a TensorRT engine onto a device, each into its own tensor.

The bytes of an expert, or of several joined tensors, are read directly into place. Slices of one
large tensor would also do, but some would start at addresses that TensorRT does not take.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moec.runtime.engines.reading import Reader
from moec.weights.shard import TensorEntry
from moec.weights.view import STORED


def load_bindings(parts: Mapping[str, tuple[TensorEntry, ...]], device: str) -> dict[str, Tensor]:
    """Load each weight input of `parts` as a flat tensor [elements] on `device`.

    A weight input consists of the bytes of its entries, one after another.

    Raises:
        MoecError: a file was cut short.
    """
    found = dict[str, Tensor]()
    with Reader(device) as read:
        for name, entries in parts.items():
            dtype, size = STORED[entries[0].dtype], sum(each.nbytes for each in entries)
            found[name] = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
            place, at = found[name].view(torch.uint8), 0
            for each in entries:
                read(each, place[at : at + each.nbytes])
                at += each.nbytes
    return found
