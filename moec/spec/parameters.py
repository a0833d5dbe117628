"""The names and shapes of all parameters.

Parameter counts, the graph and the weights all use this list.
"""

import math
from collections.abc import Iterator

from moec.spec import names
from moec.spec.model import LayerSpec, ModelSpec, TextSpec
from moec.spec.mtp.layer import MtpText, mtp_text
from moec.spec.parts.attention import Latent
from moec.spec.parts.vision import VisionSpec

Shape = tuple[int, ...]


def parameters(spec: ModelSpec) -> dict[str, Shape]:
    """The shapes of all parameters of `spec`, by name.

    A linear weight is [out, in]. A stacked expert weight, which holds all experts of a layer, is
    [expert, in, out].
    """
    return text_parameters(spec) | vision_parameters(spec)


def text_parameters(spec: ModelSpec) -> dict[str, Shape]:
    """The shapes of the decoder's parameters, with those of the embedding and the head."""
    return dict(_text(spec.text))


def vision_parameters(spec: ModelSpec) -> dict[str, Shape]:
    """The shapes of the parameters of vision tower, adapter and projector.

    The dict is empty for a model without a vision tower.
    """
    if spec.vision is None:
        return {}
    projector = (spec.text.dim, spec.vision.adapter_out)
    return {**dict(_vision(spec.vision)), names.PROJECTOR_WEIGHT: projector}


def _text(text: TextSpec) -> Iterator[tuple[str, Shape]]:
    yield names.EMBED_WEIGHT, (text.vocab, text.dim)
    for layer in text.all_layers:
        yield from _layer(text, layer)
    if isinstance(text, MtpText):
        yield from _mtp(text)
    else:
        yield names.NORM_WEIGHT, (text.dim,)
    if text.mtp == "built":
        alone = mtp_text(text)
        yield from _layer(alone, alone.layer(alone.after))
        yield from _mtp(alone)
    if not text.tie_embeddings:
        yield names.HEAD_WEIGHT, (text.vocab, text.dim)


def _layer(text: TextSpec, layer: LayerSpec) -> Iterator[tuple[str, Shape]]:
    i = layer.index
    yield names.attention(i, "norm", "weight"), (text.dim,)
    yield from (_latent(text, text.latent, i) if text.latent else _heads(text, i))
    if layer.qk_norm and layer.qk_norm.weighted:
        for part, width in (("q", text.q_width), ("k", text.kv_width)):
            width = width if layer.qk_norm.whole else text.head_dim
            yield names.attention(i, part, "norm", "weight"), (width,)
    yield names.dense(i, "norm", "weight"), (text.dim,)
    if layer.experts:
        count, hidden = layer.experts.count, layer.experts.hidden
        gate_up, down = names.routed(i)
        yield names.moe(i, "router", "weight"), (count, text.dim)
        yield gate_up, (count, text.dim, 2 * hidden)  # gate first, then up
        yield down, (count, hidden, text.dim)
        if layer.experts.routing.bias:
            yield names.moe(i, "router", "bias"), (count,)
        if layer.experts.shared_hidden:
            yield from _swiglu(names.shared(i), text.dim, layer.experts.shared_hidden)
    elif text.dense_hidden:
        yield from _swiglu(names.dense(i), text.dim, text.dense_hidden)


def _mtp(text: MtpText) -> Iterator[tuple[str, Shape]]:
    """What is in front of the layer of multi-token prediction, and the norm behind it."""
    for part in ("embed.norm", "hidden.norm", "norm"):
        yield names.mtp(text.after, part, "weight"), (text.dim,)
    yield names.mtp(text.after, "join", "weight"), (text.dim, 2 * text.dim)


def _heads(text: TextSpec, i: int) -> Iterator[tuple[str, Shape]]:
    """Attention whose keys and values are products with the token."""
    widths = {"q": text.q_width, "k": text.kv_width, "v": text.kv_width}
    for part, width in widths.items():
        yield names.attention(i, part, "weight"), (width, text.dim)
    yield names.attention(i, "o", "weight"), (text.dim, text.q_width)
    if text.attention_bias:
        for part, width in (*widths.items(), ("o", text.dim)):
            yield names.attention(i, part, "bias"), (width,)


def _latent(text: TextSpec, latent: Latent, i: int) -> Iterator[tuple[str, Shape]]:
    """Multi-head latent attention."""
    down = {"kv_down": (latent.kv_rank + latent.rope, latent.kv_rank)}
    if latent.q_rank:
        down["q_down"] = (latent.q_rank, latent.q_rank)
    for part, (width, rank) in down.items():
        yield names.attention(i, part, "weight"), (width, text.dim)
        yield names.attention(i, part, "norm", "weight"), (rank,)
    query = ("q_up", latent.q_rank) if latent.q_rank else ("q", text.dim)
    yield names.attention(i, query[0], "weight"), (text.q_width, query[1])
    up = text.heads * (latent.nope + latent.value)
    yield names.attention(i, "kv_up", "weight"), (up, latent.kv_rank)
    yield names.attention(i, "o", "weight"), (text.dim, text.mixed_width)
    if text.attention_bias:
        for part, width in (*((part, width) for part, (width, _) in down.items()), ("o", text.dim)):
            yield names.attention(i, part, "bias"), (width,)


def _swiglu(at: str, dim: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{at}.gate.weight", (hidden, dim)
    yield f"{at}.up.weight", (hidden, dim)
    yield f"{at}.down.weight", (dim, hidden)


def _vision(vision: VisionSpec) -> Iterator[tuple[str, Shape]]:
    dim = vision.dim

    def biased(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield names.PATCH_WEIGHT, (dim, vision.patch_width)
    yield names.CLASS_TOKEN, (dim,)
    yield names.POSITIONS, (vision.side**2 + 1, dim)
    yield from biased(names.vision("pre"), dim)
    yield from biased(names.vision("post"), dim)
    for index in range(vision.layers):
        yield from biased(names.vision_layer(index, "attn", "norm"), dim)
        for part in "qkvo":
            yield from biased(names.vision_layer(index, "attn", part), dim, dim)
        yield from biased(names.vision_layer(index, "mlp", "norm"), dim)
        yield from biased(names.vision_layer(index, "mlp", "fc1"), vision.hidden, dim)
        yield from biased(names.vision_layer(index, "mlp", "fc2"), dim, vision.hidden)
    adapter = {
        "fc1": (vision.adapter_hidden, vision.shuffled_dim),
        "fc2": (vision.adapter_out, vision.adapter_hidden),
    }
    for part, shape in adapter.items():
        yield names.vision("adapter", part, "weight"), shape


def counts(spec: ModelSpec) -> dict[str, int]:
    """Exact parameter counts.

    `active_text` counts the decoder's parameters that one token uses: all but the routed experts
    that the router did not choose. It includes the embedding and the head, and not the layer of
    multi-token prediction. `active` adds the vision tower and the projector.
    """
    sizes = {name: math.prod(shape) for name, shape in parameters(spec).items()}
    vision = sum(size for name, size in sizes.items() if names.of_vision(name))
    projector = sizes.get(names.PROJECTOR_WEIGHT, 0)
    routed = sum(size for name, size in sizes.items() if names.is_routed(name))
    text = sum(sizes.values()) - vision - projector
    experts, decoder = spec.text.experts, dict(_text(spec.text.model_copy(update={"mtp": "none"})))
    chosen = sum(sizes[name] for name in decoder if names.is_routed(name))
    idle = chosen // experts.count * (experts.count - experts.top_k) if experts else 0
    active = sum(sizes[name] for name in decoder) - idle
    return {
        "total": text + vision + projector,
        "text": text,
        "vision": vision,
        "projector": projector,
        "routed_experts": routed,
        "active_text": active,
        "active": active + vision + projector,
    }
