"""A checkpoint's bytes as torch tensors: mapped, and read when they are used, or read at once."""

import os

import numpy as np
import torch

from moec.spec.errors import refuse
from moec.weights.shard import TensorEntry

#: Our names of the float types, for weights on disk and for what a graph computes in.
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: and of all that a weight may be stored in
STORED = {**TORCH_DTYPES, "fp8": torch.float8_e4m3fn, "uint8": torch.uint8}

#: bytes that the disk is asked for before they are wanted
AHEAD = 1 << 26


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


def read_into(entry: TensorEntry, first: int, out: torch.Tensor) -> None:
    """Elements of a weight from `first` on, read and not mapped: page faults cost more."""
    data = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    start, at = entry.offset + first * out.element_size(), 0
    with entry.file.open("rb", buffering=0) as file:
        file.seek(start)
        # What comes next is read while this is worked on, and nothing stays in the system's cache:
        # new pages for it would cost more than the disk, and other processes theirs.
        os.posix_fadvise(file.fileno(), start + len(data), AHEAD, os.POSIX_FADV_WILLNEED)
        while at < len(data) and (count := file.readinto(data[at:])):
            at += count
        os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)
    if at < len(data):
        refuse(
            entry.file,
            f"ended before {entry.name}",
            "a file that stays as it is",
            "fetch the shard, or build the artefact, again",
        )
