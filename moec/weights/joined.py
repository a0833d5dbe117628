"""Joined weights: tensors of a graph whose bytes are several stored tensors, one after another.

    joined tensor                   stored tensors
    layers.{i}.attn.qkv.weight      q, k, v                               [Q + 2 KV, D]
    layers.{i}.ffn.gate_up.weight   gate, up                              [2F, D]
    layers.{i}.moe.gate_up          all experts, shared gate, shared up   [E + 1, 2F, D]
    layers.{i}.moe.down             all experts, shared down              [E + 1, D, F]

Experts are stored as [expert, out, in], in one tensor or apart. The rows of all these tensors are
therefore outputs, so that writing one tensor after another joins them. The scales of a joined
weight are joined in the same way. Every other tensor is a stored tensor.

`joined_tensors` are those of fused programs, all of them. Plain programs have `plain_tensors`: the
experts alone are joined, in any type that all of their weights have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moec.spec import names
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.mtp.layer import stored_layers
from moec.spec.mtp.model import mtp_of, without_mtp
from moec.spec.parameters import Shape, parameters, text_parameters, vision_parameters
from moec.spec.parts.routing import Experts
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized, tensors
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry

#: the dialects of target `torch`: of fused FP8 ops, for models that these express, and of plain ops
FUSED, PLAIN = "torch", "torch-plain"
#: the dialect of target `ort-cuda`, which has the fused ops too
ORT_CUDA = "ort-cuda-fp8"


#: the kinds of FP8 experts that are joined: weights and inputs, as in a scheme rule
JOINED_FP8 = {("channel", "token"), ("block", "group")}


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of a graph. Its values are those of the stored tensors `sources`, in this order.

    `sources` names parameters or scales, or those of single experts; `dtype` is "fp8" or a `DType`.
    Stored tensors of another type are cast to it, such as scales in bf16.
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
    for name, shape, parameters_ in _joined(spec.text):
        sources = _stored(spec, parameters_)
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
    for name, shape in _in_joined_order(spec):
        if name in in_fp8:
            how = {"arrange": "transpose" if len(shape) == 3 else "rows", "fp8": "channel"}
            packing = Packing.model_validate({"source": name, "dtype": "fp32", **how})
        else:
            packing = Packing.model_validate({"source": name, "dtype": dtype})
        found[packing.names(spec.stored(name))[0]] = packing
    return found


def _in_joined_order(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """All parameters with their shapes; those of a joined tensor follow one another.

    Where they are written in this order the joined tensor is one piece of the file, which ONNX
    Runtime can read as one tensor.
    """
    known = parameters(spec)
    after = {first: rest for _, _, (first, *rest) in _joined(spec.text)}
    moved = {name for rest in after.values() for name in rest}
    for name in known:
        if name not in moved:
            yield from ((each, known[each]) for each in (name, *after.get(name, ())))


def in_one_piece(name: str, joined: Joined, parts: Sequence[TensorEntry]) -> TensorEntry | None:
    """Where the joined tensor `name` is, if its `parts` follow one another in a file.

    None if they do not, or if one of them has another type.
    """
    for one, other in pairwise(parts):
        if (one.file, one.offset + one.nbytes) != (other.file, other.offset):
            return None
    if any(each.dtype != joined.dtype or each.parts or each.changes for each in parts):
        return None
    first, size = parts[0], sum(each.nbytes for each in parts)
    return TensorEntry(name, joined.dtype, joined.shape, first.file, first.offset, size)


def plain_spec(spec: ModelSpec, dtype: str) -> ModelSpec:
    """`spec` with the types in which a plain program that computes in `dtype` has its weights.

    A checkpoint that is quantised already stays as it is. moec packs all others: their wide weights
    have the type `dtype`, but for a router's bias, whose smallest differences decide.
    """
    if spec.scheme and spec.scheme.layout != "moec":
        return spec
    biases = (names.moe(layer.index, "router", "bias") for layer in stored_layers(spec.text))
    kept = {name: spec.stored(name) for name in biases if name in text_parameters(spec)}
    return spec.model_copy(update={"dtype": dtype, "dtypes": kept, "separate_experts": False})


def plain_tensors(spec: ModelSpec, dtype: str = "bf16", part: str = "model") -> dict[str, Joined]:
    """What `joined_tensors` gives, for a plain program."""
    spec, of_vision = plain_spec(spec, dtype), vision_parameters(spec).keys()
    if part == "mtp":
        spec = mtp_of(spec)
    elif spec.text.mtp == "built":
        spec = without_mtp(spec)
    found = {
        name: Joined(kind.shape, kind.dtype, (name,))
        for name, kind in tensors(spec).items()
        if (names.scaled(name) in of_vision or name in of_vision) == (part == "vision")
    }
    if part == "vision":
        return found
    joined = joined_experts(spec)
    stored = {source for each in joined.values() for source in each.sources}
    return {name: each for name, each in found.items() if name not in stored} | joined


def joined_experts(spec: ModelSpec) -> dict[str, Joined]:
    """The tensors of `plain_tensors` that are joined; `spec` is a `plain_spec`."""
    kinds, rules, found = tensors(spec), quantized(spec), dict[str, Joined]()
    for name, shape, parameters_ in _plainly_joined(spec):
        sources = _stored(spec, parameters_)
        found[name] = Joined(shape, kinds[sources[0]].dtype, sources)
        if name in rules and spec.scheme:
            side = spec.scheme.block
            blocks = (shape[0], shape[1] // side, shape[2] // side)
            scales = tuple(map(names.scale_of, sources))
            each = blocks if rules[name].weight == "block" else shape[:-1]
            found[names.scale_of(name)] = Joined(each, "fp32", scales)
    return found


def _stored(spec: ModelSpec, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The stored tensors of some parameters, in the order in which they are joined."""
    apart = spec.scheme is not None and spec.scheme.separate_experts

    def parts(name: str) -> Iterator[str]:
        if not (apart and names.is_routed(name)):
            yield name
            return
        for expert in range(spec.text.expert_count):
            yield from names.separate(name, expert)

    return tuple(part for name in wanted for part in parts(name))


def plain_packings(spec: ModelSpec, dtype: str = "bf16") -> dict[str, Packing]:
    """What `joined_packings` gives, for a plain program whose weights moec packs."""
    stored, rules = plain_spec(spec, dtype), quantized(spec)
    turned = {source for _, _, sources in _plainly_joined(stored) for source in sources}
    found = dict[str, Packing]()
    for name, shape in parameters(spec).items():
        joined = name in turned and len(shape) == 3
        dtype = stored.stored(name)
        packing = Packing.by(name, dtype, rules.get(name), spec.scheme, turned=joined)
        found[packing.names(spec.stored(name))[0]] = packing
    return found


#: the tensors of a part of a program, by the dialect of target `torch`
PROGRAM_TENSORS: dict[str, Callable[[ModelSpec, str, str], dict[str, Joined]]] = {
    FUSED: joined_tensors,
    PLAIN: plain_tensors,
    ORT_CUDA: joined_tensors,
}


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


def _plainly_joined(spec: ModelSpec) -> Iterator[tuple[str, Shape, tuple[str, ...]]]:
    """The joined experts of a plain program, as `_joined` gives them; `spec` is a `plain_spec`.

    Experts are joined if all of a layer are of one type: wide and packed by moec, or FP8 in one of
    `JOINED_FP8`. The shared expert is joined if it is like the others.
    """
    rules, scheme = quantized(spec), spec.scheme

    def kinds(*parameters: str) -> set[tuple[str, str] | None]:
        found = (rules.get(name) for name in parameters)
        return {(rule.weight, rule.inputs) if rule else None for rule in found}

    for layer in stored_layers(spec.text):
        routed, shared = names.routed(layer.index), names.shared
        own = kinds(*routed)
        router = names.moe(layer.index, "router", "weight")
        if not layer.experts or len(own) > 1 or router in rules:
            continue
        if own == {None}:
            joins = not spec.separate_experts and (scheme is None or scheme.layout == "moec")
        else:
            joins = own <= JOINED_FP8 and _is_exact(scheme) and _whole(spec, layer.experts)
        if not joins:
            continue
        count, hidden = layer.experts.count, layer.experts.hidden
        parts = [shared(layer.index, part, "weight") for part in ("gate", "up", "down")]
        alike = layer.experts.shared_hidden == hidden and kinds(*parts) == own
        parts, count = (parts, count + 1) if alike else ([], count)
        yield routed[0], (count, 2 * hidden, spec.text.dim), (routed[0], *parts[:2])
        yield routed[1], (count, spec.text.dim, hidden), (routed[1], *parts[2:])


def _is_exact(scheme: Scheme | None) -> bool:
    """Whether one op has the arithmetic and the layout of a scheme's experts."""
    layouts = ("moec", "compressed-tensors", "fp8")
    return scheme is not None and scheme.bound is None and scheme.layout in layouts


def _whole(spec: ModelSpec, experts: Experts) -> bool:
    """Whether the widths of experts are whole blocks, if their scales are of blocks."""
    scheme = spec.scheme
    blocks = scheme is not None and any(rule.weight == "block" for rule in scheme.rules)
    side = scheme.block if scheme and blocks else 1
    return not (experts.hidden % side or spec.text.dim % side)
