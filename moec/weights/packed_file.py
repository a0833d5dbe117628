"""Pack weights: rewrite them into one safetensors file, a few rows at a time, on all cores.

`packed_journal` records which weights are on disk, so that a call that was cut off can go on.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.spec.errors import refuse
from moec.weights import fp8, packed_journal
from moec.weights.arrange import arrange, store
from moec.weights.packing import Packing
from moec.weights.shard import DTYPES, TensorEntry, nbytes
from moec.weights.view import STORED, name_of, read_into, view

#: elements that one thread packs at once, which bounds the memory of the arithmetic
ELEMENTS_AT_ONCE = 1 << 22
#: bytes of experts that are in memory at once; a single expert may have more
GROUP_BYTES = 1 << 28
#: bytes between two entries of the journal; each entry waits for the disk
JOURNAL_BYTES = 1 << 28
_SAFETENSORS_TYPES = {ours: (theirs, size) for theirs, (ours, size) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `start` to `stop` of a matrix; `matrix` is its index in a stacked expert weight."""

    matrix: int
    start: int
    stop: int


def write_packed(
    path: Path,
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    progress: Callable[[int, int], None],
    constants: Mapping[str, Tensor] | None = None,
) -> int:
    """Pack each parameter from `entries` into `path`, and write `constants` unchanged.

    Each core holds one matrix, at most twice. For FP8 all cores share the memory of a group of
    experts and their quantised values. `progress` is called with the bytes read so far and in all.

    A journal beside `path` records which weights are on disk. If the call is cut off, the same call
    goes on from there.

    Returns:
        The bytes of weights that this call read.

    Raises:
        MoecError: a weight is not finite, or its packed type cannot hold it. The journal then
            still marks the file as unfinished, because a file with gaps would look complete.
    """
    constants = constants or {}
    header, offsets, size = _layout(packings, entries, constants)
    fingerprint = packed_journal.fingerprint(header, packings, entries)
    done = packed_journal.resume(path, fingerprint, size, set(packings))
    journal = packed_journal.journal_of(path)
    total = sum(entries[p.source].nbytes for p in packings.values())
    before = at = sum(entries[packings[name].source].nbytes for name in done)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pending: list[str] = []
    syncs: list[Future[None]] = []  # these wait for the disk while the next weights are packed
    with (
        path.open("r+b" if done else "wb") as file,
        journal.open("a", encoding="utf-8") as log,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(1) as disk,
        _single_threaded_torch(),
    ):
        handle = file.fileno()

        def sync(names: list[str]) -> None:
            """Wait until the file is on disk, then enter `names` in the journal."""
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            log.write("".join(f"{name}\n" for name in names))
            log.flush()

        if not done:
            os.truncate(handle, size)
            _write(handle, header, 0)
        for name, tensor in constants.items():
            _write(handle, tensor.contiguous().flatten().view(torch.uint8).numpy(), offsets[name])
        waiting = 0
        for name, packing in _in_file_order(packings, entries):
            if name in done:
                continue
            entry = entries[packing.source]
            starts = [offsets[part] for part in packing.names(entry.dtype)]
            write = _write_fp8 if packing.fp8 else _write_rows
            for read in write(handle, packing, entry, starts, pool):
                at += read
                progress(at, total)
            pending.append(name)
            waiting += entry.nbytes
            if waiting >= JOURNAL_BYTES:
                syncs.append(disk.submit(sync, pending))
                pending, waiting = [], 0
        syncs.append(disk.submit(sync, pending))
        for each in syncs:
            each.result()
    journal.unlink()
    return total - before


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Let torch use one thread, because the workers already keep all cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_fp8(
    handle: int,
    packing: Packing,
    entry: TensorEntry,
    starts: list[int],
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Quantise one group of experts after another, and write scales and quantised values.

    Yields the bytes of weights that have been packed, after each step.
    """
    block, stacked = packing.block, len(entry.shape) == 3
    along = {"tensor": "all", "expert": "all", "block": "block"}.get(
        packing.fp8 or "", "column" if stacked else "row"
    )
    count = entry.shape[0] if stacked else 1
    elements, dtype = math.prod(entry.shape) // count, STORED[entry.dtype]
    step = max(1, GROUP_BYTES // (entry.nbytes // count))
    groups = [range(i, min(i + step, count)) for i in range(0, count, step)]
    # All groups use this memory in turn. Fresh pages would cost as much as the work on them.
    weights = torch.empty(len(groups[0]) * elements, dtype=dtype)
    values = torch.empty(weights.shape, dtype=STORED["fp8"])

    def part(memory: Tensor, place: _Rows, group: range) -> Tensor:
        """The elements of `place` in memory that holds the matrices of `group`."""
        columns = entry.shape[-1]
        at = (place.matrix - group.start) * elements + place.start * columns
        return memory[at : at + (place.stop - place.start) * columns].view(-1, columns)

    def magnitudes(group: range) -> Tensor:
        """Read a group into `weights`; return the largest magnitudes of each matrix."""
        places = list(_row_ranges(entry, group, block if along == "block" else 1))

        def read(place: _Rows) -> Tensor:
            rows = part(weights, place, group)
            read_into(entry, place.matrix * elements + place.start * entry.shape[-1], rows)
            return fp8.magnitudes(rows, along, block)

        found = list(zip(places, pool.map(read, places), strict=True))
        join = torch.cat if along in ("row", "block") else lambda sizes: torch.stack(sizes).amax(0)
        sizes = torch.stack([join([size for p, size in found if p.matrix == i]) for i in group])
        _refuse_not_finite(packing, entry, sizes)
        return sizes

    common = None
    if packing.fp8 == "tensor" and len(groups) > 1:  # one scale for all groups
        common = torch.stack([magnitudes(group).amax() for group in groups]).amax()
    at = starts[1]
    for group in groups:
        sizes = magnitudes(group)
        if packing.fp8 == "tensor":
            sizes = (sizes.amax() if common is None else common).expand(len(group))
        scales = fp8.scales(sizes, STORED[packing.dtype])
        _refuse_not_finite(packing, entry, scales)
        if packing.fp8 != "tensor" or group.start == 0:
            stored = scales[0] if packing.fp8 == "tensor" else scales
            at += _write(handle, stored.flatten().view(torch.uint8).numpy(), at)

        def pack(
            place: _Rows, group: range = group, scales: Tensor = scales
        ) -> tuple[_Rows, Tensor]:
            rows, out = part(weights, place, group), part(values, place, group)
            own = scales[place.matrix - group.start].float()
            if along in ("row", "block"):
                unit = block if along == "block" else 1
                own = own[place.start // unit : -(-place.stop // unit)]
            fp8.quantise(rows, own, along, block, out)
            return place, out

        packed = pool.map(pack, _row_ranges(entry, group, block if along == "block" else 1))
        if packing.arrange == "transpose":
            packed = _transposed(packed, entry.shape[-2:], weights, values, pool)
        for place, out in packed:
            # Only this thread writes. Several threads would wait for one another in spin locks.
            start = place.matrix * elements + place.start * out.shape[-1]
            _write(handle, out.view(torch.uint8).numpy(), starts[0] + start)
            yield out.numel() * dtype.itemsize


def _transposed(
    packed: Iterator[tuple[_Rows, Tensor]],
    shape: tuple[int, ...],
    free: Tensor,
    values: Tensor,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[_Rows, Tensor]]:
    """Transpose the quantised values of a group of experts: rows of [out, in], in order.

    Running `packed` to its end fills `values`. The transposed values go to `free`, the memory of
    the unquantised weights, which are not needed any more by then.
    """
    inner, outer = shape
    matrices = sorted({place.matrix for place, _ in packed})
    stored = values.view(torch.uint8)[: len(matrices) * inner * outer].view(-1, inner, outer)
    turned = free.view(torch.uint8)[: stored.numel()].view(-1, outer, inner)
    step = max(1, ELEMENTS_AT_ONCE // inner)

    def transpose(place: _Rows) -> tuple[_Rows, Tensor]:
        at, rows = place.matrix - matrices[0], slice(place.start, place.stop)
        # torch transposes a contiguous matrix in blocks that fit the cache, but not a slice of one.
        turned[at, rows].copy_(stored[at, :, rows].contiguous().t())
        return place, turned[at, rows]

    places = (
        _Rows(matrix, start, min(start + step, outer))
        for matrix in matrices
        for start in range(0, outer, step)
    )
    yield from pool.map(transpose, places)


def _write_rows(
    handle: int,
    packing: Packing,
    entry: TensorEntry,
    starts: list[int],
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Arrange one matrix after another, cast or quantise it a few rows at a time, and write it.

    Yields the bytes of weights that have been packed, after each matrix.
    """
    matrices = [entry] if len(entry.shape) < 3 else [entry[i] for i in range(entry.shape[0])]
    sizes = [nbytes(*kind) // len(matrices) for kind in packing.shapes(entry.shape)]

    def pack(index: int) -> int:
        at = [start + index * size for start, size in zip(starts, sizes, strict=True)]
        rows = arrange(packing, view(matrices[index]))
        for some in _split(rows):
            for i, part in enumerate(store(packing, some)):
                _refuse_not_finite(packing, entry, part)
                at[i] += _write(handle, part.flatten().view(torch.uint8).numpy(), at[i])
        return matrices[index].nbytes

    yield from pool.map(pack, range(len(matrices)))


def _refuse_not_finite(packing: Packing, entry: TensorEntry, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        overflow = f"values that {packing.dtype} cannot hold"
        refuse(
            f"{entry.file}: {entry.name}",
            "infinity or NaN" if packing.fp8 else overflow,
            "finite weights",
            "download the shard again, or choose another --precision",
        )


def _row_ranges(entry: TensorEntry, matrices: range, multiple: int) -> Iterator[_Rows]:
    """Cut matrices into ranges of rows for one thread each, in multiples of `multiple` rows."""
    rows, columns = entry.shape[-2:]
    step = max(multiple, ELEMENTS_AT_ONCE // columns // multiple * multiple)
    for matrix in matrices:
        for start in range(0, rows, step):
            yield _Rows(matrix, start, min(start + step, rows))


def _split(rows: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.split(rows, max(1, ELEMENTS_AT_ONCE // rows.shape[-1])) if rows.dim() > 1 else (rows,)
    )


def _write(handle: int, data: Any, offset: int) -> int:
    """Write all of `data` at `offset`; return its bytes. Nothing uses the file's own position."""
    left = memoryview(data).cast("B")
    size = len(left)
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count
    return size


def _in_file_order(
    packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> list[tuple[str, Packing]]:
    """The packings, in the order of their sources on disk."""

    def place(item: tuple[str, Packing]) -> tuple[str, int]:
        entry = entries[item[1].source]
        return str(entry.file), entry.offset

    return sorted(packings.items(), key=place)


def _layout(
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    constants: Mapping[str, Tensor],
) -> tuple[bytes, dict[str, int], int]:
    """The header, the offset of each tensor, and the file's size, all in bytes.

    Tensors with the largest elements come first, so that every tensor is aligned.
    """
    kinds: dict[str, tuple[tuple[int, ...], str]] = {
        name: kind
        for packing in packings.values()
        for entry in [entries[packing.source]]
        for name, kind in zip(packing.names(entry.dtype), packing.shapes(entry.shape), strict=True)
    }
    kinds |= {name: (tuple(each.shape), name_of(each.dtype)) for name, each in constants.items()}
    rows: dict[str, dict[str, Any]] = {}
    at = 0
    for name, (shape, dtype) in sorted(
        kinds.items(), key=lambda each: -_SAFETENSORS_TYPES[each[1][1]][1]
    ):
        end = at + nbytes(shape, dtype)
        rows[name] = {
            "dtype": _SAFETENSORS_TYPES[dtype][0],
            "shape": shape,
            "data_offsets": (at, end),
        }
        at = end
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % 64 + 56)  # with the length in front: a multiple of 64
    start = 8 + len(header)
    whole = len(header).to_bytes(8, "little") + header
    return whole, {name: start + row["data_offsets"][0] for name, row in rows.items()}, start + at
