"""Every tensor that holds a model: its parameters as they are stored, and their scales.

A linear layer's codes are [out, in], fused experts' [expert, in, out]. Scales have the fewest
dimensions that say what they mean:

    "tensor"   []           "channel"  [out], [expert, out]
    "expert"   [], [expert]    "block"    [out, in] or [expert, in, out] in blocks
"""

from collections.abc import Iterator
from typing import NamedTuple

from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.parameters import Shape, parameters
from moec.spec.scheme import STATIC, Rule


class Kind(NamedTuple):
    """Shape and dtype, by our name of it."""

    shape: Shape
    dtype: str


def tensors(spec: ModelSpec) -> dict[str, Kind]:
    """Every tensor of `spec` by name; without a scheme, its parameters."""
    rules = quantized(spec)
    found: dict[str, Kind] = {}
    for name, shape in parameters(spec).items():
        if name not in rules:
            found[name] = Kind(shape, spec.dtype)
        else:
            found.update(_stored(spec, name, shape, rules[name]))
    if spec.scheme and spec.scheme.cache:
        for layer in spec.text.all_layers:
            for part in "kv":
                found[f"layers.{layer.index}.attn.{part}_scale"] = Kind((), spec.scheme.scales)
    return found


def quantized(spec: ModelSpec) -> dict[str, Rule]:
    """The parameters that the scheme of `spec` makes FP8, and the rule for each.

    Raises:
        MoecError: a rule that is for no weight of this model.
    """
    scheme = spec.scheme
    if scheme is None:
        return {}
    names = eligible(spec)
    for rule in scheme.rules:
        if not any(map(rule.matches, names)):
            refuse(
                f"scheme {scheme.name}: {', '.join(rule.of)}",
                f"no such weight in {spec.name}",
                f"patterns over names such as {', '.join(names[:3])}",
                "correct the scheme",
            )
    found = {name: each for name in names if (each := scheme.rule(name))}
    static = [n for n, each in found.items() if each.inputs in STATIC and n.startswith("vision.")]
    if static and scheme.layout == "moec":
        refuse(
            f"scheme {scheme.name}: {static[0]}",
            "static input scales in the vision tower",
            "dynamic ones: calibration runs on text",
            "use inputs: token there",
        )
    for layer in spec.text.all_layers:
        both = [found.get(f"layers.{layer.index}.moe.{part}") for part in ("gate_up", "down")]
        if len({each and each.inputs for each in both}) > 1:
            refuse(
                f"scheme {scheme.name}: layers.{layer.index}.moe",
                "gate_up and down apart",
                "both in FP8 with the same inputs, or neither",
                "correct the scheme",
            )
    return found


def eligible(spec: ModelSpec) -> list[str]:
    """The parameters that a product uses, which are all that can be FP8. A tied head cannot."""
    others = ("embed.weight", "vision.positions", "vision.patch.weight")
    return [n for n, shape in parameters(spec).items() if len(shape) > 1 and n not in others]


def scale_of(parameter: str) -> str:
    """The name of a parameter's scales."""
    return f"{parameter}_scale"


def input_scale_of(parameter: str) -> str:
    """The name of the static scale of a parameter's input."""
    stem = parameter.removesuffix(".weight")
    return f"{stem}.input_scale" if stem != parameter else f"{parameter}_input_scale"


def separate(parameter: str, expert: int) -> tuple[str, ...]:
    """Names of the parts of one expert's share of a fused parameter, each a matrix [out, in]."""
    stem, _, fused = parameter.rpartition(".")
    return tuple(f"{stem}.experts.{expert}.{part}.weight" for part in fused.split("_"))


def _stored(spec: ModelSpec, name: str, shape: Shape, rule: Rule) -> Iterator[tuple[str, Kind]]:
    scheme = spec.scheme
    assert scheme is not None
    if len(shape) == 3 and scheme.separate_experts:
        count, inner, outer = shape
        for expert in range(count):
            parts = separate(name, expert)
            for part in parts:
                matrix = (outer // len(parts), inner)
                yield part, Kind(matrix, "fp8")
                yield (
                    scale_of(part),
                    Kind(scale_shape(matrix, rule.weight, scheme.block), scheme.scales),
                )
        return
    yield name, Kind(shape, "fp8")
    yield scale_of(name), Kind(scale_shape(shape, rule.weight, scheme.block), scheme.scales)
    if rule.inputs in STATIC:
        each = shape[:1] if rule.inputs == "expert" and len(shape) == 3 else ()
        yield input_scale_of(name), Kind(each, scheme.scales)


def scale_shape(shape: Shape, weight: str, block: int) -> Shape:
    """The shape of the scales of a linear weight [out, in], or of fused experts."""
    *experts, rows, columns = shape
    return {
        "tensor": (),
        "expert": tuple(experts),
        "channel": (*experts, columns if experts else rows),
        "block": (*experts, -(-rows // block), -(-columns // block)),
    }[weight]
