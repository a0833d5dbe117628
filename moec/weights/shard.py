"""Read the header of a safetensors file: where the bytes of each tensor are."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.spec.bounded.limits import AXES, JSON, NAME, SIZE
from moec.spec.bounded.read import open_file, parse_json
from moec.spec.data import DTYPES as TABLE
from moec.spec.errors import refuse
from moec.spec.fields import shown
from moec.spec.names import expert_of

if TYPE_CHECKING:
    from moec.weights.adapter.low_rank import LowRank

#: the types of safetensors: our name, and bytes per element
DTYPES = {each.safetensors: (each.name, each.bits // 8) for each in TABLE if each.safetensors}
_SIZES = dict(DTYPES.values())
_DOWNLOAD = "download the shard again"


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """The bytes of a tensor of `shape`; `dtype` is our name of its type."""
    return math.prod(shape) * _SIZES[dtype]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is: `nbytes` bytes at `offset` of `file`, row-major, without reading them.

    `changes` are what adapters add to it; whoever reads the tensor adds them (`moec.weights.view`).

    A tensor with `parts` is in several places instead. A stack [expert, in, out] has an entry for
    each expert, and a matrix [in, out] has matrices [out, in], whose rows are its columns in turn.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    changes: "tuple[LowRank, ...]" = ()
    parts: "tuple[TensorEntry, ...]" = ()

    @property
    def files(self) -> set[Path]:
        """The files that hold it, and what adapters add to it."""
        changes = [side for each in self.changes for side in (each.down, each.up)]
        more = {file for each in (*self.parts, *changes) for file in each.files}
        return more if self.parts else more | {self.file}

    def copied(self, file: Path) -> "TensorEntry":
        """The same tensor in a copy of its file, which has what adapters add to it."""
        place = file, self.offset, self.nbytes
        return TensorEntry(self.name, self.dtype, self.shape, *place, parts=self.parts)

    def __getitem__(self, index: int) -> "TensorEntry":
        """The entry of the slice at `index` of the first axis, such as one expert.

        Raises:
            IndexError: the first axis has no such index.
        """
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"{self.name}: index {index} of {self.shape[0]}")
        if self.parts:
            return self.parts[index]
        size = self.nbytes // self.shape[0]
        return replace(
            self,
            name=expert_of(self.name, index),
            shape=self.shape[1:],
            offset=self.offset + index * size,
            nbytes=size,
            changes=tuple(change.of(index) for change in self.changes),
        )


def turned(name: str, dtype: str, matrices: Sequence[TensorEntry]) -> TensorEntry:
    """A matrix [in, out] of `dtype`, made of matrices [out, in] that lie elsewhere."""
    first = matrices[0]
    shape = (first.shape[1], sum(each.shape[0] for each in matrices))
    return TensorEntry(
        name, dtype, shape, first.file, first.offset, nbytes(shape, dtype), parts=tuple(matrices)
    )


def stack(name: str, matrices: Sequence[TensorEntry]) -> TensorEntry:
    """A stack [expert, in, out] of the matrices of all experts."""
    first, count = matrices[0], len(matrices)
    shape, size = (count, *first.shape), count * first.nbytes
    return TensorEntry(
        name, first.dtype, shape, first.file, first.offset, size, parts=tuple(matrices)
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors by key, its size in bytes, and a hash of its header.

    `name` is its name in the checkpoint's index. `path` is the real file, with links resolved.
    """

    name: str
    path: Path
    size: int
    header_sha256: str
    tensors: dict[str, TensorEntry]


def read_shard(path: Path, name: str = "") -> Shard:
    """Read the header of the safetensors file `path` and check it against the file's size.

    `name` is its name in the checkpoint's index, and the file's own name by default.

    Raises:
        MoecError: the file is missing, is cut short, has a header that contradicts itself, or has
            bytes that are of no tensor.
    """
    with open_file(path, what="a readable shard", next_step=_DOWNLOAD) as file:
        try:
            prefix = file.read(8)
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                refuse(
                    path,
                    f"{size} bytes, header of {length}",
                    "a complete safetensors file",
                    _DOWNLOAD,
                )
            if length > JSON.bytes:
                refuse(
                    path,
                    f"header of {length:,} bytes",
                    f"at most {JSON.bytes:,} bytes, room for 200,000 tensors in one shard",
                    "save the checkpoint in more shards",
                )
            header = file.read(length)
        except OSError as error:
            refuse(path, error.strerror or error, "a readable shard", _DOWNLOAD)
    try:
        rows = parse_json(header, f"{path}: header", next_step=_DOWNLOAD)
        tensors = {
            name: _entry(path, name, row, 8 + length)
            for name, row in rows.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"broken header: {error!r:.400}"
        refuse(path, found, "a safetensors header", _DOWNLOAD)
    for entry in tensors.values():
        if entry.offset + entry.nbytes > size:
            refuse(
                f"{path}: {entry.name}",
                f"the file ends at byte {size}",
                f"at least {entry.offset + entry.nbytes} bytes; the shard is cut short",
                _DOWNLOAD,
            )
    _check_covered(path, tensors, 8 + length, size)
    return Shard(
        name or path.name, path, size, hashlib.sha256(prefix + header).hexdigest(), tensors
    )


def _check_covered(path: Path, tensors: dict[str, TensorEntry], start: int, size: int) -> None:
    """Refuse bytes from `start` to the file's end that are of no tensor, or of two.

    safetensors itself refuses them: they could hold anything, and no hash of a tensor covers them.
    """
    used = start
    for entry in sorted(tensors.values(), key=lambda each: (each.offset, each.nbytes)):
        if entry.offset != used:
            gap = f"{entry.offset - used} bytes before it are of no tensor"
            refuse(
                f"{path}: {entry.name}",
                gap if entry.offset > used else "it shares bytes with another tensor",
                "bytes of its own, right behind those of another tensor or the header",
                _DOWNLOAD,
            )
        used = entry.offset + entry.nbytes
    if used != size:
        refuse(
            path,
            f"{size - used} bytes behind the last tensor",
            f"{used} bytes, all of its header or of a tensor",
            _DOWNLOAD,
        )


def _entry(path: Path, name: str, row: dict[str, Any], data: int) -> TensorEntry:
    start, end = row["data_offsets"]
    shape = tuple(row["shape"])
    if (
        len(shape) > AXES
        or len(name) > NAME
        or any(type(n) is not int or not 0 <= n <= SIZE for n in (start, end, *shape))
    ):
        raise ValueError(
            f"{name[:200]}: offsets {shown([start, end])}, shape {shown(shape[: AXES + 1])}; "
            f"at most {AXES} sizes, each from 0 to 2^62, are expected"
        )
    dtype, itemsize = DTYPES.get(row["dtype"], (row["dtype"], 0))
    if type(dtype) is not str or len(dtype) > 32:
        raise ValueError(f"{name}: dtype {shown(dtype)}")
    nbytes = math.prod(shape) * itemsize
    if itemsize and end - start != nbytes:
        refuse(
            f"{path}: {name}", f"{end - start} bytes", f"{nbytes} for {dtype} {shape}", _DOWNLOAD
        )
    if start > end:
        raise ValueError(f"{name}: offsets {start} to {end}")
    return TensorEntry(name, dtype, shape, path, data + start, end - start)
