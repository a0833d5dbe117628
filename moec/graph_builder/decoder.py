"""The text decoder: embedding, layers and head. One graph serves prefill and decode.

Inputs
    input_ids      int64 [batch, sequence]   tokens of each sequence, then padding on the right
    past_lengths   int64 [batch]             tokens of each sequence that are in the caches
    lengths        int64 [batch]             tokens of each sequence in this call, without padding
    logit_index    int64 [batch, logits]     the tokens of this call that get logits
    past.{i}.key, past.{i}.value             caches, [batch, slots, kv_heads * head_dim]; or with
    past.{i}.latent                          latent attention, [batch, slots, kv_rank + rope]
    image_features [image_tokens, dim]       output of the vision tower, one row for each image
                                             token of this call, sequence by sequence; optional;
                                             only models with a vision tower have this input
    hidden         [batch, sequence, dim]    only the layer of multi-token prediction has it: the
                                             decoder's values of the tokens before `input_ids`
Outputs
    logits         float32 [batch, logits, vocab]
    present.{i}.key, ...                     the caches after this call
    hidden         [batch, sequence, dim]    what the head takes, of all tokens; only models whose
                                             layer of multi-token prediction is built
"""

from dataclasses import dataclass

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.graph_builder.latent import latent_attention
from moec.graph_builder.roles import Place, Role
from moec.spec import names
from moec.spec.model import LayerSpec, ModelSpec, QkNorm, TextSpec
from moec.spec.mtp.layer import MtpText
from moec.spec.parameters import text_parameters
from moec.spec.parts.routing import Experts
from moec.spec.tensors import quantized, tensors
from moec.weights.view import TORCH_DTYPES

#: part of a weight's name -> role of the product with it
_PRODUCTS = {
    "q": Role.QUERY,
    "q_down": Role.QUERY_DOWN,
    "q_up": Role.QUERY,
    "kv_down": Role.LATENT,
    "k": Role.KEY,
    "v": Role.VALUE,
    "o": Role.ATTENTION_OUT,
    "gate": Role.GATE,
    "up": Role.UP,
    "down": Role.DOWN,
}


@dataclass(frozen=True, slots=True)
class _Shared:
    """The nodes that all layers use. Masks and indices are made once for each kind of cache."""

    ids: fx.Node
    rope: tuple[fx.Node, fx.Node] | None
    temperature: fx.Node | None
    masks: dict[int | None, fx.Node]  # by how many tokens a layer's cache keeps
    indices: dict[int | None, fx.Node]


def build_decoder(spec: ModelSpec, precision: str = "fp32") -> fx.GraphModule:
    """Build the decoder of `spec`, or its layer of multi-token prediction, to run in `precision`.

    Weights are on the meta device, in the dtype in which they are stored.
    """
    text = spec.text
    b = Builder(_weights(spec), spec.stored)
    ids = b.input(names.INPUT_IDS, ("batch", "sequence"), torch.int64)
    past = b.input(names.PAST_LENGTHS, ("batch",), torch.int64)
    new = b.input(names.LENGTHS, ("batch",), torch.int64)
    logit_index = b.input(names.LOGIT_INDEX, ("batch", "logits"), torch.int64)
    caches = [
        tuple(
            b.input(
                names.past(layer.index, each.kind),
                ("batch", names.slots(names.cache_kind(each.kept)), each.width),
                TORCH_DTYPES[precision],
            )
            for each in layer.caches
        )
        for layer in text.all_layers
    ]
    shared = _shared(b, text, ids, past, new, [first for first, *_ in caches])

    x = b.emit(
        ops.embedding,
        ids,
        b.parameter(names.EMBED_WEIGHT),
        precision,
        name=names.EMBED,
        place=Place(Role.EMBEDDING),
    )
    if spec.vision:
        none = torch.zeros(0, text.dim, dtype=TORCH_DTYPES[precision])
        features = b.input(
            names.IMAGE_FEATURES, ("image_tokens", text.dim), none.dtype, default=none
        )
        x = b.emit(ops.fuse, x, ids, features, spec.tokens.image, name=names.WITH_IMAGES)
    if isinstance(text, MtpText):
        x = _with_hidden(b, text, x, TORCH_DTYPES[precision])
    outputs: dict[str, fx.Node] = {}
    for layer, cache in zip(text.all_layers, caches, strict=True):
        x, kept = _layer(b, text, layer, shared, x, cache)
        outputs |= {names.present(layer.index, kind): node for kind, node in kept.items()}

    x = b.emit(ops.unpack, x, ids, name="rows")
    norm = names.NORM_WEIGHT
    if isinstance(text, MtpText):
        norm = names.mtp(text.after, "norm", "weight")
    how = (b.parameter(norm), text.norm_eps)
    if text.mtp == "built":
        x = outputs[names.HIDDEN] = b.emit(ops.rms_norm, x, *how, name=names.HIDDEN)
        x = b.emit(ops.select, x, logit_index, name="norm")
    else:
        x = b.emit(ops.select, x, logit_index, name="selected")
        x = b.emit(ops.rms_norm, x, *how, name="norm")
    head = b.parameter(names.EMBED_WEIGHT if text.tie_embeddings else names.HEAD_WEIGHT)
    x = b.emit(ops.linear, x, head, None, name="head", place=Place(Role.HEAD))
    if precision != "fp32":
        x = b.emit(ops.to_float32, x, name="head.float32")
    x = b.emit(ops.unpack, x, logit_index, name=names.LOGITS)
    return b.output({names.LOGITS: x, **outputs})


def _with_hidden(b: Builder, text: MtpText, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What the layer of multi-token prediction takes: embeddings x joined with hidden values."""
    hidden = b.input(names.HIDDEN, ("batch", "sequence", text.dim), dtype)
    both = {"embed": x, "hidden": b.emit(ops.pack, hidden, name=f"{names.HIDDEN}.packed")}
    normed = [
        _norm(b, text, names.mtp(text.after, part, "norm"), each) for part, each in both.items()
    ]
    at = names.mtp(text.after, "join")
    x = b.emit(ops.join_parts, *normed, 1, name=f"{at}.both")
    weight, place = b.parameter(f"{at}.weight"), Place(Role.JOIN)
    return b.emit(ops.linear, x, weight, None, name=at, place=place)


def _weights(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of the decoder's weights before quantisation, and with wide experts as stored."""
    found = text_parameters(spec)
    if spec.separate_experts:
        rules, kinds = quantized(spec), tensors(spec)
        found = {name: shape for name, shape in found.items() if name in kinds or name in rules}
        wide = {name: kind.shape for name, kind in kinds.items() if kind.dtype in TORCH_DTYPES}
        found |= {name: shape for name, shape in wide.items() if names.holds_routed(name)}
        for layer in spec.text.all_layers:
            both = names.routed(layer.index)
            if layer.moe and len(set(both) & rules.keys()) == 1:  # all of its experts are apart
                for name in set(both) & rules.keys():
                    count, inner, outer = found.pop(name)
                    each = [names.separate(name, expert) for expert in range(count)]
                    shape = (outer // len(each[0]), inner)
                    found |= {part: shape for parts in each for part in parts}
    return found


def _shared(
    b: Builder, text: TextSpec, ids: fx.Node, past: fx.Node, new: fx.Node, keys: list[fx.Node]
) -> _Shared:
    layers = text.all_layers
    positions = b.emit(ops.positions, ids, past, name="positions")
    scaling = text.rope_scaling
    rope = temperature = None
    if any(layer.rope for layer in layers):
        how = (scaling.kind, scaling.numbers, scaling.magnitude) if scaling else ("none", [], 1.0)
        table = (text.rope_dim, text.rope_theta, *how)
        places = (Place(Role.ROPE_COS), Place(Role.ROPE_SIN))
        rope = b.emit_pair(ops.rope_table, positions, *table, name="rope", places=places)
    if any(layer.temperature for layer in layers):
        temperature = b.emit(
            ops.temperature,
            positions,
            text.temperature_floor,
            text.temperature_scale,
            name="temperature",
            place=Place(Role.TEMPERATURE),
        )
    masks, indices = {}, {}
    for layer, key in zip(layers, keys, strict=True):
        if layer.kept not in masks:
            at = names.cache_kind(layer.kept)
            held = b.emit(ops.key_positions, key, past, positions, name=f"{at}.key_positions")
            span = (layer.chunk, layer.window)
            masks[layer.kept] = b.emit(
                ops.attention_mask, positions, held, *span, name=f"{at}.mask"
            )
            indices[layer.kept] = b.emit(ops.cache_index, key, past, new, name=f"{at}.index")
    return _Shared(ids, rope, temperature, masks, indices)


def _layer(
    b: Builder,
    text: TextSpec,
    layer: LayerSpec,
    shared: _Shared,
    x: fx.Node,
    cache: tuple[fx.Node, ...],
) -> tuple[fx.Node, dict[str, fx.Node]]:
    i = layer.index
    h = _norm(b, text, names.attention(i, "norm"), x)
    h, kept = _attention(b, text, layer, shared, h, cache)
    x = b.emit(ops.add, x, h, name=names.attention(i, "residual"))
    h = _norm(b, text, names.dense(i, "norm"), x)
    h = _moe(b, layer.experts, i, h) if layer.experts else _swiglu(b, i, names.dense(i), h)
    return b.emit(ops.add, x, h, name=names.out(i)), kept


def _norm(b: Builder, text: TextSpec, name: str, x: fx.Node) -> fx.Node:
    return b.emit(ops.rms_norm, x, b.parameter(f"{name}.weight"), text.norm_eps, name=name)


def _attention(
    b: Builder,
    text: TextSpec,
    layer: LayerSpec,
    shared: _Shared,
    x: fx.Node,
    cache: tuple[fx.Node, ...],
) -> tuple[fx.Node, dict[str, fx.Node]]:
    i, at = layer.index, names.attention(layer.index)

    def project(x: fx.Node, part: str) -> fx.Node:
        weight = b.parameter(names.attention(i, part, "weight"))
        bias = names.attention(i, part, "bias") if text.attention_bias else ""
        bias_node = b.parameter(bias) if b.knows(bias) else None
        place = Place(_PRODUCTS[part], i)
        return b.emit(ops.linear, x, weight, bias_node, name=f"{at}.{part}", place=place)

    if text.latent:
        assert shared.rope is not None
        at_hand = (shared.ids, shared.rope, shared.masks[layer.kept], shared.indices[layer.kept])
        out, kept = latent_attention(b, text, layer, project, x, cache[0], *at_hand)
        return project(b.emit(ops.pack, out, name=f"{at}.mix.packed"), "o"), kept
    heads = {"q": text.heads, "k": text.kv_heads}
    rows = {
        part: b.emit(ops.unpack, project(x, part), shared.ids, name=f"{at}.{part}.rows")
        for part in ("q", "k", "v")
    }

    def normed(part: str, how: QkNorm) -> fx.Node:
        weight = b.parameter(names.attention(i, part, "norm", "weight")) if how.weighted else None
        count = 1 if how.whole else heads[part]
        name = f"{at}.{part}.norm"
        return b.emit(ops.head_norm, rows[part], weight, count, text.norm_eps, name=name)

    if layer.qk_norm and layer.qk_norm.before_rope:
        rows |= {part: normed(part, layer.qk_norm) for part in heads}
    if text.clip_qkv:
        for part, x in rows.items():
            rows[part] = b.emit(ops.clip, x, text.clip_qkv, name=f"{at}.{part}.clip")
    if layer.rope:
        assert shared.rope is not None
        for part, n in heads.items():
            how = (*shared.rope, n, text.rope_pairs)
            rows[part] = b.emit(ops.rope, rows[part], *how, name=f"{at}.{part}.rope")
    if layer.qk_norm and not layer.qk_norm.before_rope:
        rows |= {part: normed(part, layer.qk_norm) for part in heads}
    if layer.temperature:
        rows["q"] = b.emit(
            ops.scale_queries, rows["q"], shared.temperature, name=f"{at}.q.temperature"
        )
    index = shared.indices[layer.kept]
    seen, kept = {}, {}
    for kind, part, role, past in zip(
        names.CACHED, "kv", (Role.KEYS, Role.VALUES), cache, strict=True
    ):
        name = f"{at}.{part}.seen"
        seen[part] = b.emit(ops.cache_append, past, rows[part], name=name, place=Place(role, i))
        kept[kind] = b.emit(ops.cache_write, seen[part], index, name=names.present(i, kind))
    out = b.emit(
        ops.attention,
        rows["q"],
        seen["k"],
        seen["v"],
        shared.masks[layer.kept],
        text.heads,
        text.kv_heads,
        None,
        name=f"{at}.mix",
        place=Place(Role.ATTENTION, i),
    )
    return project(b.emit(ops.pack, out, name=f"{at}.mix.packed"), "o"), kept


def _moe(b: Builder, each: Experts, i: int, x: fx.Node) -> fx.Node:
    weight = b.parameter(names.moe(i, "router", "weight"))
    place = Place(Role.ROUTER, i)
    logits = b.emit(ops.linear, x, weight, None, name=names.router(i), place=place)
    how = each.routing
    ranks = logits
    if how.choice == "scores":
        bias = b.parameter(names.moe(i, "router", "bias")) if how.bias else None
        by = (bias, how.score, how.groups, how.kept_groups)
        ranks = b.emit(ops.ranks, logits, *by, name=names.ranks(i))
    scores, experts = b.emit_pair(
        ops.route,
        logits,
        ranks,
        each.top_k,
        how.score,
        how.normalise,
        how.factor,
        name=names.moe(i, "route"),
        places=(Place(Role.SCORES, i), Place(Role.CHOICE, i)),
    )
    if all(map(b.knows, names.routed(i))):
        op, weights = ops.moe, [b.parameter(name) for name in names.routed(i)]
    else:
        op, weights = ops.separate_moe, [b.experts(name, each.count) for name in names.routed(i)]
    routed = (x, scores, experts, how.weighed, *weights)
    name, place = names.moe(i, "routed"), Place(Role.EXPERTS, i)
    if each.shared_hidden is None:
        return b.emit(op, *routed, name=name, place=place)
    out, shared = b.emit(op, *routed, name=name), _swiglu(b, i, names.shared(i), x)
    return b.emit(ops.add, shared, out, name=names.moe(i, "out"), place=place)


def _swiglu(b: Builder, i: int, at: str, x: fx.Node) -> fx.Node:
    def project(x: fx.Node, part: str) -> fx.Node:
        weight = b.parameter(f"{at}.{part}.weight")
        place = Place(_PRODUCTS[part], i)
        return b.emit(ops.linear, x, weight, None, name=f"{at}.{part}", place=place)

    act = b.emit(ops.swiglu, project(x, "gate"), project(x, "up"), name=f"{at}.act")
    return project(act, "down")
