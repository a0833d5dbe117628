"""Write packed weights to one safetensors file, a few rows at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.spec.errors import MoecError
from moec.weights.packing import Packing, arrange, store
from moec.weights.shard import DTYPES, TensorEntry, nbytes
from moec.weights.view import view

#: elements that are packed at once: bounds the memory of the arithmetic
PIECE = 1 << 22
_CODES = {ours: (theirs, size) for theirs, (ours, size) in DTYPES.items()}


def write_packed(
    path: Path,
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    progress: Callable[[int, int], None],
) -> None:
    """Pack each parameter from `entries` into `path`; memory holds a matrix, at most twice.

    Raises:
        MoecError: a weight that is not finite; a file with holes would pass for a whole one.
    """
    header, offsets = _layout(packings, entries)
    done, total = 0, sum(entries[p.source].nbytes for p in packings.values())
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for packing in packings.values():
            entry = entries[packing.source]
            places = [offsets[name] for name in packing.names(entry.dtype)]
            for rows in _pieces(packing, entry):
                parts = store(packing, rows)
                if not all(bool(part.isfinite().all()) for part in parts):
                    raise MoecError(
                        f"{entry.file}: {entry.name}", f"values that {packing.dtype} cannot hold",
                        "finite weights", "fetch the shard again, or choose another --precision",
                    )  # fmt: skip
                for i, part in enumerate(parts):
                    file.seek(places[i])
                    places[i] += file.write(part.flatten().view(torch.uint8).numpy().data)
            done += entry.nbytes
            progress(done, total)


def _layout(
    packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor starts: wide elements first, so that all are aligned."""
    kinds = {
        name: kind
        for packing in packings.values()
        for entry in [entries[packing.source]]
        for name, kind in zip(packing.names(entry.dtype), packing.shapes(entry.shape), strict=True)
    }
    rows: dict[str, dict[str, Any]] = {}
    at = 0
    for name, (shape, dtype) in sorted(kinds.items(), key=lambda each: -_CODES[each[1][1]][1]):
        end = at + nbytes(shape, dtype)
        rows[name] = {"dtype": _CODES[dtype][0], "shape": shape, "data_offsets": (at, end)}
        at = end
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % 64 + 56)  # with its own length: a multiple of 64
    start = 8 + len(header)
    return header, {name: start + row["data_offsets"][0] for name, row in rows.items()}


def _pieces(packing: Packing, entry: TensorEntry) -> Iterator[Tensor]:
    matrices = [entry] if len(entry.shape) < 3 else (entry[i] for i in range(entry.shape[0]))
    for matrix in map(view, matrices):
        rows = arrange(packing, matrix)
        yield from torch.split(rows, max(1, PIECE // rows.shape[-1])) if rows.dim() > 1 else [rows]
