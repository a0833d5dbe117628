"""Apply a precision to a spec: choose its FP8 scheme, and say how weights are quantised."""

from pathlib import Path

from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.files import load_scheme
from moec.spec.hf.written import is_said
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import WITHOUT_EXPERTS, Scheme
from moec.spec.tensors import quantized
from moec.weights.packing import Packing


def in_precision(
    spec: ModelSpec,
    precision: str,
    scheme: str | Path | Scheme | None,
    cache: str | None,
    default: str = "meta",
) -> ModelSpec:
    """`spec` as an artefact of this precision has it: with a scheme for fp8, else without.

    `default` is the scheme that quantises wide weights if the user names none; a model without
    experts has another one, because some defaults are for experts. `cache` is "fp8" or "wide"; None
    leaves the choice to the scheme.

    Raises:
        MoecError: the model or the precision does not allow this scheme, or FP8 caches.
    """
    if precision != "fp8":
        odd = next((n for n, v in (("scheme", scheme), ("cache", cache)) if v is not None), None)
        if odd:
            refuse(f"--{odd}", f"--precision {precision}", "--precision fp8", "add --precision fp8")
        _check_own(spec, precision)
        return spec
    _check_own(spec, precision)
    if spec.scheme and scheme is not None:
        refuse(
            f"--scheme {scheme}",
            f"{spec.name}, which is FP8 already ({spec.scheme.name})",
            "no --scheme",
            "leave it out, or quantise bf16 weights",
        )
    if spec.text.experts is None:
        default = WITHOUT_EXPERTS.get(default, default)
    chosen = spec.scheme or load_scheme(default if scheme is None else scheme)
    if not spec.scheme and chosen.layout != "moec":
        refuse(
            f"--scheme {chosen.name}: layout",
            f"{chosen.layout}, of a checkpoint that is quantised",
            "moec, for wide weights that a build makes FP8",
            f"write such a checkpoint first: moec quantize --scheme {chosen.name}",
        )
    if cache not in (None, "fp8", "wide"):
        refuse(f"--cache {cache}", "no such kind", "fp8 or wide", "choose one of them")
    if cache == "fp8" and spec.scheme and not spec.scheme.cache:
        refuse(
            "--cache fp8",
            f"{spec.name}, a checkpoint without scales for keys and values",
            "a checkpoint that has them, or weights that moec quantises",
            "leave --cache out, or build from bf16 weights",
        )
    if cache:
        chosen = chosen.model_copy(update={"cache": cache == "fp8"})
    done = spec.model_copy(update={"scheme": chosen})
    quantized(done)  # refuses scheme rules that match no weight
    return done


def _check_own(spec: ModelSpec, precision: str) -> None:
    """Refuse a precision that is not that of weights which are quantised already."""
    own = spec.scheme and spec.scheme.precision
    if spec.scheme and own != precision:
        refuse(
            f"--precision {precision}",
            f"{spec.name}, whose weights are {str(own).upper()} ({spec.scheme.name})",
            f"--precision {own}",
            f"add --precision {own}, or build from bf16 weights",
        )


def fp8_packings(spec: ModelSpec) -> dict[str, Packing]:
    """How the scheme of `spec` stores each wide weight, by parameter."""
    scheme, rules = spec.scheme, quantized(spec)
    assert scheme is not None
    return {
        name: Packing.by(name, spec.stored(name), rules.get(name), scheme)
        for name in parameters(spec)
    }


def published_packings(spec: ModelSpec) -> dict[str, Packing]:
    """The same, with FP8 experts as [out, in] if other engines can read them so."""
    found = fp8_packings(spec)
    if not is_said(spec):
        return found
    turned = {"arrange": "transpose"}
    return {
        name: each.model_copy(update=turned) if each.fp8 and names.is_routed(name) else each
        for name, each in found.items()
    }
