"""Which models the fused FP8 ops can express, and the refusals of all others.

Target `torch` has plain programs (`moec.graph_builder.plain`) for models that `is_fusible` says no
of. A model of which it says yes has no plain program in FP8, which would only be slower.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moec.spec.errors import refuse
from moec.spec.model import QK_NORMS, ModelSpec, TextSpec
from moec.spec.parts.routing import Experts, Routing
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized
from moec.weights.joined import fp8_parameters

_OTHER_TARGET = "use --target torch, which has a plain program for it, or --target onnx"


class _Odd(NamedTuple):
    """A field of a spec with a value that the fused ops cannot express."""

    field: str
    found: object
    expected: str
    fix: str = _OTHER_TARGET


def is_fusible(text: TextSpec) -> bool:
    """Whether the fused ops can express a decoder, if its weights have the right scheme."""
    return not any(_odd_fields(text))


def check_fusible(spec: ModelSpec) -> None:
    """Refuse a model or a scheme that the fused ops cannot express.

    Sizes are not checked here. A CPU runs any size, and a session on a GPU checks the sizes that
    its kernels take.

    Raises:
        MoecError: names the field of the spec, its value, and the values that are supported.
    """
    odd = next(_odd(spec), None)
    if odd:
        refuse(f"{spec.name}: {odd.field}", *odd[1:])


def _odd(spec: ModelSpec) -> Iterator[_Odd]:
    yield from _odd_fields(spec.text)
    if spec.scheme is None:
        yield _Odd("scheme", "none", "FP8 weights", "add --precision fp8")
    else:
        yield from _odd_scheme(spec, spec.scheme)


def _odd_fields(text: TextSpec) -> Iterator[_Odd]:
    yield from (_Odd(*each) for each in unlike(text))
    if text.attention_bias:
        yield _Odd("text.attention_bias", True, "false: fused products have no bias")
    if text.experts:
        yield from _odd_experts(text.experts)


def _odd_experts(experts: Experts) -> Iterator[_Odd]:
    if experts.top_k != 1:
        yield _Odd("text.experts.top_k", experts.top_k, "1, an expert for each token")
    if experts.routing != Routing():
        yield _Odd("text.experts.routing", experts.routing, "a sigmoid of logits, on inputs")
    if experts.shared_hidden != experts.hidden:
        found = f"{experts.shared_hidden}, where experts have {experts.hidden}"
        yield _Odd("text.experts.shared_hidden", found, "a shared expert as wide as the others")


def unlike(text: TextSpec) -> Iterator[tuple[str, object, str]]:
    """Fields of attention that fused attention has no kernel for: field, found, expected."""
    weighted = sorted(letter for letter, how in QK_NORMS.items() if how.weighted)
    if set(text.qk_norm) & set(weighted):
        yield "text.qk_norm", text.qk_norm, "QK-norm without weights, after RoPE"
    if text.rope_pairs != "adjacent":
        yield "text.rope_pairs", text.rope_pairs, "adjacent"
    if text.clip_qkv:
        yield "text.clip_qkv", text.clip_qkv, "none"
    if text.window:
        yield "text.window", text.window, "chunks, or all tokens"
    if text.latent:
        yield "text.latent", "latent attention", "keys and values in the cache"


def _odd_scheme(spec: ModelSpec, scheme: Scheme) -> Iterator[_Odd]:
    fix = "use --scheme dynamic"
    at = f"scheme {scheme.name}"
    if scheme.layout not in ("moec", "compressed-tensors"):
        found = f"{scheme.layout}, of a checkpoint that is FP8 already"
        expected, fix = "wide weights, which become FP8", "build from them, or use --target onnx"
        yield _Odd(f"{at}: layout", found, expected, fix)
        return
    if scheme.cache:
        yield _Odd(f"{at}: cache", "FP8 keys and values", "wide ones", "add --cache wide")
    if scheme.bound is not None:
        yield _Odd(f"{at}: bound", scheme.bound, "none", fix)
    if scheme.scales != "fp32" and scheme.layout == "moec":
        yield _Odd(f"{at}: scales", scheme.scales, "fp32", fix)
    rules, wanted = quantized(spec), fp8_parameters(spec)
    for name in sorted(wanted | set(rules)):
        rule = rules.get(name)
        kind = (rule.weight, rule.inputs) if rule else None
        wished = ("channel", "token") if name in wanted else None
        if kind != wished:
            yield _Odd(f"{at}: {name}", _said(kind), _said(wished), fix)


def _said(kind: tuple[str, str] | None) -> str:
    return f"FP8 by {kind[0]}, its inputs by {kind[1]}" if kind else "wide"
