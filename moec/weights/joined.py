"""Joined weights: which stored tensors, one after the other, are the bytes of which tensor.

    fused tensor                    pieces
    layers.{i}.attn.qkv.weight      q, k, v                               [Q + 2 KV, D]
    layers.{i}.ffn.gate_up.weight   gate, up                              [2F, D]
    layers.{i}.moe.gate_up          all experts, shared gate, shared up   [E + 1, 2F, D]
    layers.{i}.moe.down             all experts, shared down              [E + 1, D, F]

Experts are stored [expert, out, in], so rows of all of these are outputs, and joining is writing
one behind the other. The scales of a joined weight are joined likewise. All else is itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import Shape, parameters, text_parameters, vision_parameters
from moec.spec.tensors import scale_of
from moec.weights.packing import Packing


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor of `shape` and `dtype`, our name of it; `pieces` are parameters, or their scales."""

    shape: Shape
    dtype: str
    pieces: tuple[str, ...]


def fused_tensors(spec: ModelSpec, wide: str = "bf16", part: str = "model") -> dict[str, Fused]:
    """Every tensor of a part of `spec`, by name; what is not FP8 is `wide`."""
    if part == "vision":
        return {name: Fused(s, wide, (name,)) for name, s in vision_parameters(spec).items()}
    narrow = fp8_pieces(spec)
    found = {
        name: Fused(shape, wide, (name,))
        for name, shape in text_parameters(spec).items()
        if name not in narrow
    }
    for name, shape, pieces in _joined(spec.text):
        found[name] = Fused(shape, "fp8", pieces)
        found[scale_of(name)] = Fused(shape[:-1], "fp32", tuple(map(scale_of, pieces)))
    return found


def fp8_pieces(spec: ModelSpec) -> set[str]:
    """The parameters that are FP8: products of the layers, all but the routers'."""
    return {piece for _, _, pieces in _joined(spec.text) for piece in pieces}


def fused_packings(spec: ModelSpec, wide: str = "bf16") -> dict[str, Packing]:
    """How weights of `spec` are stored, by the name of the first tensor of each."""
    narrow, found = fp8_pieces(spec), dict[str, Packing]()
    for name, shape in parameters(spec).items():
        if name in narrow:
            how = {"arrange": "transpose" if len(shape) == 3 else "rows", "fp8": "channel"}
            packing = Packing.model_validate({"source": name, "dtype": "fp32", **how})
        else:
            packing = Packing.model_validate({"source": name, "dtype": wide})
        found[packing.names(spec.dtype)[0]] = packing
    return found


def widened(spec: ModelSpec, wide: str) -> ModelSpec:
    """`spec` without its scheme, all weights `wide`."""
    return spec.model_copy(update={"scheme": None, "dtype": wide})


def _joined(text: TextSpec) -> Iterator[tuple[str, Shape, tuple[str, ...]]]:
    """Every FP8 tensor [..., out, in], and the parameters that it is joined from."""
    dim, hidden = text.dim, text.experts.hidden
    count = text.experts.count + 1
    for layer in text.all_layers:
        at = f"layers.{layer.index}"
        qkv = tuple(f"{at}.attn.{part}.weight" for part in "qkv")
        yield f"{at}.attn.qkv.weight", (text.q_width + 2 * text.kv_width, dim), qkv
        yield f"{at}.attn.o.weight", (dim, text.q_width), (f"{at}.attn.o.weight",)
        ffn = f"{at}.moe.shared" if layer.moe else f"{at}.ffn"
        gate_up, down = (f"{ffn}.gate.weight", f"{ffn}.up.weight"), (f"{ffn}.down.weight",)
        if layer.moe:
            moe = f"{at}.moe.gate_up", f"{at}.moe.down"
            yield moe[0], (count, 2 * hidden, dim), (moe[0], *gate_up)
            yield moe[1], (count, dim, hidden), (moe[1], *down)
        else:
            yield f"{ffn}.gate_up.weight", (2 * text.dense_hidden, dim), gate_up
            yield f"{ffn}.down.weight", (dim, text.dense_hidden), down
