"""Match the tensors of a checkpoint with those of a spec, one to one."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from moec.spec import names
from moec.spec.data import DType
from moec.spec.errors import refuse
from moec.spec.files import read_spec
from moec.spec.hf.forms import ADAPTER
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.names import family, is_scale
from moec.spec.parameters import parameters
from moec.spec.tensors import quantized, tensors
from moec.weights.checkpoint import Checkpoint, read_checkpoint
from moec.weights.int4.stored import in_bytes
from moec.weights.shard import TensorEntry, stack, turned
from moec.weights.spelling import spelled

#: a note on an adapter of embeddings that are the head too
_TIED = (
    "An adapter changes the embeddings, which are the head too: both change, as when peft merges. "
    "While peft trains, only the embeddings do."
)


#: a note on an adapter in the folder of a whole model
_BESIDE = (
    "Left aside: the adapter beside the weights (adapter_config.json), which transformers applies. "
    "--adapter with this folder merges it."
)


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor that a checkpoint must hold: our name, the checkpoint's key, shape and type."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str


def checkpoint_tensors(spec: ModelSpec) -> list[CheckpointTensor]:
    """All tensors that a checkpoint of `spec` must hold."""
    theirs = keys(spec)
    return [CheckpointTensor(name, theirs[name], *kind) for name, kind in tensors(spec).items()]


def read_model(
    folder: str | Path,
    named: Path | None = None,
    adapters: Sequence[str | Path] = (),
    mtp: bool = False,
) -> tuple[ModelSpec, Checkpoint, dict[str, TensorEntry]]:
    """Read a checkpoint folder: its spec, its shards, and the place of every tensor by our name.

    `named` is as in `read_checkpoint`. `adapters` are folders of LoRA adapters, whose changes the
    tensors then have. `mtp` is as in `moec.export`.

    Raises:
        MoecError: something is wrong with config.json, the index, a shard, a tensor or an adapter.
    """
    spec, checkpoint, entries = as_read(read_spec(folder, mtp), read_checkpoint(folder, named))
    adapters = [adapters] if isinstance(adapters, str) else adapters
    merged = tuple(Path(each).resolve() for each in adapters)
    if os.path.lexists(checkpoint.folder / ADAPTER) and checkpoint.folder.resolve() not in merged:
        spec = spec.model_copy(update={"notes": (*spec.notes, _BESIDE)})
    if adapters:
        from moec.weights.adapter.read import with_adapters  # torch, which reading needs not

        entries = with_adapters(spec, entries, adapters, named)
        checkpoint = replace(checkpoint, adapters=merged)
        if spec.text.tie_embeddings and entries[names.EMBED_WEIGHT].changes:
            spec = spec.model_copy(update={"notes": (*spec.notes, _TIED)})
    return spec, checkpoint, entries


def as_read(
    spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[ModelSpec, Checkpoint, dict[str, TensorEntry]]:
    """The same for `spec`, which config.json says, and the weights `checkpoint`.

    Raises:
        MoecError: the weights are not those of `spec`.
    """
    spec, checkpoint = of_tensors(spec, checkpoint)
    checkpoint = in_bytes(spec, checkpoint)
    return spec, checkpoint, match(spec, checkpoint)


def of_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[ModelSpec, Checkpoint]:
    """`spec` with what only the tensors say, and `checkpoint` with the keys that moec expects.

    That is the types of weights and of scales, whether experts are apart, and what is left aside.

    Raises:
        MoecError: a tied model stores a head that is not its embedding.
    """
    spec, checkpoint = spelled(spec, checkpoint)
    spec = _with_experts(spec, checkpoint)
    theirs = keys(spec)
    return _with_scales(_with_dtypes(spec, checkpoint, theirs), checkpoint, theirs), checkpoint


def _with_experts(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """`spec` with separate experts if the checkpoint has wide tensors of single experts."""
    if spec.separate_experts:  # its architecture says so
        return spec
    if not any(".experts.0." in key and key.endswith(".weight") for key in checkpoint.tensors):
        return spec
    separate = spec.model_copy(update={"separate_experts": True})
    fused, apart = (set(keys(each).values()) for each in (spec, separate))
    return separate if (apart - fused) & checkpoint.tensors.keys() else spec


def stacked(
    spec: ModelSpec, entries: Mapping[str, TensorEntry]
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """`spec` and its tensors as if each layer's experts were in two tensors: for what packs them.

    Matrices of several types make a stack of float32. Experts that the checkpoint has quantised
    stay as they are. Without `entries` the types are those that `spec` names, so that the spec is
    the same before the weights are there.
    """
    found = dict(entries)
    if not spec.separate_experts:
        return spec, found
    own = spec.scheme is None or spec.scheme.layout == "moec"  # the checkpoint is wide
    as_stored = spec.model_copy(update={"scheme": None}) if own else spec
    rules, types = quantized(as_stored), {name: each.dtype for name, each in found.items()}
    if not found:
        types = {name: kind.dtype for name, kind in tensors(as_stored).items()}
    for name, (count, *_) in parameters(spec).items():
        if name in rules:
            continue
        each = [names.separate(name, expert) for expert in range(count)]
        if names.is_routed(name) and all(part in types for parts in each for part in parts):
            several = {types.pop(part) for parts in each for part in parts}
            types[name] = several.pop() if len(several) == 1 else "fp32"
            if found:
                matrices = [[found.pop(part) for part in parts] for parts in each]
                found[name] = stack(name, [turned(name, types[name], parts) for parts in matrices])
    spec = spec.model_copy(update={"separate_experts": False})
    return typed(spec, types), found


def as_packed(
    spec: ModelSpec, entries: dict[str, TensorEntry]
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """`spec` and its tensors for what packs them: `stacked`, and 4-bit integers joined."""
    spec, found = stacked(spec, entries)
    if spec.scheme and spec.scheme.int4:
        from moec.weights.int4.packed import joined  # torch, which reading needs not

        return joined(spec, found)
    return spec, found


def _with_dtypes(spec: ModelSpec, checkpoint: Checkpoint, theirs: Mapping[str, str]) -> ModelSpec:
    """`spec` with the types of the wide weights: config.json may name another, or none.

    The type that most of them have is the model's. The others are named, all layers in one where
    they agree.
    """
    wide = (name for name, kind in tensors(spec).items() if kind.dtype in get_args(DType))
    stored = {name: checkpoint.tensors.get(theirs[name]) for name in wide if not is_scale(name)}
    return typed(spec, {name: each.dtype for name, each in stored.items() if each})


def typed(spec: ModelSpec, dtypes: Mapping[str, str]) -> ModelSpec:
    """`spec` with the types of wide weights, by name: that of most, and those of the others."""
    found = {name: each for name, each in dtypes.items() if each in get_args(DType)}
    if not found:
        return spec
    most = Counter(found.values()).most_common(1)[0][0]
    families: dict[str, set[str]] = {}
    for name, dtype in found.items():
        families.setdefault(family(name), set()).add(dtype)
    odd = {
        family(name) if len(families[family(name)]) == 1 else name: dtype
        for name, dtype in found.items()
        if dtype != most
    }
    return spec.model_copy(update={"dtype": most, "dtypes": odd})


def _with_scales(spec: ModelSpec, checkpoint: Checkpoint, theirs: Mapping[str, str]) -> ModelSpec:
    """`spec` with the type of the checkpoint's scales, which no config contains."""
    if spec.scheme is None:
        return spec
    found = (checkpoint.tensors.get(key) for name, key in theirs.items() if is_scale(name))
    wide = get_args(DType)
    dtype = next((each.dtype for each in found if each and each.dtype in wide), "fp32")
    return spec.model_copy(update={"scheme": spec.scheme.model_copy(update={"scales": dtype})})


def match(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Find the bytes of every tensor of `spec` in `checkpoint`, by our name.

    Raises:
        MoecError: a tensor is missing or unexpected, has another shape or type than the spec says,
            or is a scale that is not finite and above 0.
    """
    found, expected = dict(checkpoint.tensors), checkpoint_tensors(spec)
    entries, scales = dict[str, TensorEntry](), list[tuple[str, TensorEntry]]()
    for row in expected:
        entry = found.pop(row.key, None)
        if entry is None:
            refuse(
                f"{checkpoint.folder}: {row.key}",
                "no such tensor",
                f"{row.dtype} {list(row.shape)}",
                "set tie_word_embeddings to true in config.json if the embedding is the head too"
                if row.name == names.HEAD_WEIGHT
                else "download the missing shard, or compare config.json with the weights",
            )
        if is_scale(row.name):
            entry = _reshaped(row, entry)
            scales.append((row.key, entry))
        if (entry.dtype, entry.shape) != (row.dtype, row.shape):
            refuse(
                f"{entry.file}: {row.key}",
                f"{entry.dtype} {list(entry.shape)}",
                f"{row.dtype} {list(row.shape)}, "
                + (
                    "because all scales have one type"
                    if is_scale(row.name)
                    else "the shape from config.json, the type of most weights"
                ),
                "compare config.json with the weights: they are not of one model",
            )
        entries[row.name] = entry
    if found:
        name = min(found)
        what = "tensor"
        if is_scale(name):
            what = "scale, of something that config.json does not quantise"
        refuse(
            f"{found[name].file}: {name}",
            f"unexpected {what} ({len(found)} in all)",
            f"only the {len(expected)} tensors that config.json calls for",
            "compare config.json with the weights: they are not of one model",
        )
    # 4-bit integers have gigabytes of scales, and some groups have only weights of zero.
    if scales and not (spec.scheme and spec.scheme.int4):
        from moec.weights.trust.scales import check_scales  # torch, which reading needs not

        check_scales(scales)
    return entries


def _reshaped(row: CheckpointTensor, entry: TensorEntry) -> TensorEntry:
    """A scale with our shape: formats differ in whether they keep axes of size 1."""
    same = [n for n in entry.shape if n != 1] == [n for n in row.shape if n != 1]
    return replace(entry, shape=row.shape) if same else entry
