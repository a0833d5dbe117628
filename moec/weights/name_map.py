"""Match the tensors of a checkpoint with those of a spec: each key once, each tensor once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from moec.spec.errors import refuse
from moec.spec.files import load_spec
from moec.spec.frozen import DType
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.tensors import tensors
from moec.weights.checkpoint import Checkpoint, read_checkpoint
from moec.weights.shard import TensorEntry


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a checkpoint: our name, its key there, the shape and dtype both must have."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str


def rows(spec: ModelSpec) -> list[Row]:
    """The whole checkpoint of `spec`."""
    theirs = keys(spec)
    return [Row(name, theirs[name], *kind) for name, kind in tensors(spec).items()]


def read_model(folder: str | Path) -> tuple[ModelSpec, Checkpoint, dict[str, TensorEntry]]:
    """The spec, the shards and the bytes of every tensor of a checkpoint folder.

    Raises:
        MoecError: anything wrong with config.json, index, shards or tensors.
    """
    spec, checkpoint = load_spec(folder), read_checkpoint(folder)
    spec = _with_scales(spec, checkpoint)
    return spec, checkpoint, match(spec, checkpoint)


def _with_scales(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """`spec` with the dtype that the checkpoint's scales have: no config says it."""
    if spec.scheme is None:
        return spec
    found = (checkpoint.tensors.get(row.key) for row in rows(spec) if _is_scale(row.name))
    wide = get_args(DType)
    dtype = next((each.dtype for each in found if each and each.dtype in wide), "fp32")
    return spec.model_copy(update={"scheme": spec.scheme.model_copy(update={"scales": dtype})})


def match(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The bytes of every tensor of `spec`. Each key is used once, each tensor filled once.

    Raises:
        MoecError: a tensor is missing, unexpected, has another shape or dtype than the spec, or
            is a scale that is not above zero and finite.
    """
    found, expected = dict(checkpoint.tensors), rows(spec)
    entries = {}
    for row in expected:
        entry = found.pop(row.key, None)
        if entry is None:
            refuse(
                f"{checkpoint.folder}: {row.key}",
                "no such tensor",
                f"{row.dtype} {list(row.shape)}",
                "fetch the missing shard, or compare config.json with the weights",
            )
        if _is_scale(row.name):
            entry = _checked_scale(row, entry)
        if (entry.dtype, entry.shape) != (row.dtype, row.shape):
            refuse(
                f"{entry.file}: {row.key}",
                f"{entry.dtype} {list(entry.shape)}",
                f"{row.dtype} {list(row.shape)}, "
                + ("all scales of one dtype" if _is_scale(row.name) else "from config.json"),
                "compare config.json with the weights: they are not of one model",
            )
        entries[row.name] = entry
    if found:
        name = min(found)
        what = "scale, of something that config.json leaves wide" if _is_scale(name) else "tensor"
        refuse(
            f"{found[name].file}: {name}",
            f"unexpected {what} ({len(found)} in all)",
            f"the {len(expected)} tensors of this config",
            "compare config.json with the weights: they are not of one model",
        )
    return entries


def _is_scale(name: str) -> bool:
    return name.endswith("_scale")


def _checked_scale(row: Row, entry: TensorEntry) -> TensorEntry:
    """`entry` in our shape of it: sizes of 1 come and go between formats. Its values are read."""
    if [n for n in entry.shape if n != 1] != [n for n in row.shape if n != 1]:
        return entry
    entry = replace(entry, shape=row.shape)
    if entry.dtype == row.dtype:
        from moec.weights.view import view  # torch, which a wide checkpoint is read without

        values = view(entry).float()
        bad = values[~(values.isfinite() & (values > 0))]
        if len(bad):
            refuse(
                f"{entry.file}: {row.key}",
                f"{bad[0].item()} ({len(bad)} of {values.numel()})",
                "scales that are finite and above 0",
                "fetch the shard again",
            )
    return entry
