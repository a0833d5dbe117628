"""`quantize` writes a checkpoint anew in FP8, so that moec, vLLM and transformers can read it.

The result is a Hugging Face folder in compressed-tensors form: the published names, experts apart.
No graph is built, and the weights are streamed as a build streams them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from moec.artefact.artefact import named_folder
from moec.artefact.folder import default_folder, refuse_filled, writing
from moec.artefact.placement import Progress, copy_companions
from moec.exporters.model_card import CARD, model_card
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.fields import read_own_json
from moec.spec.files import load_scheme, other_model
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.forms import INDEX, SINGLE
from moec.spec.hf.modules import patterns
from moec.spec.hf.quantization import read_scheme, write_scheme
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import Scheme
from moec.spec.tensors import eligible, quantized
from moec.weights.name_map import as_packed, read_model
from moec.weights.packed.file import write_packed
from moec.weights.packed.journal import finish
from moec.weights.packed.published import in_shards, published
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry, read_shard

#: the kinds of weights and inputs that compressed-tensors can say and moec writes
_SAID = {("channel", "token"): None, ("channel", "none"): None, ("block", "group"): None}.keys()

#: what vLLM reorders, and the values, which it joins with them in one product of one scheme
_REORDERED = {names.attention("*", part, "weight") for part in "qkv"}


@dataclass(frozen=True, slots=True)
class Quantised:
    """A checkpoint that `quantize` wrote.

    Attributes:
        path: its folder.
        files: its shards, by name, with their sizes in bytes.
        read: the bytes of weights that this call read.
        notes: what the checkpoint's config says and the model leaves aside.
    """

    path: Path
    files: dict[str, int]
    read: int
    notes: tuple[str, ...] = ()


def quantize(
    checkpoint: str | Path,
    scheme: str | Path | Scheme = "dynamic",
    out: str | Path | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
    weights_from: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
) -> Quantised:
    """Quantise a checkpoint of wide weights to FP8, as a checkpoint that other engines read too.

    Args:
        checkpoint: a checkpoint folder.
        scheme: "dynamic" (all linear layers) or "meta" (the experts alone), with a scale for each
            output of a weight and each token of its inputs; "deepseek" (scales of blocks); a file.
        out: the folder to write, which must not hold anything; default build/NAME-SCHEME.
        progress: called with (stage, done, total) in bytes of weights read.
        weights_from: a further folder to which links in the checkpoint may lead.
        adapters: folders of LoRA adapters, merged into the weights in this order.

    A call that is cut off leaves a hidden folder beside `out`; the next one goes on with it.

    Raises:
        MoecError: the checkpoint is broken or quantised already, the format cannot say what the
            scheme says, or `out` holds something; then nothing is written.
    """
    spec, read, entries = read_model(checkpoint, named_folder(weights_from), adapters)
    if spec.scheme:
        refuse(
            checkpoint,
            f"weights that are {spec.scheme.precision.upper()} already ({spec.scheme.name})",
            "wide weights",
            f"build from it as it is: moec build --checkpoint {quote(str(checkpoint))}",
        )
    if spec.text.experts and not ARCHITECTURES[spec.architecture].reads_apart:
        refuse(
            checkpoint,
            f"a model of {spec.architecture}, whose experts other engines read in one tensor alone",
            "a model whose quantised experts they read one by one",
            f"quantise it for moec: moec build --checkpoint {quote(str(checkpoint))} "
            "--precision fp8",
        )
    chosen = load_scheme(scheme)
    told, config = _told(spec, chosen)
    _check_blocks(told)
    path = Path(out) if out else default_folder(f"{spec.name}-{chosen.name}")
    _, stacks = as_packed(spec, entries)
    packings = _packings(told, stacks)
    with writing(path, refuse_filled) as folder:
        copy_companions(read, folder)
        files, count = _write_shards(folder, told, packings, stacks, progress)
        raw = read_own_json(read.folder / "config.json")
        _write_json(folder / "config.json", raw | {"quantization_config": config})
        _write_generation(folder / "generation_config.json", told)
        (folder / CARD).write_text(model_card(told, chosen.name, read), encoding="utf-8")
        _check(folder, told)
    return Quantised(path, files, count, spec.notes)


def _told(spec: ModelSpec, scheme: Scheme) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that the written checkpoint has, and its `quantization_config`.

    Raises:
        MoecError: compressed-tensors cannot say what `scheme` says.
    """
    kinds = {(rule.weight, rule.inputs) for rule in scheme.rules}
    if len(kinds) > 1 or kinds - _SAID or scheme.cache or scheme.bound:
        shown = ", ".join(f"weights by {w}, inputs by {i}" for w, i in sorted(kinds))
        refuse(
            f"--scheme {scheme.name}",
            shown + (", FP8 caches" if scheme.cache else ""),
            "one kind: " + "; or ".join(f"weights by {w}, inputs by {i}" for w, i in _SAID),
            "choose dynamic, meta or deepseek; moec build takes the others",
        )
    values = scheme.model_dump() | {"layout": "compressed-tensors", "scales": "fp32"}
    (weight, inputs), *_ = kinds
    wanted = quantized(spec.model_copy(update={"scheme": scheme}))
    chosen = [name for name in wanted if not (weight == "block" and _is_reordered(spec, name))]
    of = patterns(chosen, eligible(spec))
    values["rules"] = [{"of": of, "weight": weight, "inputs": inputs}]
    config = write_scheme(spec.model_copy(update={"scheme": Scheme.model_validate(values)}))
    found = read_scheme(config, Path("config.json"), spec)
    assert found is not None
    return spec.model_copy(update={"scheme": found.model_copy(update={"scales": "fp32"})}), config


def _is_reordered(spec: ModelSpec, name: str) -> bool:
    """Whether vLLM changes the order of a weight's rows, which scales of blocks do not survive.

    It turns adjacent pairs of RoPE into halves, in the queries and keys of each head.
    """
    adjacent = spec.text.rope_pairs == "adjacent" and not spec.text.latent
    return adjacent and names.family(name) in _REORDERED


def _check_blocks(told: ModelSpec) -> None:
    """Refuse blocks that hold values of an expert's gate and of its up too.

    Raises:
        MoecError: the message names the parameter and both sizes.
    """
    scheme, shapes = told.scheme, parameters(told)
    for name, rule in quantized(told).items():
        parts = len(names.separate(name, 0)) if names.is_routed(name) else 1
        width = shapes[name][-1] // parts
        if scheme and rule.weight == "block" and parts > 1 and width % scheme.block:
            refuse(
                f"--scheme {scheme.name}: {name}",
                f"experts of width {width}",
                f"a multiple of {scheme.block}, the side of a block",
                "use --scheme dynamic, or blocks of another size",
            )


def _packings(told: ModelSpec, stacks: dict[str, TensorEntry]) -> dict[str, Packing]:
    """How each parameter is written, by the first tensor that holds it: matrices are [out, in]."""
    rules, found = quantized(told), dict[str, Packing]()
    for name, shape in parameters(told).items():
        apart = len(shape) == 3 and (name in rules or told.separate_experts)
        stored = stacks[name].dtype
        packing = Packing.by(name, stored, rules.get(name), told.scheme, turned=apart)
        found[packing.names(stored)[0]] = packing
    return found


def _write_shards(
    folder: Path,
    told: ModelSpec,
    packings: dict[str, Packing],
    entries: dict[str, TensorEntry],
    progress: Progress,
) -> tuple[dict[str, int], int]:
    """Write the weights and, if they are several files, their index.

    Returns the size of each file by its name, and the bytes read.
    """
    shards = list(in_shards(packings, entries))
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [SINGLE]
    own = [sum(entries[each.source].nbytes for each in shard.values()) for shard in shards]
    places, before, read = published(told, packings), 0, 0
    for file, shard, size in zip(files, shards, own, strict=True):

        def step(done: int, _: int, before: int = before) -> None:
            progress("quantise", before + done, sum(own))

        path = folder / file
        read += write_packed(path, shard, entries, step, published=places, journal_stays=True)
        before += size
    for file in files:
        finish(folder / file)
    if len(files) > 1:
        found = {file: read_shard(folder / file).tensors for file in files}
        index = {key: file for file, tensors in found.items() for key in tensors}
        total = sum(each.nbytes for tensors in found.values() for each in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return {file: (folder / file).stat().st_size for file in files}, read


def _write_generation(path: Path, told: ModelSpec) -> None:
    """Say in generation_config.json what engines look for there."""
    more = ARCHITECTURES[told.architecture].generation(told)
    if more:
        _write_json(path, (read_own_json(path) if path.is_file() else _tokens(told)) | more)


def _tokens(told: ModelSpec) -> dict[str, Any]:
    """What a generation_config.json must say if there was none: it hides config.json's tokens."""
    tokens = told.tokens
    found = {"bos_token_id": tokens.bos, "pad_token_id": tokens.pad}
    named = {name: token for name, token in found.items() if token is not None}
    return named | ({"eos_token_id": list(tokens.eos)} if tokens.eos else {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check(folder: Path, told: ModelSpec) -> None:
    """Read what was written as moec reads any checkpoint: all headers, no weights."""
    found, _, _ = read_model(folder)
    assert not other_model(found, told), other_model(found, told)
