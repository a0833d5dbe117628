"""The reduced-size model: layers, patterns and switches as they are, but small for any machine."""

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from moec.spec.model import ALPHABETS, ModelSpec, TextSpec
from moec.spec.parts.attention import Latent
from moec.spec.parts.routing import Experts
from moec.spec.scheme import Rule, Scheme
from moec.spec.tensors import eligible

CHUNK = 8
#: the most routed experts of all layers that are all kept: a proof of more would take minutes
MOST_EXPERTS = 4096
#: the fewest experts that a layer keeps: exporters write more than 32 in another way than 32
MANY = 33
#: the fewest layers that a model keeps
LAYERS = 4


def reduced(
    spec: ModelSpec, layers: int | None = None, block: int = 16, head_dim: int = 8
) -> ModelSpec:
    """Make a reduced-size copy of `spec`, with small widths.

    The depth, the layer patterns, the number of experts, the ratio of heads to key heads and all
    switches stay. `layers` limits the depth of the decoder and of the vision tower. The decoder's
    widths are multiples of `block`, because some targets quantise weights in blocks and some
    kernels work on tiles of that size. `head_dim` is the width of one attention head.

    The attention chunk becomes 8 tokens, and every other length in tokens shrinks with it. A proof
    of a few dozen tokens then crosses several chunk borders and temperature steps. An image tile
    becomes 4 tokens.

    If the layers of `spec` have over `MOST_EXPERTS` routed experts together, a layer keeps as few
    as leave something to choose, in all groups, and without `layers` the depth becomes the least
    that has two layers of each kind.
    """
    text = spec.text
    routed = sum(layer.experts.count for layer in text.all_layers if layer.experts)
    if text.experts and routed > MOST_EXPERTS:
        text = text.model_copy(update={"experts": _fewer(text.experts)})
        layers = layers or _depth(text)
    scaling = text.rope_scaling
    patterns = {name: getattr(text, name)[: layers or text.layers] for name in ALPHABETS}
    small = text.model_copy(
        update={
            **patterns,
            "layers": min(layers or text.layers, text.layers),
            "dim": 2 * block,
            "heads": text.heads // text.kv_heads * 2,
            "kv_heads": 2,
            "head_dim": 2 * head_dim if text.latent else head_dim,
            "latent": text.latent and _latent(text.latent, block, head_dim),
            "vocab": 256,
            "max_positions": 32 * CHUNK,
            "chunk": text.chunk and CHUNK,
            "window": text.window and CHUNK,
            "temperature_floor": CHUNK if "T" in text.temperature else text.temperature_floor,
            "rope_scaling": scaling and scaling.model_copy(update={"original_positions": CHUNK}),
            "dense_hidden": text.dense_hidden and 2 * block,
            "experts": text.experts and _experts(text.experts, block),
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


def _experts(experts: Experts, block: int) -> Experts:
    """Narrow experts; several shared ones stay wider than one routed expert."""
    shared = experts.shared_hidden and block * min(2, -(-experts.shared_hidden // experts.hidden))
    return experts.model_copy(update={"hidden": block, "shared_hidden": shared})


def _depth(text: TextSpec) -> int:
    """The least depth, `LAYERS` or more, that has two layers of each kind, or all of a kind."""
    kinds = [replace(layer, index=0) for layer in text.all_layers]
    second = {at for at, kind in enumerate(kinds) if kinds[:at].count(kind) <= 1}
    return min(text.layers, max(LAYERS, 1 + max(second)))


def _fewer(experts: Experts) -> Experts:
    """As few experts as leave something to choose in each kept group, and at least `MANY`."""
    how = experts.routing
    least = max(2, -(-MANY // how.groups), experts.top_k // how.kept_groups + 1)
    return experts.model_copy(update={"count": min(experts.count, how.groups * least)})


def _latent(latent: Latent, block: int, head_dim: int) -> Latent:
    """Latent attention whose keys and values have different widths, as in `latent`."""
    return Latent(
        q_rank=latent.q_rank and block,
        kv_rank=block,
        nope=head_dim,
        rope=head_dim,
        value=head_dim if latent.value == latent.nope else head_dim // 2,
        norm_eps=latent.norm_eps,
    )


def _scheme(scheme: Scheme, spec: ModelSpec) -> Scheme:
    """`scheme` for the reduced-size `spec`.

    Blocks become 16 at most. Patterns that match no layer of `spec` are dropped. If no scheme rule
    is left, the patterns of single layers are widened to all layers.
    """
    rules = matching(scheme.rules, spec)
    if not rules:
        rules = matching([_for_all_layers(rule) for rule in scheme.rules], spec)
    return scheme.model_copy(update={"rules": tuple(rules), "block": min(scheme.block, 16)})


def _for_all_layers(rule: Rule) -> Rule:
    of = tuple(re.sub(r"layers\.\d+\.", "layers.*.", pattern) for pattern in rule.of)
    return rule.model_copy(update={"of": of})


def matching(rules: Iterable[Rule], spec: ModelSpec) -> list[Rule]:
    """The scheme rules with only those patterns that match a weight of `spec`."""
    names, found = eligible(spec), []
    for rule in rules:
        of = tuple(each for each in rule.of if any(fnmatchcase(name, each) for name in names))
        found += [rule.model_copy(update={"of": of})] if of else []
    return found
