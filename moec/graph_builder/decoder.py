"""The text decoder: embedding, interleaved layers, head; one graph for prefill and decode.

Inputs
    input_ids      int64 [batch, sequence]   a row's own tokens first, padding on the right
    past_lengths   int64 [batch]             tokens that each row has in the caches
    lengths        int64 [batch]             tokens of this call that are the row's own
    logit_index    int64 [batch, logits]     which tokens of this call get logits
    past.{i}.key, past.{i}.value             caches, [batch, slots, kv_heads * head_dim]
    image_features [image_tokens, dim]       of the vision tower, one for each image token of this
                                             call, row by row; may be left out; only with a tower
Outputs
    logits         float32 [batch, logits, vocab]
    present.{i}.key, present.{i}.value       the caches after this call
"""

from dataclasses import dataclass

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.spec.model import LayerSpec, ModelSpec, TextSpec
from moec.spec.parameters import text_parameters
from moec.weights.view import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the layers have in common: made once for each kind of cache."""

    ids: fx.Node
    rope: tuple[fx.Node, fx.Node] | None
    temperature: fx.Node | None
    masks: dict[int | None, fx.Node]  # by chunk
    indices: dict[int | None, fx.Node]


def build_decoder(spec: ModelSpec, precision: str = "fp32") -> fx.GraphModule:
    """The decoder of `spec`, computing in `precision`, weights on meta in their stored dtype."""
    text = spec.text
    b = Builder(text_parameters(spec), TORCH_DTYPES[spec.dtype])
    ids = b.input("input_ids", ("batch", "sequence"), torch.int64)
    past = b.input("past_lengths", ("batch",), torch.int64)
    new = b.input("lengths", ("batch",), torch.int64)
    logit_index = b.input("logit_index", ("batch", "logits"), torch.int64)
    caches = [
        tuple(
            b.input(
                f"past.{layer.index}.{kind}",
                ("batch", slots_name(layer), text.kv_width),
                TORCH_DTYPES[precision],
            )
            for kind in ("key", "value")
        )
        for layer in text.all_layers
    ]
    shared = _shared(b, text, ids, past, new, [key for key, _ in caches])

    x = b.emit(ops.embedding, ids, b.parameter("embed.weight"), precision, name="embed")
    if spec.vision:
        none = torch.zeros(0, text.dim, dtype=TORCH_DTYPES[precision])
        features = b.input("image_features", ("image_tokens", text.dim), none.dtype, default=none)
        x = b.emit(ops.fuse, x, ids, features, spec.tokens.image, name="fused")
    outputs: dict[str, fx.Node] = {}
    for layer, cache in zip(text.all_layers, caches, strict=True):
        x, kept = _layer(b, text, layer, shared, x, cache)
        outputs |= {f"present.{layer.index}.{kind}": node for kind, node in kept.items()}

    x = b.emit(ops.unpack, x, ids, name="rows")
    x = b.emit(ops.select, x, logit_index, name="selected")
    x = b.emit(ops.rms_norm, x, b.parameter("norm.weight"), text.norm_eps, name="norm")
    head = "embed.weight" if text.tie_embeddings else "head.weight"
    x = b.emit(ops.linear, x, b.parameter(head), None, name="head")
    if precision != "fp32":
        x = b.emit(ops.to_float32, x, name="head.float32")
    x = b.emit(ops.unpack, x, logit_index, name="logits")
    return b.output({"logits": x, **outputs})


def slots_name(layer: LayerSpec) -> str:
    """The symbol for a layer's cache slots: rings if chunked, all positions if global."""
    return "global_slots" if layer.chunk is None else "ring_slots"


def _shared(
    b: Builder, text: TextSpec, ids: fx.Node, past: fx.Node, new: fx.Node, keys: list[fx.Node]
) -> _Shared:
    layers = text.all_layers
    positions = b.emit(ops.positions, ids, past, name="positions")
    scaling = text.rope_scaling
    rope = temperature = None
    if any(layer.rope for layer in layers):
        factors = (
            [scaling.factor, scaling.low, scaling.high, float(scaling.original_positions)]
            if scaling
            else []
        )
        rope = b.emit_pair(
            ops.rope_table, positions, text.head_dim, text.rope_theta, factors, name="rope"
        )
    if any(layer.temperature for layer in layers):
        temperature = b.emit(
            ops.temperature,
            positions,
            text.temperature_floor,
            text.temperature_scale,
            name="temperature",
        )
    masks, indices = {}, {}
    for layer, key in zip(layers, keys, strict=True):
        if layer.chunk not in masks:
            at = "global" if layer.chunk is None else "ring"
            held = b.emit(ops.key_positions, key, past, positions, name=f"{at}.key_positions")
            masks[layer.chunk] = b.emit(
                ops.attention_mask, positions, held, layer.chunk, name=f"{at}.mask"
            )
            indices[layer.chunk] = b.emit(ops.cache_index, key, past, new, name=f"{at}.index")
    return _Shared(ids, rope, temperature, masks, indices)


def _layer(
    b: Builder,
    text: TextSpec,
    layer: LayerSpec,
    shared: _Shared,
    x: fx.Node,
    cache: tuple[fx.Node, ...],
) -> tuple[fx.Node, dict[str, fx.Node]]:
    at = f"layers.{layer.index}"
    norm = b.parameter(f"{at}.attn.norm.weight")
    h = b.emit(ops.rms_norm, x, norm, text.norm_eps, name=f"{at}.attn.norm")
    h, kept = _attention(b, text, layer, shared, h, cache)
    x = b.emit(ops.add, x, h, name=f"{at}.attn.residual")
    norm = b.parameter(f"{at}.ffn.norm.weight")
    h = b.emit(ops.rms_norm, x, norm, text.norm_eps, name=f"{at}.ffn.norm")
    h = _moe(b, text, f"{at}.moe", h) if layer.moe else _swiglu(b, f"{at}.ffn", h)
    return b.emit(ops.add, x, h, name=f"{at}.out"), kept


def _attention(
    b: Builder,
    text: TextSpec,
    layer: LayerSpec,
    shared: _Shared,
    x: fx.Node,
    cache: tuple[fx.Node, ...],
) -> tuple[fx.Node, dict[str, fx.Node]]:
    at = f"layers.{layer.index}.attn"

    def project(x: fx.Node, part: str) -> fx.Node:
        bias = b.parameter(f"{at}.{part}.bias") if text.attention_bias else None
        return b.emit(ops.linear, x, b.parameter(f"{at}.{part}.weight"), bias, name=f"{at}.{part}")

    heads = {"q": text.heads, "k": text.kv_heads}
    rows = {
        part: b.emit(ops.unpack, project(x, part), shared.ids, name=f"{at}.{part}.rows")
        for part in ("q", "k", "v")
    }
    if layer.rope:
        assert shared.rope is not None
        for part, n in heads.items():
            rows[part] = b.emit(ops.rope, rows[part], *shared.rope, n, name=f"{at}.{part}.rope")
    if layer.qk_norm:
        for part, n in heads.items():
            rows[part] = b.emit(
                ops.head_norm, rows[part], n, text.norm_eps, name=f"{at}.{part}.norm"
            )
    if layer.temperature:
        rows["q"] = b.emit(
            ops.scale_queries, rows["q"], shared.temperature, name=f"{at}.q.temperature"
        )
    index = shared.indices[layer.chunk]
    seen, kept = {}, {}
    for kind, part, past in (("key", "k", cache[0]), ("value", "v", cache[1])):
        seen[part] = b.emit(ops.cache_append, past, rows[part], name=f"{at}.{part}.seen")
        kept[kind] = b.emit(
            ops.cache_write, seen[part], index, name=f"present.{layer.index}.{kind}"
        )
    out = b.emit(
        ops.attention,
        rows["q"],
        seen["k"],
        seen["v"],
        shared.masks[layer.chunk],
        text.heads,
        text.kv_heads,
        name=f"{at}.mix",
    )
    return project(b.emit(ops.pack, out, name=f"{at}.mix.packed"), "o"), kept


def _moe(b: Builder, text: TextSpec, at: str, x: fx.Node) -> fx.Node:
    router = b.parameter(f"{at}.router.weight")
    logits = b.emit(ops.linear, x, router, None, name=f"{at}.router")
    scores, experts = b.emit_pair(ops.route, logits, text.experts.top_k, name=f"{at}.route")
    gate_up, down = b.parameter(f"{at}.gate_up"), b.parameter(f"{at}.down")
    routed = b.emit(ops.moe, x, scores, experts, gate_up, down, name=f"{at}.routed")
    return b.emit(ops.add, _swiglu(b, f"{at}.shared", x), routed, name=f"{at}.out")


def _swiglu(b: Builder, at: str, x: fx.Node) -> fx.Node:
    gate, up = (
        b.emit(ops.linear, x, b.parameter(f"{at}.{part}.weight"), None, name=f"{at}.{part}")
        for part in ("gate", "up")
    )
    act = b.emit(ops.swiglu, gate, up, name=f"{at}.act")
    return b.emit(ops.linear, act, b.parameter(f"{at}.down.weight"), None, name=f"{at}.down")
