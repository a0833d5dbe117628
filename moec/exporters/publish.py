"""Write what makes weights a Hugging Face checkpoint: its config, tokens and model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.artefact.card import CARD, read_card
from moec.artefact.manifest import Manifest
from moec.exporters.model_card import model_card
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.fields import read_own_json
from moec.spec.files import other_model
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.generation import of_config
from moec.spec.hf.written import published_spec, told
from moec.spec.model import ModelSpec
from moec.spec.tensors import tensors
from moec.weights.checkpoint import Checkpoint
from moec.weights.name_map import read_model, typed
from moec.weights.packed.shards import write_json
from moec.weights.packing import Packing

#: the fields in which a config.json says the type of the weights
_TYPES = ("dtype", "torch_dtype")
#: our names of types, as configs have them
_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def describe(
    folder: Path, as_told: ModelSpec, config: dict[str, Any], scheme: str, source: Checkpoint
) -> str:
    """Write what says how to read the shards in `folder`, and read them once as a checkpoint.

    Args:
        folder: it has the shards, and copies of the source's other files.
        as_told: the spec that the checkpoint has.
        config: its `quantization_config`.
        scheme: the name of the scheme.
        source: the checkpoint that the weights come from.

    Returns:
        The hash of the model card, but for its proof.
    """
    write_json(folder / "config.json", config_of(source.folder, as_told, config))
    generation = folder / "generation_config.json"
    if (values := generation_of(generation, as_told)) is not None:
        write_json(generation, values)
    (folder / CARD).write_text(model_card(as_told, scheme, source), encoding="utf-8")
    found, _, _ = read_model(folder, mtp=as_told.text.mtp == "built")
    assert not (odd := other_model(found, as_told)), odd
    card = read_card(folder)
    assert card is not None
    return card.sha256


def describe_build(folder: Path, manifest: Manifest, source: Checkpoint) -> str:
    """Do the same for the packed weights of an artefact, which `source` had wide."""
    as_told, config = told_of(manifest)
    assert manifest.spec.scheme is not None
    return describe(folder, as_told, config, manifest.spec.scheme.name, source)


def told_of(manifest: Manifest) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec that an artefact's folder has as a checkpoint, and its `quantization_config`.

    Raises:
        MoecError: other engines do not know such weights.
    """
    spec, published = manifest.spec, published_spec(manifest.spec)
    if spec.scheme is None or published is None:
        refuse("manifest.json", "weights that are called published", "those of moec", "build again")
    as_told, config = told(published.model_copy(update={"scheme": None}), spec.scheme)
    return typed_as_packed(as_told, manifest.packings), config


def typed_as_packed(as_told: ModelSpec, packings: Mapping[str, Packing]) -> ModelSpec:
    """`as_told` with the types that `packings` give to what is not quantised."""
    kinds, stored = tensors(as_told), dict[str, str]()
    for each in packings.values():
        if each.fp8 or each.bits:
            continue
        own = [each.source]
        if each.source not in kinds:
            experts = range(as_told.text.expert_count)
            own = [part for e in experts for part in names.separate(each.source, e)]
        stored |= dict.fromkeys(own, each.dtype)
    return typed(as_told, stored)


def config_of(source: Path, as_told: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a checkpoint with the spec `as_told`, from that in the folder `source`."""
    raw = read_own_json(source / "config.json")
    dtype = as_told.stored(names.EMBED_WEIGHT)  # most tensors may be norms of another type
    less = ARCHITECTURES[as_told.architecture].left_out if as_told.text.mtp == "aside" else {}
    return _typed(raw, _TORCH[dtype]) | {**less, "quantization_config": config}


def generation_of(path: Path, as_told: ModelSpec) -> dict[str, Any] | None:
    """What generation_config.json says, of which `path` is the source's; None: nothing new."""
    more = ARCHITECTURES[as_told.architecture].generation(as_told)
    if not more:
        return None
    if path.is_file():
        return read_own_json(path) | more
    # The new file hides what config.json says of generation.
    return of_config(read_own_json(path.with_name("config.json"))) | _tokens(as_told) | more


def _typed(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config, its parts included, with another type of the weights wherever it names one."""
    found = {
        key: _typed(each, dtype) if isinstance(each, dict) else each for key, each in raw.items()
    }
    return found | {key: dtype for key in _TYPES if isinstance(raw.get(key), str)}


def _tokens(told: ModelSpec) -> dict[str, Any]:
    """What a generation_config.json must say if there was none: it hides config.json's tokens."""
    tokens = told.tokens
    found = {"bos_token_id": tokens.bos, "pad_token_id": tokens.pad}
    named = {name: token for name, token in found.items() if token is not None}
    return named | ({"eos_token_id": list(tokens.eos)} if tokens.eos else {})
