"""Write packed weights to one safetensors file: a few rows at a time, on all cores, resumable."""

import hashlib
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
from moec.weights import fp8
from moec.weights.arrange import arrange, store
from moec.weights.journal import journal_of, landed
from moec.weights.packing import Packing
from moec.weights.shard import DTYPES, TensorEntry, nbytes
from moec.weights.view import STORED, read_into, view

#: elements that are packed at once: bounds the memory of the arithmetic
PIECE = 1 << 22
#: bytes of experts that are held at once; of one, if it is larger
TOGETHER = 1 << 28
#: bytes between two entries of the journal, each of which waits for the disk
LANDED = 1 << 28
_CODES = {ours: (theirs, size) for theirs, (ours, size) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows `start` to `stop` of one matrix of a parameter, number `matrix` in a fused one."""

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
    """Pack each parameter from `entries` into `path`, and `constants` as they are.

    Memory holds a matrix, at most twice, for each core; of FP8, a group of experts and their codes
    for all cores together. A journal beside `path` says what has
    landed: if this is cut off, the same call goes on from there. Returns the bytes of weights that
    this call read.

    Raises:
        MoecError: a weight that is not finite; a file with holes would pass for a whole one.
    """
    constants = constants or {}
    header, offsets, size = _layout(packings, entries, constants)
    journal = journal_of(path)
    fingerprint = _fingerprint(header, packings, entries)
    done = landed(path, journal, fingerprint, size, set(packings))
    total = sum(entries[p.source].nbytes for p in packings.values())
    before = at = sum(entries[packings[name].source].nbytes for name in done)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pending: list[str] = []
    landing: list[Future[None]] = []  # waits for the disk while the next ones are packed
    with (
        path.open("r+b" if done else "wb") as file,
        journal.open("a", encoding="utf-8") as log,
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(1) as disk,
        _one_thread_each(),
    ):
        handle = file.fileno()

        def land(names: list[str]) -> None:
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
            places = [offsets[part] for part in packing.names(entry.dtype)]
            write = _write_fp8 if packing.fp8 else _write_rows
            for read in write(handle, packing, entry, places, pool):
                at += read
                progress(at, total)
            pending.append(name)
            waiting += entry.nbytes
            if waiting >= LANDED:
                landing.append(disk.submit(land, pending))
                pending, waiting = [], 0
        landing.append(disk.submit(land, pending))
        for each in landing:
            each.result()
    journal.unlink()
    return total - before


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each worker is a thread already: torch's own would get in each other's way."""
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
    places: list[int],
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Group by group of experts, scales, then codes; yields bytes that have been packed."""
    block, fused = packing.block, len(entry.shape) == 3
    along = {"tensor": "all", "expert": "all", "block": "block"}.get(
        packing.fp8 or "", "column" if fused else "row"
    )
    count = entry.shape[0] if fused else 1
    elements, dtype = math.prod(entry.shape) // count, STORED[entry.dtype]
    step = max(1, TOGETHER // (entry.nbytes // count))
    groups = [range(i, min(i + step, count)) for i in range(0, count, step)]
    # Memory that all groups use in turn: fresh pages cost as much as the work on them.
    held = torch.empty(len(groups[0]) * elements, dtype=dtype)
    done = torch.empty(held.shape, dtype=STORED["fp8"])

    def of(scratch: Tensor, place: _Place, group: range) -> Tensor:
        columns = entry.shape[-1]
        at = (place.matrix - group.start) * elements + place.start * columns
        return scratch[at : at + (place.stop - place.start) * columns].view(-1, columns)

    def magnitudes(group: range) -> Tensor:
        """Of each matrix, which stay held."""
        parts = list(_places(entry, group, block if along == "block" else 1))

        def read(place: _Place) -> Tensor:
            rows = of(held, place, group)
            read_into(entry, place.matrix * elements + place.start * entry.shape[-1], rows)
            return fp8.magnitudes(rows, along, block)

        found = list(zip(parts, pool.map(read, parts), strict=True))
        join = torch.cat if along in ("row", "block") else lambda sizes: torch.stack(sizes).amax(0)
        sizes = torch.stack([join([size for p, size in found if p.matrix == i]) for i in group])
        _refuse_odd(packing, entry, sizes)
        return sizes

    common = None
    if packing.fp8 == "tensor" and len(groups) > 1:  # read all of them first
        common = torch.stack([magnitudes(group).amax() for group in groups]).amax()
    at = places[1]
    for group in groups:
        sizes = magnitudes(group)
        if packing.fp8 == "tensor":
            sizes = (sizes.amax() if common is None else common).expand(len(group))
        scales = fp8.scales(sizes, STORED[packing.dtype])
        _refuse_odd(packing, entry, scales)
        if packing.fp8 != "tensor" or group.start == 0:
            stored = scales[0] if packing.fp8 == "tensor" else scales
            at += _write(handle, stored.flatten().view(torch.uint8).numpy(), at)

        def pack(
            place: _Place, group: range = group, scales: Tensor = scales
        ) -> tuple[_Place, Tensor]:
            rows, out = of(held, place, group), of(done, place, group)
            mine = scales[place.matrix - group.start].float()
            if along in ("row", "block"):
                unit = block if along == "block" else 1
                mine = mine[place.start // unit : -(-place.stop // unit)]
            fp8.codes(rows, mine, along, block, out)
            return place, out

        packed = pool.map(pack, _places(entry, group, block if along == "block" else 1))
        if packing.arrange == "transpose":
            packed = _transposed(packed, entry.shape[-2:], held, done, pool)
        for place, out in packed:
            # One thread writes: several would wait for each other, spinning.
            start = place.matrix * elements + place.start * out.shape[-1]
            _write(handle, out.view(torch.uint8).numpy(), places[0] + start)
            yield out.numel() * dtype.itemsize


def _transposed(
    packed: Iterator[tuple[_Place, Tensor]],
    shape: tuple[int, ...],
    room: Tensor,
    done: Tensor,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[_Place, Tensor]]:
    """Codes of a group of experts, in `done` once `packed` has run: rows of [out, in], in order.

    They go to `room`, whose wide weights nobody needs any more by then.
    """
    inner, outer = shape
    matrices = sorted({place.matrix for place, _ in packed})
    codes = done.view(torch.uint8)[: len(matrices) * inner * outer].view(-1, inner, outer)
    turned = room.view(torch.uint8)[: codes.numel()].view(-1, outer, inner)
    step = max(1, PIECE // inner)

    def turn(place: _Place) -> tuple[_Place, Tensor]:
        at, rows = place.matrix - matrices[0], slice(place.start, place.stop)
        # A whole matrix is transposed in blocks that fit the cache, a slice of one is not.
        turned[at, rows].copy_(codes[at, :, rows].contiguous().t())
        return place, turned[at, rows]

    places = (
        _Place(matrix, start, min(start + step, outer))
        for matrix in matrices
        for start in range(0, outer, step)
    )
    yield from pool.map(turn, places)


def _write_rows(
    handle: int,
    packing: Packing,
    entry: TensorEntry,
    places: list[int],
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Matrix by matrix, arranged, cast or quantised in pieces; yields bytes that were packed."""
    matrices = [entry] if len(entry.shape) < 3 else [entry[i] for i in range(entry.shape[0])]
    sizes = [nbytes(*kind) // len(matrices) for kind in packing.shapes(entry.shape)]

    def pack(index: int) -> int:
        at = [place + index * size for place, size in zip(places, sizes, strict=True)]
        rows = arrange(packing, view(matrices[index]))
        for piece in _pieces(rows):
            for i, part in enumerate(store(packing, piece)):
                _refuse_odd(packing, entry, part)
                at[i] += _write(handle, part.flatten().view(torch.uint8).numpy(), at[i])
        return matrices[index].nbytes

    yield from pool.map(pack, range(len(matrices)))


def _refuse_odd(packing: Packing, entry: TensorEntry, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        what = f"values that {packing.dtype} cannot hold"
        refuse(
            f"{entry.file}: {entry.name}",
            "infinity or NaN" if packing.fp8 else what,
            "finite weights",
            "fetch the shard again, or choose another --precision",
        )


def _places(entry: TensorEntry, matrices: range, multiple: int) -> Iterator[_Place]:
    rows, columns = entry.shape[-2:]
    step = max(multiple, PIECE // columns // multiple * multiple)
    for matrix in matrices:
        for start in range(0, rows, step):
            yield _Place(matrix, start, min(start + step, rows))


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, PIECE // rows.shape[-1])) if rows.dim() > 1 else (rows,)


def _write(handle: int, data: Any, offset: int) -> int:
    """Write all of `data` at `offset`; the file's own position is nobody's."""
    left = memoryview(data).cast("B")
    size = len(left)
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count
    return size


def _in_file_order(
    packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> list[tuple[str, Packing]]:
    """Packings in the order in which their sources lie on disk."""

    def place(item: tuple[str, Packing]) -> tuple[str, int]:
        entry = entries[item[1].source]
        return str(entry.file), entry.offset

    return sorted(packings.items(), key=place)


def _fingerprint(
    header: bytes, packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> str:
    """What a file would hold: its layout, how it is made, and from which state of which files."""
    digest = hashlib.sha256(header)
    digest.update("".join(p.model_dump_json() for p in packings.values()).encode())
    for file in sorted({entry.file for entry in entries.values()}):
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _layout(
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    constants: Mapping[str, Tensor],
) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor starts, and the file's size.

    Wide elements come first, so that all are aligned.
    """
    kinds: dict[str, tuple[tuple[int, ...], str]] = {
        name: kind
        for packing in packings.values()
        for entry in [entries[packing.source]]
        for name, kind in zip(packing.names(entry.dtype), packing.shapes(entry.shape), strict=True)
    }
    names = {dtype: name for name, dtype in STORED.items()}
    kinds |= {name: (tuple(each.shape), names[each.dtype]) for name, each in constants.items()}
    rows: dict[str, dict[str, Any]] = {}
    at = 0
    for name, (shape, dtype) in sorted(kinds.items(), key=lambda each: -_CODES[each[1][1]][1]):
        end = at + nbytes(shape, dtype)
        rows[name] = {"dtype": _CODES[dtype][0], "shape": shape, "data_offsets": (at, end)}
        at = end
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % 64 + 56)  # with its own length: a multiple of 64
    start = 8 + len(header)
    whole = len(header).to_bytes(8, "little") + header
    return whole, {name: start + row["data_offsets"][0] for name, row in rows.items()}, start + at
