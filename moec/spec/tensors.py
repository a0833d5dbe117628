"""The names, shapes and types of all stored tensors of a model: parameters and scales.

The quantised values of a linear layer are [out, in], those of stacked experts [expert, in, out].
Scales have these shapes, for a linear layer and for stacked experts:

    "tensor"   []                   []
    "expert"   []                   [expert]
    "channel"  [out]                [expert, out]
    "block"    [out, in] in blocks  [expert, in, out] in blocks
    "group"    [out, in / block]    each expert has its own: see below
    "output"   [out, 1]

4-bit integers are bytes [out, in / 2]: two in a byte, the first one in the low half. So are their
zero points, [out / 8, groups, 4]: the eight of one group and eight outputs are side by side. All
routed experts then have tensors of their own.
"""

from collections.abc import Iterator
from itertools import chain, cycle
from typing import NamedTuple, get_args

from moec.spec import names
from moec.spec.data import DType
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import stored_layers
from moec.spec.parameters import Shape, parameters
from moec.spec.scheme import STATIC, Rule


class Kind(NamedTuple):
    """The shape and type of a stored tensor; `dtype` is "fp8", "uint8" or a `DType`."""

    shape: Shape
    dtype: str


class Group(NamedTuple):
    """The stored tensors of one parameter, by name.

    With `experts`, the names are patterns for each of that many experts: see `names.of_each`.
    """

    kinds: dict[str, Kind]
    experts: int | None = None


def tensors(spec: ModelSpec) -> dict[str, Kind]:
    """Every stored tensor of `spec`, by name. Without a scheme these are the parameters.

    Raises:
        MoecError: the scheme does not fit the model; see `quantized`.
    """
    found: dict[str, Kind] = {}
    for group in groups(spec):
        kinds = cycle(group.kinds.values())
        found.update(zip(names.of_each(group.kinds, group.experts), kinds, strict=False))
    if spec.separate_experts and spec.dtypes:  # experts may differ
        wide = (name for name, kind in found.items() if kind.dtype in get_args(DType))
        apart = [name for name in wide if names.holds_routed(name)]
        found |= {name: Kind(found[name].shape, spec.stored(name)) for name in apart}
    return found


def groups(spec: ModelSpec) -> Iterator[Group]:
    """The stored tensors of `spec`, those of one parameter at a time.

    The types of wide experts that have tensors of their own are those that most of them have.

    Raises:
        MoecError: as `tensors`.
    """
    rules = quantized(spec)
    for name, shape in parameters(spec).items():
        rule = rules.get(name)
        separate = len(shape) == 3 and (
            spec.scheme and spec.scheme.separate_experts if rule else spec.separate_experts
        )
        if separate:
            count, inner, outer = shape
            parts = names.separate(name, names.EACH)
            matrix = (outer // len(parts), inner)
            rows = (_matrix(each, matrix, rule, spec) for each in parts)
            yield Group(dict(chain.from_iterable(rows)), count)
        elif rule is None or (spec.scheme and spec.scheme.int4):
            yield Group(dict(_matrix(name, shape, rule, spec)))
        else:
            yield Group(dict(_stored(name, shape, rule, spec)))
    if spec.scheme and spec.scheme.cache:
        for cache in scaled_caches(spec):
            yield Group({names.scale_of(cache): Kind((), spec.scheme.scales)})


def scaled_caches(spec: ModelSpec) -> Iterator[str]:
    """What FP8 caches have scales for, such as "layers.{i}.attn.k" and "layers.{i}.attn.v".

    A layer of latent attention has one cache, and moec stores one scale for it, that of "k".
    Checkpoints that are quantised already have both.
    """
    own = spec.scheme is not None and spec.scheme.layout == "moec"
    for layer in stored_layers(spec.text):
        for part in "kv"[: len(layer.caches) if own else None]:
            yield names.attention(layer.index, part)


def quantized(spec: ModelSpec) -> dict[str, Rule]:
    """The parameters that the scheme of `spec` quantises, with the scheme rule of each.

    Where a scheme of moec's own has static input scales, the weight of the heads in latent
    attention has none: see `names.is_of_heads`. A quantised checkpoint has what its scheme says.

    Raises:
        MoecError: a scheme rule matches no weight of the model; a rule has static input scales in
            the vision tower, or any static scales with multi-token prediction; groups of 4-bit
            integers do not divide a weight; or the rules treat the inputs of gate_up and down
            differently.
    """
    scheme = spec.scheme
    if scheme is None:
        return {}
    known = eligible(spec)
    for rule in scheme.rules:
        if not any(map(rule.matches, known)):
            refuse(
                f"scheme {scheme.name}: {', '.join(rule.of)}",
                f"these patterns match no weight of {spec.name}",
                f"patterns that match weights such as {', '.join(known[:3])}",
                "correct the scheme",
            )
    found = {name: each for name in known if (each := scheme.rule(name))}
    if scheme.layout == "moec":
        for name in filter(names.is_of_heads, known):
            if name in found and found[name].inputs in STATIC:
                found[name] = found[name].model_copy(update={"inputs": "none"})
    static = [n for n, each in found.items() if each.inputs in STATIC and names.of_vision(n)]
    if static and scheme.layout == "moec":
        refuse(
            f"scheme {scheme.name}: {static[0]}",
            "static input scales in the vision tower",
            "dynamic input scales, because calibration runs on text only",
            "write `inputs: token` in the scheme rule for the vision tower",
        )
    if scheme.static and scheme.layout == "moec" and spec.text.mtp == "built":
        refuse(
            f"--mtp with scheme {scheme.name}",
            "static scales in the layer of multi-token prediction",
            "dynamic scales of inputs and wide caches, because calibration runs the decoder alone",
            "choose another --scheme or --cache, or leave --mtp out",
        )
    if scheme.int4:
        _check_widths(spec, found)
    for layer in stored_layers(spec.text):
        both = [found.get(name) for name in names.routed(layer.index)]
        if len({each and each.inputs for each in both}) > 1 and not scheme.int4:
            refuse(
                f"scheme {scheme.name}: {names.moe(layer.index)}",
                "different input scales for gate_up and down",
                "scheme rules with the same `inputs` for both, or for neither",
                "correct the scheme",
            )
    return found


def _check_widths(spec: ModelSpec, rules: dict[str, Rule]) -> None:
    """Refuse weights whose rows are no whole words of eight 4-bit integers, or no whole groups.

    So is a weight that no product of 4-bit integers exists for: that of a head in latent attention.
    """
    shapes = parameters(spec)
    for name, rule in rules.items():
        if names.is_of_heads(name):
            refuse(
                name,
                "4-bit integers for the heads of latent attention (kv_b_proj)",
                "a wide weight",
                "leave this layer out when you quantise the model",
            )
        width = shapes[name][-2 if len(shapes[name]) == 3 else -1]
        for size in (8, spec.scheme.block if rule.weight == "group" and spec.scheme else 8):
            if width % size:
                refuse(
                    name,
                    f"4-bit integers for {width} inputs",
                    f"a multiple of {size}, so that words and groups end with the row",
                    "leave this layer out when you quantise the model",
                )


def eligible(spec: ModelSpec) -> list[str]:
    """The names of the parameters that can be FP8: the weights of matrix products.

    The embedding is not among them, and neither is a head that shares the embedding's weight.
    """
    others = (names.EMBED_WEIGHT, names.POSITIONS, names.PATCH_WEIGHT)
    return [n for n, shape in parameters(spec).items() if len(shape) > 1 and n not in others]


def _stored(name: str, shape: Shape, rule: Rule, spec: ModelSpec) -> Iterator[tuple[str, Kind]]:
    """The tensors of a weight whose experts, if it has any, are in one tensor."""
    scheme = spec.scheme
    assert scheme is not None
    yield name, Kind(shape, "fp8")
    yield names.scale_of(name), Kind(scale_shape(shape, rule.weight, scheme.block), scheme.scales)
    if rule.inputs in STATIC:
        each = shape[:1] if rule.inputs == "expert" and len(shape) == 3 else ()
        yield names.input_scale_of(name), Kind(each, scheme.scales)


def _matrix(
    name: str, shape: Shape, rule: Rule | None, spec: ModelSpec
) -> Iterator[tuple[str, Kind]]:
    """The tensors of a weight [out, in], which is wide if it has no scheme rule."""
    scheme = spec.scheme
    if rule is None or scheme is None:
        yield name, Kind(shape, spec.stored(name))
        return
    scales = scale_shape(shape, rule.weight, scheme.block)
    rows, columns = shape
    yield name, Kind((rows, columns // 2), "uint8") if scheme.int4 else Kind(shape, "fp8")
    yield names.scale_of(name), Kind(scales, scheme.scales)
    if rule.inputs in STATIC:
        yield names.input_scale_of(name), Kind((), scheme.scales)
    if scheme.zero_points:
        yield names.zero_point_of(name), Kind((-(-rows // 8), scales[1], 4), "uint8")


def int4_tensors(parameter: str, shape: Shape) -> list[str]:
    """The names of the tensors in which 4-bit integers store a parameter, zero points included."""
    parts = [parameter]
    if len(shape) == 3:
        parts = [part for e in range(shape[0]) for part in names.separate(parameter, e)]
    kinds = (str, names.scale_of, names.zero_point_of)
    return [kind(part) for part in parts for kind in kinds]


def in_words(kind: Kind) -> Kind:
    """How a checkpoint's header describes the bytes of 4-bit integers: words of eight, int32."""
    *lead, last = kind.shape
    return Kind((*lead, last // 4) if len(kind.shape) == 2 else tuple(lead), "int32")


def scale_shape(shape: Shape, weight: str, block: int) -> Shape:
    """The shape of the scales of a linear weight [out, in] or of stacked experts.

    `shape` is the weight's, `weight` a key of `WEIGHTS`, `block` the side of a block.
    """
    *experts, rows, columns = shape
    return {
        "tensor": (),
        "expert": tuple(experts),
        "channel": (*experts, columns if experts else rows),
        "block": (*experts, -(-rows // block), -(-columns // block)),
        "group": (*experts, columns, -(-rows // block))
        if experts
        else (rows, -(-columns // block)),
        "output": (*experts, columns if experts else rows, 1),
    }[weight]
