"""A torch tensor over a checkpoint's bytes, mapped from the file: read when it is used."""

import numpy as np
import torch

from moec.weights.shard import TensorEntry

#: Our names of the float types, for weights on disk and for what a graph computes in.
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: and of all that a weight may be stored in
STORED = {**TORCH_DTYPES, "fp8": torch.float8_e4m3fn, "uint8": torch.uint8}


def view(entry: TensorEntry) -> torch.Tensor:
    """`entry` as a tensor of its own dtype and shape; a copy only where it lies misaligned."""
    dtype = STORED[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    # Mode "c" maps privately: torch wants writable memory, and the file must stay as it is.
    raw = np.memmap(entry.file, np.uint8, "c", entry.offset, (entry.nbytes,))
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)
