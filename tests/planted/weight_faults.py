"""Faults in the bytes of the weights.

All of them leave every file well-formed, with the same names, dtypes, shapes and sizes. The
manifest says where the bytes of each stored tensor are, for copied and packed weights alike.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

Ref = dict[str, Any]


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def _read(folder: Path, ref: Ref) -> bytearray:
    with open(folder / ref["file"], "rb") as file:
        file.seek(ref["offset"])
        return bytearray(file.read(ref["length"]))


def _write(folder: Path, ref: Ref, data: bytes | bytearray) -> None:
    assert len(data) == ref["length"]
    with open(folder / ref["file"], "r+b") as file:
        file.seek(ref["offset"])
        file.write(data)


def _stored(folder: Path, *parameters: str) -> list[Ref]:
    """Where the tensors are that hold these parameters.

    A packed parameter has tensors of its own: "head.weight.int8", "head.weight.scales".
    """
    tensors = _manifest(folder)["weights"]["tensors"]
    stems = tuple(f"{each}." for each in parameters)
    found = [ref for name, ref in tensors.items() if f"{name}.".startswith(stems)]
    assert found, f"no tensor holds {parameters}"
    return found


def _stacked(folder: Path, layer: int) -> tuple[int, list[Ref]]:
    """How many experts a layer has, and the tensors that hold all of them one after the other."""
    count = _manifest(folder)["spec"]["text"]["experts"]["count"]
    return count, _stored(folder, *(f"layers.{layer}.moe.{part}" for part in ("gate_up", "down")))


def expert_zeroed(folder: Path, layer: int, expert: int = 4) -> None:
    count, refs = _stacked(folder, layer)
    for ref in refs:
        data, size = _read(folder, ref), ref["length"] // count
        data[expert * size : (expert + 1) * size] = bytes(size)
        _write(folder, ref, data)


def experts_swapped(folder: Path, layer: int, pair: tuple[int, int] = (2, 5)) -> None:
    count, refs = _stacked(folder, layer)
    for ref in refs:
        data, size = _read(folder, ref), ref["length"] // count
        a, b = (slice(n * size, (n + 1) * size) for n in pair)
        data[a], data[b] = data[b], data[a]
        _write(folder, ref, data)


def _row_replaced(folder: Path, parameter: str, row: int, by: int) -> None:
    count = _manifest(folder)["spec"]["text"]["vocab"]
    for ref in _stored(folder, parameter):
        data, size = _read(folder, ref), ref["length"] // count
        data[row * size : (row + 1) * size] = data[by * size : (by + 1) * size]
        _write(folder, ref, data)


def embedding_row_replaced(folder: Path, _: None) -> None:
    """Give token 201 the embedding of token 200."""
    _row_replaced(folder, "embed.weight", 201, 200)


def head_row_replaced(folder: Path, _: None) -> None:
    """Give token 202 the row of the head of token 200."""
    _row_replaced(folder, "head.weight", 202, 200)


def gain_scaled(folder: Path, layer: int) -> None:
    """Multiply the gain of a norm by 1.01, in bfloat16 or float32."""
    (ref,) = _stored(folder, f"layers.{layer}.ffn.norm.weight")
    data, width = bytes(_read(folder, ref)), _manifest(folder)["spec"]["text"]["dim"]
    if ref["length"] == 4 * width:
        _write(folder, ref, (np.frombuffer(data, np.float32) * np.float32(1.01)).tobytes())
        return
    assert ref["length"] == 2 * width, "neither bfloat16 nor float32"
    wide = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    bits = (wide * np.float32(1.01)).view(np.uint32) + 0x8000  # to the nearest bfloat16
    _write(folder, ref, (bits >> 16).astype(np.uint16).tobytes())


def queries_exchanged(folder: Path, layer: int) -> None:
    """Exchange the query weights of a layer and the next."""
    pair = (_stored(folder, f"layers.{n}.attn.q.weight") for n in (layer, layer + 1))
    for one, two in zip(*pair, strict=True):
        first, second = _read(folder, one), _read(folder, two)
        _write(folder, one, second)
        _write(folder, two, first)
