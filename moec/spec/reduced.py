"""The twin of a model: the same layers, patterns and switches, small enough to run anywhere."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from moec.spec.model import ModelSpec
from moec.spec.scheme import Rule, Scheme
from moec.spec.tensors import eligible

CHUNK = 8


def twin(
    spec: ModelSpec, layers: int | None = None, block: int = 16, head_dim: int = 8
) -> ModelSpec:
    """`spec` shrunk in width; depth, patterns, expert count, head ratio and switches are kept.

    With `layers`, the decoder and the tower are no deeper than that. The decoder's widths are
    multiples of `block`, for weights that are quantised in blocks and kernels that work in tiles.

    The chunk shrinks to 8 tokens and everything counted in positions with it, so that a proof of a
    few dozen tokens crosses several chunk borders and temperature steps; an image tile shrinks to 4
    tokens.
    """
    text = spec.text
    scaling = text.rope_scaling
    small = text.model_copy(
        update={
            "layers": min(layers or text.layers, text.layers),
            "dim": 2 * block,
            "heads": text.heads // text.kv_heads * 2,
            "kv_heads": 2,
            "head_dim": head_dim,
            "vocab": 256,
            "max_positions": 32 * CHUNK,
            "chunk": text.chunk and CHUNK,
            "temperature_floor": CHUNK,
            "rope_scaling": scaling and scaling.model_copy(update={"original_positions": CHUNK}),
            "dense_hidden": 2 * block,
            "experts": text.experts.model_copy(update={"hidden": block, "shared_hidden": block}),
        }
    )
    vision = spec.vision and spec.vision.model_copy(
        update={
            "layers": min(layers or spec.vision.layers, spec.vision.layers),
            "dim": 32,
            "heads": 2,
            "hidden": 64,
            "patch": 14,
            "image": 14 * 2 * spec.vision.shuffle,
            "adapter_hidden": 32,
            "adapter_out": 32,
        }
    )
    small_spec = spec.model_copy(
        update={
            "name": f"{spec.name}-twin",
            "provenance": "custom",
            "notes": (f"Random weights; {spec.name} shrunk in width for a proof of its lowering.",),
            "text": small,
            "vision": vision,
            "tokens": spec.tokens.model_copy(
                update={
                    "bos": 0,
                    "eos": (1,),
                    "pad": 2,
                    "image": 3,
                    "image_start": 4,
                    "image_end": 5,
                }
            ),
        }
    )
    scheme = spec.scheme and _scheme(spec.scheme, small_spec)
    return small_spec.model_copy(update={"scheme": scheme})


def _scheme(scheme: Scheme, spec: ModelSpec) -> Scheme:
    """`scheme` with blocks of 16 at most, and without patterns for layers that are not there.

    If that leaves none, patterns for some layers are for all.
    """
    rules = _present(scheme.rules, spec)
    if not rules:
        rules = _present([_for_all_layers(rule) for rule in scheme.rules], spec)
    return scheme.model_copy(update={"rules": tuple(rules), "block": min(scheme.block, 16)})


def _for_all_layers(rule: Rule) -> Rule:
    of = tuple(re.sub(r"layers\.\d+\.", "layers.*.", pattern) for pattern in rule.of)
    return rule.model_copy(update={"of": of})


def _present(rules: Iterable[Rule], spec: ModelSpec) -> list[Rule]:
    names, found = eligible(spec), []
    for rule in rules:
        of = tuple(each for each in rule.of if any(fnmatchcase(name, each) for name in names))
        found += [rule.model_copy(update={"of": of})] if of else []
    return found
