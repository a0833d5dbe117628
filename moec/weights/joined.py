"""Joined weights: tensors of a graph whose bytes are several stored tensors, one after another.

    joined tensor                   stored tensors
    layers.{i}.attn.qkv.weight      q, k, v                               [Q + 2 KV, D]
    layers.{i}.ffn.gate_up.weight   gate, up                              [2F, D]
    layers.{i}.moe.gate_up          all experts, shared gate, shared up   [E + 1, 2F, D]
    layers.{i}.moe.down             all experts, shared down              [E + 1, D, F]

Experts are stored as [expert, out, in]. The rows of all these tensors are therefore outputs, so
that writing one tensor after another joins them. The scales of a joined weight are joined in the
same way. Every other tensor is a stored tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moec.spec import names
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import Shape, parameters, text_parameters, vision_parameters
from moec.weights.packing import Packing


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of a graph. Its bytes are those of the stored tensors `sources`, in this order.

    `sources` names parameters or scales; `dtype` is "fp8" or a `DType`.
    """

    shape: Shape
    dtype: str
    sources: tuple[str, ...]


def joined_tensors(spec: ModelSpec, dtype: str = "bf16", part: str = "model") -> dict[str, Joined]:
    """Every tensor of a part of `spec`, by name.

    `part` is "model" (the decoder) or "vision" (the tower). Tensors that are not FP8 have the type
    `dtype`.
    """
    if part == "vision":
        return {name: Joined(s, dtype, (name,)) for name, s in vision_parameters(spec).items()}
    in_fp8 = fp8_parameters(spec)
    found = {
        name: Joined(shape, dtype, (name,))
        for name, shape in text_parameters(spec).items()
        if name not in in_fp8
    }
    for name, shape, sources in _joined(spec.text):
        found[name] = Joined(shape, "fp8", sources)
        scales = tuple(map(names.scale_of, sources))
        found[names.scale_of(name)] = Joined(shape[:-1], "fp32", scales)
    return found


def fp8_parameters(spec: ModelSpec) -> set[str]:
    """The parameters that target `torch` keeps in FP8: all matrices of the layers but routers."""
    return {source for _, _, sources in _joined(spec.text) for source in sources}


def joined_packings(spec: ModelSpec, dtype: str = "bf16") -> dict[str, Packing]:
    """How each weight of `spec` is packed, so that the joined tensors can be read.

    The keys are the names of the first stored tensor of each weight. Weights that are not FP8 are
    stored as `dtype`.
    """
    in_fp8, found = fp8_parameters(spec), dict[str, Packing]()
    for name, shape in parameters(spec).items():
        if name in in_fp8:
            how = {"arrange": "transpose" if len(shape) == 3 else "rows", "fp8": "channel"}
            packing = Packing.model_validate({"source": name, "dtype": "fp32", **how})
        else:
            packing = Packing.model_validate({"source": name, "dtype": dtype})
        found[packing.names(spec.stored(name))[0]] = packing
    return found


def unquantised(spec: ModelSpec, dtype: str) -> ModelSpec:
    """`spec` without its scheme, with all weights of type `dtype`."""
    return spec.model_copy(update={"scheme": None, "dtype": dtype, "dtypes": {}})


def _joined(text: TextSpec) -> Iterator[tuple[str, Shape, tuple[str, ...]]]:
    """Name and shape [..., out, in] of every FP8 tensor, and the parameters that it consists of."""
    dim = text.dim
    for layer in text.all_layers:
        i = layer.index
        qkv = tuple(names.attention(i, part, "weight") for part in "qkv")
        width = text.q_width + 2 * text.kv_width
        yield names.attention(i, "qkv", "weight"), (width, dim), qkv
        o = names.attention(i, "o", "weight")
        yield o, (dim, text.q_width), (o,)
        swiglu = names.shared if layer.experts else names.dense
        gate_up = tuple(swiglu(i, part, "weight") for part in ("gate", "up"))
        down = swiglu(i, "down", "weight")
        if layer.experts:
            count, hidden = layer.experts.count + 1, layer.experts.hidden
            routed = names.routed(i)
            yield routed[0], (count, 2 * hidden, dim), (routed[0], *gate_up)
            yield routed[1], (count, dim, hidden), (routed[1], down)
        elif text.dense_hidden:
            yield names.dense(i, "gate_up", "weight"), (2 * text.dense_hidden, dim), gate_up
            yield down, (dim, text.dense_hidden), (down,)
