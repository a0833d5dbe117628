"""Read a checkpoint's bytes as torch tensors, by mapping the file or by reading it directly."""

import math
import mmap
import os
from typing import Any, NoReturn, get_args
from weakref import WeakValueDictionary

import numpy as np
import torch

from moec.spec.data import DType, dtypes
from moec.spec.errors import refuse
from moec.weights.shard import TensorEntry

_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, theirs) for name, theirs in dtypes("name", "torch").items()
}
#: our names of the types that a graph computes in
TORCH_DTYPES = {name: _TORCH[name] for name in get_args(DType)}
#: our names of all types in which a weight can be stored
STORED = {**TORCH_DTYPES, "fp8": _TORCH["fp8"], "uint8": _TORCH["uint8"]}
_NAMES = {theirs: name for name, theirs in _TORCH.items()}


def name_of(dtype: torch.dtype) -> str:
    """Our name of a type of torch: the inverse of `STORED`."""
    return _NAMES[dtype]


def view(entry: TensorEntry) -> torch.Tensor:
    """Map the tensor at `entry`, in its own type and shape.

    The bytes are read when they are used. They are copied only if their offset is not aligned, or
    if adapters change the tensor, or it has parts. All users of a file share them, so nobody may
    write to the tensor: a write ends the process.
    """
    stored = _map(entry)
    if not entry.changes:
        return stored
    from moec.weights.adapter.low_rank import merged  # which reads its own tensors with this

    return merged(entry, stored)


def raw(entry: TensorEntry) -> bytes:
    """The bytes of the tensor at `entry` as it is read, row-major."""
    return view(entry).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _map(entry: TensorEntry) -> torch.Tensor:
    dtype = STORED[entry.dtype]
    if entry.parts and len(entry.shape) == 3:
        return torch.stack([view(part) for part in entry.parts])
    if entry.parts:
        return torch.cat([view(part).to(dtype) for part in entry.parts]).t()
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    whole = np.asarray(_Shared(np.frombuffer(_mapped(entry), np.uint8)))
    raw = whole[entry.offset : entry.offset + entry.nbytes]
    if len(raw) < entry.nbytes:
        refuse_short(entry)
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)


class _Shared:
    """Bytes that cannot be written, as an array that says it can be, which torch warns without."""

    def __init__(self, held: "np.ndarray[Any, Any]") -> None:
        self.held = held  # keeps the mapping alive, as the array keeps this object
        self.__array_interface__ = {
            "shape": held.shape,
            "typestr": held.dtype.str,
            "data": (held.ctypes.data, False),
            "version": 3,
        }


#: files that a tensor in use lies in: a mapping keeps a file open, and tensors may be 45,000
_FILES: WeakValueDictionary[tuple[object, ...], mmap.mmap] = WeakValueDictionary()


def _mapped(entry: TensorEntry) -> mmap.mmap:
    """The whole file of a tensor, mapped once for all of its tensors.

    The mapping cannot be written. A tensor that one user changed would be wrong for all others in
    the process, and for the proof that compares them: a crash is better.
    """
    with entry.file.open("rb") as file:
        at = os.fstat(file.fileno())
        key = (at.st_dev, at.st_ino, at.st_mtime_ns, at.st_size)
        found = _FILES.get(key)
        if found is None:
            if not at.st_size:
                refuse_short(entry)
            found = mmap.mmap(file.fileno(), at.st_size, mmap.MAP_PRIVATE, mmap.PROT_READ)
            _FILES[key] = found
    return found


def refuse_short(entry: TensorEntry) -> NoReturn:
    """Refuse the file of a tensor, which is shorter than its header says."""
    refuse(
        entry.file,
        f"ended before {entry.name}",
        "a file that does not change while it is read",
        "download the shard again, or build the artefact again",
    )


def read_into(entry: TensorEntry, first: int, out: torch.Tensor) -> None:
    """Read elements of the tensor at `entry`, from element `first` on, until `out` is full.

    Of a tensor that adapters change, these must be whole rows.

    Reading is faster than mapping here, because page faults cost more than the copy.

    Raises:
        MoecError: the file ends too early.
    """
    if entry.parts:
        _read_turned(entry, first, out)
        return
    data = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    start, at = entry.offset + first * out.element_size(), 0
    with entry.file.open("rb", buffering=0) as file:
        file.seek(start)
        while at < len(data) and (count := file.readinto(data[at:])):
            at += count
        # The system drops these pages from its cache: allocating new ones would cost more than the
        # disk does, and would evict pages of other processes. It reads ahead by itself.
        os.posix_fadvise(file.fileno(), start, len(data), os.POSIX_FADV_DONTNEED)
    if at < len(data):
        refuse_short(entry)
    if entry.changes:
        from moec.weights.adapter.low_rank import merge_rows

        merge_rows(entry, first, out)


def _read_turned(stack: TensorEntry, first: int, out: torch.Tensor) -> None:
    """Read rows [n, out] of one matrix of a stack that has parts; `first` is as in `read_into`."""
    expert, element = divmod(first, math.prod(stack.shape[1:]))
    row, at = element // stack.shape[2], 0
    for part in stack[expert].parts:
        end = at + part.shape[0]
        out[:, at:end].copy_(view(part)[:, row : row + len(out)].t())
        at = end
