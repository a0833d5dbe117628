"""Pack weights: rewrite them into one safetensors file, a few rows at a time, on all cores.

`journal` beside it records which weights are on disk, so that a call that was cut off can go on.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moec.spec.errors import refuse
from moec.weights import fp8
from moec.weights.arrange import arrange, store
from moec.weights.int4.packed import packed_rows
from moec.weights.packed import journal as packed_journal
from moec.weights.packed.groups import Pieces, in_groups
from moec.weights.packed.hashed import Piece, joined
from moec.weights.packed.journal import Hash, Landed
from moec.weights.packed.layout import in_file_order, layout
from moec.weights.packed.published import Published
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry, nbytes
from moec.weights.view import STORED, read_into, view

#: elements that one thread packs at once, which bounds the memory of the arithmetic
ELEMENTS_AT_ONCE = 1 << 22
#: bytes of experts that are in memory at once; a single expert may have more
GROUP_BYTES = 1 << 28
#: bytes between two entries of the journal; each entry waits for the disk
JOURNAL_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows `start` to `stop` of a matrix; `matrix` is its index in a stacked expert weight."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight that is being packed.

    Attributes:
        packing: how it is packed.
        entry: where it comes from.
        pieces: where each of its stored tensors goes, in pieces. What the matrices of a stack
            become are pieces of their own, because several threads pack them at once.
        crcs: the CRC-32 of each matrix of its source.
    """

    packing: Packing
    entry: TensorEntry
    pieces: list[list[Piece]]
    crcs: list[int]

    def landed(self) -> Landed:
        """What the journal and the manifest say of it, once it is written."""
        names = self.packing.names(self.entry.dtype)
        hashes = [
            Hash(joined([each.sha256.digest() for each in pieces]), len(pieces))
            for pieces in self.pieces
        ]
        return Landed(packed_journal.checksum(self.crcs), dict(zip(names, hashes, strict=True)))


def write_packed(
    path: Path,
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    progress: Callable[[int, int], None],
    constants: Mapping[str, Tensor] | None = None,
    hashes: dict[str, Hash] | None = None,
    published: Mapping[str, Published] | None = None,
    journal_stays: bool = False,
) -> int:
    """Pack each parameter from `entries` into `path`, and write `constants` unchanged.

    Each core holds one matrix, at most twice. For FP8 all cores share the memory of a group of
    experts and their quantised values. `progress` is called with the bytes read so far and in all.
    The hash of every stored tensor, made while it is written, goes into `hashes`. With `published`
    the file's header has the names that other engines know.

    A journal beside `path` records which weights are on disk. If the call is cut off, the same call
    goes on from there, unless the weights' sources have changed meanwhile. The journal is removed
    at the end, unless `journal_stays` because other files belong to this one.

    Returns:
        The bytes of weights that this call packed.

    Raises:
        MoecError: a weight is not finite, or its packed type cannot hold it. The journal then
            still marks the file as unfinished, because a file with gaps would look complete.
    """
    constants, hashes = constants or {}, {} if hashes is None else hashes
    header, offsets, size = layout(packings, entries, constants, published)
    fingerprint = packed_journal.fingerprint(header, packings, entries)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = sum(entries[p.source].nbytes for p in packings.values())
    pending: dict[str, Landed] = {}
    syncs: list[Future[None]] = []  # these wait for the disk while the next weights are packed
    with ThreadPoolExecutor(workers) as pool:
        done = packed_journal.landed(path, fingerprint, size, packings)
        sources = [_matrices(entries[packings[name].source]) for name in done]
        now = pool.map(packed_journal.checksum_of, sources)
        done = {
            name: each
            for (name, each), source in zip(done.items(), now, strict=True)
            if each.source == source
        }
        before = at = sum(entries[packings[name].source].nbytes for name in done)
        for each in done.values():
            hashes.update(each.hashes)
        with (
            packed_journal.begin(path, fingerprint, done) as log,
            packed_journal.open_packed(path, anew=not done) as file,
            ThreadPoolExecutor(1) as disk,
            ThreadPoolExecutor(1) as beside,
            _single_threaded_torch(),
        ):
            handle = file.fileno()

            def sync(landed: dict[str, Landed]) -> None:
                """Wait until the file is on disk, then enter `landed` in the journal."""
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                log.write("".join(packed_journal.line(*each) for each in landed.items()))
                log.flush()

            if not done:
                os.truncate(handle, size)
                Piece(handle, 0).write(header)
            for name, tensor in constants.items():
                piece = Piece(handle, offsets[name])
                piece.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
                hashes[name] = Hash(piece.sha256.hexdigest())
            waiting = 0
            for name, packing in in_file_order(packings, entries):
                if name in done:
                    continue
                weight = _weight(handle, packing, entries[packing.source], offsets)
                written = (
                    _write_fp8(weight, pool, beside) if packing.fp8 else _write_others(weight, pool)
                )
                for read in written:
                    at += read
                    progress(at, total)
                pending[name] = weight.landed()
                hashes.update(pending[name].hashes)
                waiting += weight.entry.nbytes
                if waiting >= JOURNAL_BYTES:
                    syncs.append(disk.submit(sync, pending))
                    pending, waiting = {}, 0
            syncs.append(disk.submit(sync, pending))
            for each_sync in syncs:
                each_sync.result()
    if not journal_stays:
        packed_journal.finish(path)
    return total - before


def _weight(
    handle: int, packing: Packing, entry: TensorEntry, offsets: Mapping[str, int]
) -> _Weight:
    count = len(_matrices(entry))
    pieces: list[list[Piece]] = []
    for name, kind in zip(packing.names(entry.dtype), packing.shapes(entry.shape), strict=True):
        # One thread writes the FP8 scales of all matrices.
        parts = 1 if packing.fp8 and pieces else count
        size = nbytes(*kind) // parts
        pieces.append([Piece(handle, offsets[name] + i * size) for i in range(parts)])
    return _Weight(packing, entry, pieces, [0] * count)


def _matrices(entry: TensorEntry) -> list[TensorEntry]:
    """The experts of a stacked weight; any other weight is one matrix."""
    return [entry] if len(entry.shape) < 3 else [entry[i] for i in range(entry.shape[0])]


def _crc(values: Tensor) -> int:
    return zlib.crc32(memoryview(values.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Let torch use one thread, because the workers already keep all cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_fp8(weight: _Weight, pool: ThreadPoolExecutor, beside: Executor) -> Iterator[int]:
    """Quantise one group of experts after another, and write scales and quantised values.

    Yields the bytes of weights that have been packed, after each step.
    """
    packing, entry = weight.packing, weight.entry
    block, stacked = packing.block, len(entry.shape) == 3
    along = fp8.along_of(packing.fp8, stacked)
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
    values_to, (scales_to,) = weight.pieces
    for group in groups:
        sizes = magnitudes(group)
        if packing.fp8 == "tensor":
            sizes = (sizes.amax() if common is None else common).expand(len(group))
        scales = fp8.scales(sizes, STORED[packing.dtype])
        _refuse_not_finite(packing, entry, scales)
        if packing.fp8 != "tensor" or group.start == 0:
            stored = scales[0] if packing.fp8 == "tensor" else scales
            if packing.fp8 == "block" and packing.arrange == "transpose":
                stored = stored.transpose(-2, -1)
            if packing.parts > 1:
                stored = stored.repeat_interleave(packing.parts)
            scales_to.write(stored.flatten().view(torch.uint8).numpy())

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

        whole = [_Rows(i, 0, entry.shape[-2]) for i in group]
        crcs = [pool.submit(_crc, part(weights, each, group)) for each in whole]
        packed = pool.map(pack, _row_ranges(entry, group, block if along == "block" else 1))
        if packing.arrange == "transpose":
            wait(crcs)  # what follows overwrites the weights
            packed = _transposed(packed, entry.shape[-2:], weights, values, pool)
        for place, out in packed:
            # Only this thread writes. Several threads would wait for one another in spin locks.
            values_to[place.matrix].write(out.view(torch.uint8).numpy(), beside)
            yield out.numel() * dtype.itemsize
        for i, crc in zip(group, crcs, strict=True):
            weight.crcs[i] = crc.result()


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


def _write_others(weight: _Weight, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Write one matrix after another, a few rows at a time, as its packing has them.

    Yields the bytes of weights that have been packed, after each matrix.
    """
    packing, matrices = weight.packing, _matrices(weight.entry)
    cut = _arranged
    if packing.group:
        cut = _given
    elif packing.bits == 4 and packing.arrange != "interleave":
        cut = in_groups

    def pack(index: int) -> int:
        for parts, crc in cut(packing, weight.entry, index):
            weight.crcs[index] = crc
            for pieces, part in zip(weight.pieces, parts, strict=True):
                _refuse_not_finite(packing, weight.entry, part)
                pieces[index].write(part.flatten().view(torch.uint8).numpy())
        return matrices[index].nbytes

    yield from pool.map(pack, range(len(matrices)))


def _arranged(packing: Packing, entry: TensorEntry, index: int) -> Pieces:
    """What `in_groups` gives, for a matrix that is arranged, and cast or quantised."""
    matrix = view(_matrices(entry)[index])
    crc = _crc(matrix)
    for some in _split(arrange(packing, matrix)):
        yield store(packing, some), crc


def _given(packing: Packing, entry: TensorEntry, index: int) -> Pieces:
    """What `in_groups` gives, for a matrix of a checkpoint's own 4-bit integers."""
    matrix = _matrices(entry)[index]
    crc = packed_journal.crc_of(matrix)
    for parts in packed_rows(packing, matrix):
        yield parts, crc


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
