"""The names and shapes of all parameters.

Parameter counts, the graph and the weights all use this list.
"""

import math
from collections.abc import Iterator

from moec.spec.model import LayerSpec, ModelSpec, TextSpec, VisionSpec

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
    return {**dict(_vision(spec.vision)), "projector.weight": projector}


def _text(text: TextSpec) -> Iterator[tuple[str, Shape]]:
    yield "embed.weight", (text.vocab, text.dim)
    for layer in text.all_layers:
        yield from _layer(text, layer)
    yield "norm.weight", (text.dim,)
    if not text.tie_embeddings:
        yield "head.weight", (text.vocab, text.dim)


def _layer(text: TextSpec, layer: LayerSpec) -> Iterator[tuple[str, Shape]]:
    at = f"layers.{layer.index}"
    yield f"{at}.attn.norm.weight", (text.dim,)
    widths = {"q": text.q_width, "k": text.kv_width, "v": text.kv_width}
    for name, width in widths.items():
        yield f"{at}.attn.{name}.weight", (width, text.dim)
    yield f"{at}.attn.o.weight", (text.dim, text.q_width)
    if text.attention_bias:
        for name, width in (*widths.items(), ("o", text.dim)):
            yield f"{at}.attn.{name}.bias", (width,)
    yield f"{at}.ffn.norm.weight", (text.dim,)
    if layer.moe:
        count, hidden = text.experts.count, text.experts.hidden
        yield f"{at}.moe.router.weight", (count, text.dim)
        yield f"{at}.moe.gate_up", (count, text.dim, 2 * hidden)  # gate first, then up
        yield f"{at}.moe.down", (count, hidden, text.dim)
        yield from _swiglu(f"{at}.moe.shared", text.dim, text.experts.shared_hidden)
    else:
        yield from _swiglu(f"{at}.ffn", text.dim, text.dense_hidden)


def _swiglu(at: str, dim: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{at}.gate.weight", (hidden, dim)
    yield f"{at}.up.weight", (hidden, dim)
    yield f"{at}.down.weight", (dim, hidden)


def _vision(vision: VisionSpec) -> Iterator[tuple[str, Shape]]:
    dim = vision.dim

    def biased(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield "vision.patch.weight", (dim, vision.patch_width)
    yield "vision.class_token", (dim,)
    yield "vision.positions", (vision.side**2 + 1, dim)
    yield from biased("vision.pre", dim)
    yield from biased("vision.post", dim)
    for index in range(vision.layers):
        at = f"vision.layers.{index}"
        yield from biased(f"{at}.attn.norm", dim)
        for name in "qkvo":
            yield from biased(f"{at}.attn.{name}", dim, dim)
        yield from biased(f"{at}.mlp.norm", dim)
        yield from biased(f"{at}.mlp.fc1", vision.hidden, dim)
        yield from biased(f"{at}.mlp.fc2", dim, vision.hidden)
    yield "vision.adapter.fc1.weight", (vision.adapter_hidden, vision.shuffled_dim)
    yield "vision.adapter.fc2.weight", (vision.adapter_out, vision.adapter_hidden)


def counts(spec: ModelSpec) -> dict[str, int]:
    """Exact parameter counts.

    `active_text` counts the decoder's parameters that one token uses: all but the routed experts
    that the router did not choose. It includes the embedding and the head. `active` adds the vision
    tower and the projector.
    """
    sizes = {name: math.prod(shape) for name, shape in parameters(spec).items()}

    def total(prefix: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefix))

    vision, projector = total("vision."), total("projector.")
    routed = sum(n for name, n in sizes.items() if name.endswith((".moe.gate_up", ".moe.down")))
    text = sum(sizes.values()) - vision - projector
    experts = spec.text.experts
    idle = routed // experts.count * (experts.count - experts.top_k)
    return {
        "total": text + vision + projector,
        "text": text,
        "vision": vision,
        "projector": projector,
        "routed_experts": routed,
        "active_text": text - idle,
        "active": text - idle + vision + projector,
    }
