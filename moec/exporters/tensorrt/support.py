"""What TensorRT's operators and our plugin can express, and what to say of the rest."""

from collections.abc import Iterator

from moec.artefact.targets import wants_plugin
from moec.kernels.sizes import SMALLEST
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized
from moec.weights.joined import fp8_parameters

#: where, found, expected, what to do
Odd = tuple[str, object, str, str]
#: what the size of a head must be a multiple of, for attention in half precision
_HEAD = 8


def check_expressible(spec: ModelSpec, precision: str) -> None:
    """Refuse a model, in a precision and its scheme, for which there is no engine.

    Raises:
        MoecError: names the field of the spec, what it is, and what it may be.
    """
    odd = next(_odd(spec, precision), None)
    if odd:
        refuse(f"{spec.name}: {odd[0]}", *odd[1:])


def _odd(spec: ModelSpec, precision: str) -> Iterator[Odd]:
    size = spec.text.head_dim
    if precision != "fp32" and size % _HEAD:
        expected = f"a multiple of {_HEAD} in half precision"
        yield "text.head_dim", size, expected, "use --precision fp32"
    if spec.scheme:
        yield from _odd_scheme(spec, spec.scheme)


def _odd_scheme(spec: ModelSpec, scheme: Scheme) -> Iterator[Odd]:
    at = f"scheme {scheme.name}"
    if scheme.cache:
        expected = "wide ones: TensorRT updates no FP8 cache"
        yield f"{at}: cache", "FP8 keys and values", expected, "add --cache wide"
    plugin = wants_plugin(scheme)
    inside = {name for name in fp8_parameters(spec) if ".moe." in name} if plugin else set()
    for name, rule in quantized(spec).items():
        if name in inside:
            continue
        if rule.inputs in ("token", "group") or rule.weight == "block":
            found = f"weights by {rule.weight}, inputs by {rule.inputs}"
            expected = "scales known before a run, by tensor, expert or channel"
            yield f"{at}: {name}", found, expected, "use --scheme static"
    if not plugin:
        return
    yield from _odd_plugin(spec, scheme, inside)


def _odd_plugin(spec: ModelSpec, scheme: Scheme, inside: set[str]) -> Iterator[Odd]:
    """What the plugin's kernels, which are those of target torch, cannot do."""
    fix, experts, rules = "use --scheme static", spec.text.experts, quantized(spec)
    if scheme.layout != "moec":
        found = f"{scheme.layout}, of a checkpoint that is FP8 already, with scales by token"
        expected = "wide weights, or FP8 with static scales, as ModelOpt writes"
        yield f"scheme {scheme.name}: layout", found, expected, "build from the wide weights"
    if scheme.bound is not None or scheme.scales != "fp32":
        found = f"bound {scheme.bound}, scales {scheme.scales}"
        yield f"scheme {scheme.name}", found, "no bound and fp32 scales, for the plugin", fix
    if experts.top_k != 1:
        yield "text.experts.top_k", experts.top_k, "1, for the plugin", fix
    if experts.shared_hidden != experts.hidden:
        found = f"{experts.shared_hidden}, where experts have {experts.hidden}"
        yield "text.experts.shared_hidden", found, "as wide as the others, for the plugin", fix
    for name, size in (("text.dim", spec.text.dim), ("text.experts.hidden", experts.hidden)):
        if size % SMALLEST:
            yield name, size, f"a multiple of {SMALLEST}, for the plugin", fix
    for name in sorted(inside):
        rule = rules.get(name)
        kind = (rule.weight, rule.inputs) if rule else None
        if kind != ("channel", "token"):
            expected = "FP8 by channel, inputs by token, for the plugin"
            yield f"scheme {scheme.name}: {name}", kind or "wide", expected, fix
