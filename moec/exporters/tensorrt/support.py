"""Which models TensorRT's operators and the MoE plugin support, and the errors for all others."""

from collections.abc import Iterator

from moec.graph_builder.passes.torch_support import unlike
from moec.kernels.sizes import SMALLEST
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import of_moe, routed
from moec.spec.parts.routing import Experts, Routing
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized
from moec.weights.joined import fp8_parameters

#: names of experts, for which a scheme has rules
_EXPERTS = routed(0)
#: where, found, expected, next: the four parts of an error
Unsupported = tuple[str, object, str, str]
#: attention in half precision needs a width of a head that is a multiple of this
_HEAD_MULTIPLE = 8


def check_expressible(spec: ModelSpec, precision: str) -> None:
    """Refuse a model that TensorRT does not support in this precision and with its scheme.

    Raises:
        MoecError: the message names the field of the spec, its value, and the supported values.
    """
    first = next(_unsupported(spec, precision), None)
    if first:
        refuse(f"{spec.name}: {first[0]}", *first[1:])


def wants_plugin(spec: ModelSpec) -> bool:
    """Whether only the plugin can run the experts of `spec`: inputs have per-token scales."""
    if spec.scheme is None or spec.text.experts is None:
        return False
    return any(rule.inputs == "token" for rule in map(spec.scheme.rule, _EXPERTS) if rule)


def _unsupported(spec: ModelSpec, precision: str) -> Iterator[Unsupported]:
    size = spec.text.head_dim
    if precision != "fp32" and size % _HEAD_MULTIPLE:
        expected = f"a multiple of {_HEAD_MULTIPLE} in half precision"
        yield "text.head_dim", size, expected, "use --precision fp32"
    for field, found, expected in unlike(spec.text):
        yield field, found, expected, "use --target onnx"
    if spec.text.experts and spec.text.experts.routing != Routing():
        found, expected = spec.text.experts.routing, "a sigmoid of logits, on inputs"
        yield "text.experts.routing", found, expected, "use --target onnx"
    if spec.scheme:
        yield from _unsupported_scheme(spec, spec.scheme)


def _unsupported_scheme(spec: ModelSpec, scheme: Scheme) -> Iterator[Unsupported]:
    at = f"scheme {scheme.name}"
    if scheme.cache:
        expected = "unquantised caches, because TensorRT cannot update FP8 caches"
        yield f"{at}: cache", "FP8 keys and values", expected, "add --cache wide"
    experts = spec.text.experts if wants_plugin(spec) else None
    inside = {name for name in fp8_parameters(spec) if of_moe(name)} if experts else set()
    for name, rule in quantized(spec).items():
        if name in inside:
            continue
        if rule.inputs in ("token", "group") or rule.weight == "block":
            found = f"weight scales by {rule.weight}, input scales by {rule.inputs}"
            expected = "static scales, by tensor, expert or channel"
            yield f"{at}: {name}", found, expected, "use --scheme static"
    if experts:
        yield from _unsupported_by_plugin(spec, scheme, experts, inside)


def _unsupported_by_plugin(
    spec: ModelSpec, scheme: Scheme, experts: Experts, inside: set[str]
) -> Iterator[Unsupported]:
    """What the plugin's kernels do not support; they are those of target torch.

    `inside` names the weights that the plugin computes with.
    """
    fix, rules = "use --scheme static", quantized(spec)
    if scheme.layout != "moec":
        found = f"{scheme.layout}, an FP8 checkpoint with per-token scales"
        expected = "unquantised weights, or FP8 weights with static scales, as ModelOpt writes them"
        next_step = "build from the unquantised weights"
        yield f"scheme {scheme.name}: layout", found, expected, next_step
    if scheme.bound is not None or scheme.scales != "fp32":
        found = f"bound {scheme.bound}, scales {scheme.scales}"
        yield f"scheme {scheme.name}", found, "no bound and fp32 scales, for the MoE plugin", fix
    if experts.top_k != 1:
        yield "text.experts.top_k", experts.top_k, "1, for the MoE plugin", fix
    if experts.shared_hidden != experts.hidden:
        found = f"{experts.shared_hidden}, but the routed experts have {experts.hidden}"
        expected = "the width of the routed experts, for the MoE plugin"
        yield "text.experts.shared_hidden", found, expected, fix
    for name, size in (("text.dim", spec.text.dim), ("text.experts.hidden", experts.hidden)):
        if size % SMALLEST:
            yield name, size, f"a multiple of {SMALLEST}, for the MoE plugin", fix
    for name in sorted(inside):
        rule = rules.get(name)
        kind = (rule.weight, rule.inputs) if rule else None
        if kind != ("channel", "token"):
            found = f"weight scales by {kind[0]}, input scales by {kind[1]}" if kind else "no FP8"
            expected = "FP8 with per-channel and per-token scales, for the MoE plugin"
            yield f"scheme {scheme.name}: {name}", found, expected, fix
