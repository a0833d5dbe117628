"""`quantization_config` of a checkpoint, or `hf_quant_config.json`, to a scheme.

Read are FP8 checkpoints of compressed-tensors, ModelOpt and transformers' fbgemm layout. What a
config leaves out of quantisation is a list of module names or patterns; each format has its own.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moec.spec.errors import MoecError, refuse
from moec.spec.fields import REQUIRED, Fields, read_json
from moec.spec.hf.names import key_of, prefixed
from moec.spec.model import ModelSpec
from moec.spec.scheme import Layout, Scheme
from moec.spec.tensors import eligible, quantized, separate

#: ModelOpt's own file; newer exports say the same in config.json
HF_QUANT = "hf_quant_config.json"

#: whether a module, by its checkpoint name, is quantised
_Chosen = Callable[[str], bool]

_INERT = frozenset(
    """
    global_compression_ratio quantization_status version observer observer_kwargs actorder
    scale_dtype zp_dtype moe_sparsity_config producer dequantize
    """.split()
)


def read_scheme(raw: Any, config: Path, spec: ModelSpec) -> Scheme | None:
    """The scheme that `config`, with `quantization_config` `raw`, gives the wide `spec`.

    Raises:
        MoecError: an unknown quant_method, or one of its fields has a value that is not supported.
    """
    where = f"{config}: quantization_config"
    if raw is None:
        own = config.parent / HF_QUANT
        if not own.is_file():
            return None
        inner = Fields(str(own), read_json(own), _NEXT).take("quantization", dict)
        raw, where = {"quant_method": "modelopt", **inner}, f"{own}: quantization"
    if not isinstance(raw, dict):
        raise Fields(str(config), {}, _NEXT).error("quantization_config", repr(raw), "an object")
    fields = Fields(where, raw, _NEXT)
    method = fields.take("quant_method", str)
    if method not in _READERS:
        raise fields.error("quant_method", repr(method), " or ".join(map(repr, _READERS)))
    scheme = _READERS[method](fields, spec)
    try:
        quantized(spec.model_copy(update={"scheme": scheme}))
    except MoecError as error:
        refuse(f"{where}, {error.where}", error.found, error.expected, _NEXT)
    return scheme


_NEXT = "use a bf16 checkpoint and --precision fp8, which quantises it"


def _compressed_tensors(at: Fields, spec: ModelSpec) -> Scheme:
    at.require("format", "float-quantized")
    groups = at.take("config_groups", dict)
    if len(groups) != 1:
        raise at.error("config_groups", f"{len(groups)} groups", "one")
    (name,) = groups
    group = Fields(f"{at.where}.config_groups", groups, _NEXT).inner(name)
    group.require("format", "float-quantized", default="float-quantized")
    weights = _number(group.inner("weights"), False, ("channel", "tensor"))
    inputs = "input_activations" in group
    if inputs:
        _number(group.inner("input_activations"), True, ("token",))
    targets, ignored = _names(group, "targets", REQUIRED), _names(at, "ignore")
    _checked(group, "targets", targets)
    _checked(at, "ignore", ignored)
    cache = "kv_cache_scheme" in at
    if cache:
        _number(at.inner("kv_cache_scheme"), False, ("tensor",), default="tensor")
    for each, key in ((group, "output_activations"), (at, "transform_config")):
        if said := each.take(key, dict, default={}):
            raise each.error(key, str(said)[:80], "nothing: it would change the arithmetic")
    sparse = Fields(
        f"{at.where}.sparsity_config", at.take("sparsity_config", dict, default={}), _NEXT
    )
    sparse.require("format", "dense", default="dense")
    group.finish(_INERT | {"input_activations"})  # null where there is none
    at.finish(_INERT | {"kv_cache_scheme"})
    weight = "expert" if weights == "tensor" else "channel"
    return _scheme(
        at,
        "ignore",
        "compressed-tensors",
        spec,
        lambda module: _listed(module, targets, _regex) and not _listed(module, ignored, _regex),
        weight,
        "token" if inputs else "none",
        cache=cache,
        scales=spec.dtype,  # as the library writes them; weights have the last word
    )


def _number(at: Fields, dynamic: bool, strategies: tuple[str, ...], default: Any = REQUIRED) -> str:
    """The strategy of a symmetric E4M3 number, which is one of `strategies`."""
    at.require("num_bits", 8)
    at.require("type", "float")
    at.require("symmetric", True, default=True)
    at.require("dynamic", dynamic, default=False)
    strategy: str = at.take("strategy", str, default=default)
    if strategy not in strategies:
        raise at.error("strategy", repr(strategy), " or ".join(map(repr, strategies)))
    at.finish(_INERT | {"group_size", "block_structure"})
    return strategy


def _modelopt(at: Fields, spec: ModelSpec) -> Scheme:
    at.require("quant_algo", "FP8")
    cache = at.take("kv_cache_quant_algo", str, default=None)
    if cache not in (None, "FP8"):
        raise at.error("kv_cache_quant_algo", repr(cache), "'FP8' or none")
    said = at.take("kv_cache_scheme", dict, default=None)  # the same, where config.json says it
    if said is not None and (said.get("num_bits"), said.get("type")) != (8, "float"):
        raise at.error("kv_cache_scheme", str(said), "num_bits 8 and type 'float', or none")
    names = "exclude_modules" if "exclude_modules" in at else "ignore"
    excluded = _names(at, "exclude_modules") + _names(at, "ignore")
    at.finish(_INERT | {"config_groups", "group_size"})
    return _scheme(
        at,
        names,
        "modelopt",
        spec,
        lambda module: not _listed(module, excluded, fnmatchcase),
        "tensor",
        "tensor",
        cache=bool(cache or said),
    )


def _fbgemm(at: Fields, spec: ModelSpec) -> Scheme:
    bound = at.take("activation_scale_ub", float, default=1200.0)
    if not bound > 0:
        raise at.error("activation_scale_ub", str(bound), "above 0")
    kept = _names(at, "modules_to_not_convert", ["lm_head"])  # transformers leaves it wide
    _checked(at, "modules_to_not_convert", [f"re:{each}" for each in kept])
    at.finish(_INERT)
    return _scheme(
        at,
        "modules_to_not_convert",
        "fbgemm_fp8",
        spec,
        lambda module: not _listed(module, kept, _prefix),
        "channel",
        "token",
        bound=bound,
    )


_READERS: dict[str, Callable[[Fields, ModelSpec], Scheme]] = {
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "fbgemm_fp8": _fbgemm,
}


def write_scheme(spec: ModelSpec) -> dict[str, Any]:
    """The `quantization_config` that `read_scheme` reads back as the scheme of `spec`.

    Raises:
        MoecError: the scheme is an artefact's own, or otherwise what no checkpoint format can say.
    """
    said = _said(spec)
    wide = spec.model_copy(update={"scheme": None})
    found = spec.model_copy(update={"scheme": read_scheme(said, Path("config.json"), wide)})
    if _meaning(found) != _meaning(spec):
        assert spec.scheme is not None
        refuse(
            f"spec {spec.name}",
            f"scheme {spec.scheme.name}",
            f"what {spec.scheme.layout} can say of weights, inputs and caches",
            "keep the model as a spec file",
        )
    return said


def _meaning(spec: ModelSpec) -> object:
    scheme = spec.scheme
    assert scheme is not None
    rules = {name: (rule.weight, rule.inputs) for name, rule in quantized(spec).items()}
    return rules, scheme.cache, scheme.bound


def _said(spec: ModelSpec) -> dict[str, Any]:
    scheme, rules = spec.scheme, quantized(spec)
    if scheme is None or scheme.layout == "moec":
        refuse(
            f"spec {spec.name}",
            f"scheme {scheme and scheme.name}",
            "the scheme of an FP8 checkpoint",
            "keep the model as a spec file",
        )
    kept = [
        module
        for name in eligible(spec)
        if name not in rules
        for module in _modules(name, spec, scheme.separate_experts)
    ]
    number: dict[str, Any] = {"num_bits": 8, "type": "float"}
    if scheme.layout == "fbgemm_fp8":
        return {
            "quant_method": scheme.layout,
            "activation_scale_ub": scheme.bound,
            "modules_to_not_convert": kept,
        }
    if scheme.layout == "modelopt":
        return {
            "quant_method": scheme.layout,
            "quant_algo": "FP8",
            "ignore": kept,
            **({"kv_cache_scheme": {**number, "dynamic": False}} if scheme.cache else {}),
        }
    rule = scheme.rules[0]
    weights = {"strategy": "tensor" if rule.weight == "expert" else "channel", "dynamic": False}
    inputs = {**number, "strategy": "token", "dynamic": True, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, **weights, "symmetric": True},
        "input_activations": inputs if rule.inputs == "token" else None,
    }
    return {
        "quant_method": scheme.layout,
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": number if scheme.cache else None,
    }


def _listed(module: str, patterns: Iterable[Any], matches: Callable[[str, str], bool]) -> bool:
    """Whether a pattern is for `module`; writers disagree on what stands before `model.`."""
    bare = module.removeprefix("language_model.")
    names = (module, bare, f"model.{module}", f"model.language_model.{bare}")
    return any(matches(name, str(pattern)) for name in names for pattern in patterns)


def _regex(module: str, pattern: str) -> bool:
    """As compressed-tensors has it: a class, a module, or `re:` and an expression."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in ("Linear", module)


def _prefix(module: str, pattern: str) -> bool:
    """As transformers has it: the start of a name up to a dot, an expression, or its end."""
    border = r"(?:(?<=\.)|(?=\.|$))"
    return module.endswith(pattern) or re.match(f"(?:{pattern}){border}", module) is not None


def _names(at: Fields, key: str, default: Any = ()) -> list[str]:
    found: list[str] = list(at.take(key, list, default=default))
    for each in found:
        if not isinstance(each, str):
            raise at.error(key, repr(each), "names or patterns")
    return found


def _checked(at: Fields, key: str, patterns: Iterable[str]) -> None:
    """Refuse expressions that cannot be compiled."""
    for each in patterns:
        if each.startswith("re:"):
            try:
                re.compile(each[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise at.error(key, f"{each[3:83]!r}: {error}", "expressions") from None


def _scheme(
    at: Fields,
    field: str,
    layout: Layout,
    spec: ModelSpec,
    chosen: _Chosen,
    weight: str,
    inputs: str,
    **more: Any,
) -> Scheme:
    names = eligible(spec)
    separated = layout == "compressed-tensors"
    kept = [name for name in names if _is_chosen(name, spec, chosen, separated)]
    if not kept:
        raise at.error(field, "all linear layers are left out", "at least one that is FP8")
    return Scheme.model_validate(
        {
            "name": layout,
            "layout": layout,
            "rules": [{"of": _patterns(kept, names), "weight": weight, "inputs": inputs}],
            **more,
        }
    )


def _is_chosen(name: str, spec: ModelSpec, chosen: _Chosen, separated: bool) -> bool:
    return all(map(chosen, _modules(name, spec, separated)))


def _modules(name: str, spec: ModelSpec, separated: bool) -> list[str]:
    """The modules that hold a parameter: a linear layer, all experts together, or each apart."""
    parts = [name]
    if separated and not name.endswith(".weight"):
        parts = [part for e in range(spec.text.experts.count) for part in separate(name, e)]
    prefix = "language_model." if spec.vision else ""
    return [prefixed(key_of(part), prefix).rpartition(".")[0] for part in parts]


def _patterns(kept: list[str], names: list[str]) -> list[str]:
    """`kept` as patterns: one for all layers where they agree, single names elsewhere."""

    def family(name: str) -> str:
        return re.sub(r"layers\.\d+\.", "layers.*.", name)

    partial = {family(name) for name in set(names) - set(kept)}
    return list(dict.fromkeys(n if family(n) in partial else family(n) for n in kept))
