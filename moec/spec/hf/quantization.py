"""Read a checkpoint's `quantization_config` or `hf_quant_config.json` into a scheme, and write it.

The supported formats are FP8 of compressed-tensors, of ModelOpt and of transformers' fbgemm layout.
Each format lists the modules that it does not quantise, by names or by patterns of its own kind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.spec.errors import MoecError, refuse
from moec.spec.fields import REQUIRED, Fields, read_own_json, shown
from moec.spec.hf.listed import Kind, listed
from moec.spec.hf.names import key_of, prefixed
from moec.spec.model import ModelSpec
from moec.spec.names import family, separate
from moec.spec.scheme import Layout, Scheme
from moec.spec.tensors import eligible, quantized

#: ModelOpt's own file; newer exports have the same fields in config.json
HF_QUANT = "hf_quant_config.json"

_INERT = frozenset(
    """
    global_compression_ratio quantization_status version observer observer_kwargs actorder
    scale_dtype zp_dtype moe_sparsity_config producer dequantize
    """.split()
)


def read_scheme(raw: Any, config: Path, spec: ModelSpec) -> Scheme | None:
    """Read the scheme of a checkpoint; None if it is not quantised.

    Args:
        raw: the value of `quantization_config` in `config`, or None.
        config: path of `config.json`; `hf_quant_config.json` is looked up beside it.
        spec: the model without a scheme.

    Raises:
        MoecError: the quant_method is unknown, or a field has a value that is not supported.
    """
    where = f"{config}: quantization_config"
    if raw is None:
        own = config.parent / HF_QUANT
        if not own.is_file():
            return None
        inner = Fields(str(own), read_own_json(own), _NEXT).take("quantization", dict)
        raw, where = {"quant_method": "modelopt", **inner}, f"{own}: quantization"
    if not isinstance(raw, dict):
        raise Fields(str(config), {}, _NEXT).error("quantization_config", shown(raw), "an object")
    fields = Fields(where, raw, _NEXT)
    if "bits" in fields and "quant_method" not in fields:
        raise fields.error("quant_method", "none, but bits: weights of MLX", "a quant_method")
    method = fields.take("quant_method", str)
    if method not in _READERS:
        what = f" ({_OTHERS[method]})" if method in _OTHERS else ""
        known = ", ".join(map(repr, _READERS))
        raise fields.error("quant_method", f"{shown(method)}{what}", f"one of {known}")
    scheme = _READERS[method](fields, spec)
    try:
        quantized(spec.model_copy(update={"scheme": scheme}))
    except MoecError as error:
        refuse(f"{where}, {error.where}", error.found, error.expected, _NEXT)
    return scheme


#: other methods by the names that transformers has for them
_OTHERS = {
    "awq": "AWQ: 4-bit weights",
    "gptq": "GPTQ: 2- to 8-bit weights",
    "bitsandbytes": "bitsandbytes: 8- or 4-bit weights",
    "aqlm": "AQLM: weights as codebooks",
    "auto-round": "AutoRound: 2- to 8-bit weights",
    "bitnet": "BitNet: ternary weights",
    "eetq": "EETQ: 8-bit weights",
    "exl2": "ExLlamaV2: weights of mixed widths",
    "exl3": "ExLlamaV3: weights of mixed widths",
    "fp8": "block FP8, as DeepSeek and transformers write it",
    "fp_quant": "FP-Quant: MXFP4 or NVFP4 weights",
    "higgs": "HIGGS: weights as grids",
    "hqq": "HQQ: weights of 1 to 8 bits",
    "mxfp4": "MXFP4: 4-bit floats in blocks of 32",
    "quanto": "Quanto: weights of 2 to 8 bits",
    "quark": "AMD Quark: weights of several kinds",
    "spqr": "SpQR: 3-bit weights with outliers",
    "torchao": "torchao: weights of several kinds",
    "vptq": "VPTQ: weights as codebooks",
}

#: values of ModelOpt's `quant_algo` by their meaning
_ALGORITHMS = {
    "NVFP4": "4-bit floats in blocks of 16",
    "NVFP4_AWQ": "4-bit floats in blocks of 16",
    "W4A8_AWQ": "4-bit weights",
    "W4A16_AWQ": "4-bit weights",
    "INT4_AWQ": "4-bit weights",
    "MIXED_PRECISION": "another precision for each layer",
}

_NEXT = (
    "use the bf16 checkpoint that it was made from; moec quantises it: --precision fp8, or "
    "--target ort --precision int4"
)


def _compressed_tensors(at: Fields, spec: ModelSpec) -> Scheme:
    at.require("format", "float-quantized")
    groups = at.take("config_groups", dict)
    if len(groups) != 1:
        raise at.error("config_groups", f"{len(groups)} groups", "one")
    (name,) = groups
    group = Fields(f"{at.where}.config_groups", groups, _NEXT).inner(name)
    group.require("format", "float-quantized", default="float-quantized")
    weights = _e4m3_strategy(group.inner("weights"), False, ("channel", "tensor"))
    inputs = "input_activations" in group
    if inputs:
        _e4m3_strategy(group.inner("input_activations"), True, ("token",))
    targets, ignored = _strings(group, "targets", REQUIRED), _strings(at, "ignore")
    cache = "kv_cache_scheme" in at
    if cache:
        _e4m3_strategy(at.inner("kv_cache_scheme"), False, ("tensor",), default="tensor")
    for each, key in ((group, "output_activations"), (at, "transform_config")):
        if value := each.take(key, dict, default={}):
            expected = "no such field, because it would change the arithmetic"
            raise each.error(key, str(value)[:80], expected)
    sparse = Fields(
        f"{at.where}.sparsity_config", at.take("sparsity_config", dict, default={}), _NEXT
    )
    sparse.require("format", "dense", default="dense")
    group.finish(_INERT | {"input_activations"})  # null where inputs are not quantised
    at.finish(_INERT | {"kv_cache_scheme"})
    weight = "expert" if weights == "tensor" else "channel"
    return _scheme(
        at,
        "ignore",
        "compressed-tensors",
        spec,
        "compressed-tensors",
        ignored,
        weight,
        "token" if inputs else "none",
        targets=(group, targets),
        cache=cache,
        scales=spec.dtype,  # the library's default; the stored tensors may have another type
    )


def _e4m3_strategy(
    at: Fields, dynamic: bool, strategies: tuple[str, ...], default: Any = REQUIRED
) -> str:
    """Read the strategy of symmetric E4M3 values; it must be one of `strategies`."""
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
    if (algorithm := at.take("quant_algo", str)) != "FP8":
        what = f" ({_ALGORITHMS[algorithm]})" if algorithm in _ALGORITHMS else ""
        raise at.error("quant_algo", f"{shown(algorithm)}{what}", "'FP8', the only supported value")
    cache = at.take("kv_cache_quant_algo", str, default=None)
    if cache not in (None, "FP8"):
        raise at.error("kv_cache_quant_algo", repr(cache), "'FP8' or none")
    # config.json has kv_cache_scheme where hf_quant_config.json has kv_cache_quant_algo.
    cache_scheme = at.take("kv_cache_scheme", dict, default=None)
    if cache_scheme is not None and (cache_scheme.get("num_bits"), cache_scheme.get("type")) != (
        8,
        "float",
    ):
        raise at.error(
            "kv_cache_scheme", shown(cache_scheme), "num_bits 8 and type 'float', or none"
        )
    names = "exclude_modules" if "exclude_modules" in at else "ignore"
    excluded = _strings(at, "exclude_modules") + _strings(at, "ignore")
    at.finish(_INERT | {"config_groups", "group_size"})
    return _scheme(
        at,
        names,
        "modelopt",
        spec,
        "modelopt",
        excluded,
        "tensor",
        "tensor",
        cache=bool(cache or cache_scheme),
    )


def _fbgemm(at: Fields, spec: ModelSpec) -> Scheme:
    bound = at.take("activation_scale_ub", float, default=1200.0)
    if not bound > 0:
        raise at.error("activation_scale_ub", str(bound), "above 0")
    # By default transformers does not quantise the head.
    kept = _strings(at, "modules_to_not_convert", ["lm_head"])
    at.finish(_INERT)
    return _scheme(
        at,
        "modules_to_not_convert",
        "fbgemm_fp8",
        spec,
        "transformers",
        kept,
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
    """Write the `quantization_config` that `read_scheme` reads back as the scheme of `spec`.

    Raises:
        MoecError: the scheme is an artefact's own, or its checkpoint format cannot express it.
    """
    config = _quantization_config(spec)
    wide = spec.model_copy(update={"scheme": None})
    found = spec.model_copy(update={"scheme": read_scheme(config, Path("config.json"), wide)})
    if _effect(found) != _effect(spec):
        assert spec.scheme is not None
        refuse(
            f"spec {spec.name}",
            f"scheme {spec.scheme.name}",
            f"a scheme for weights, inputs and caches that {spec.scheme.layout} can express",
            "keep the model as a spec file (moec spec show)",
        )
    return config


def _effect(spec: ModelSpec) -> object:
    """What the scheme of `spec` does, in a form that can be compared."""
    scheme = spec.scheme
    assert scheme is not None
    rules = {name: (rule.weight, rule.inputs) for name, rule in quantized(spec).items()}
    return rules, scheme.cache, scheme.bound


def _quantization_config(spec: ModelSpec) -> dict[str, Any]:
    scheme, rules = spec.scheme, quantized(spec)
    if scheme is None or scheme.layout == "moec":
        refuse(
            f"spec {spec.name}",
            f"scheme {scheme and scheme.name}",
            "the scheme of an FP8 checkpoint",
            "keep the model as a spec file (moec spec show)",
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


def _strings(at: Fields, key: str, default: Any = ()) -> list[str]:
    found: list[str] = list(at.take(key, list, default=default))
    for each in found:
        if not isinstance(each, str):
            raise at.error(key, shown(each), "a list of module names or patterns")
    return found


def _scheme(
    at: Fields,
    field: str,
    layout: Layout,
    spec: ModelSpec,
    kind: Kind,
    left_out: list[str],
    weight: str,
    inputs: str,
    targets: tuple[Fields, list[str]] | None = None,
    **more: Any,
) -> Scheme:
    """A scheme with one scheme rule, for the weights whose modules are all quantised.

    `field` of `at` lists the modules `left_out`, as `kind` says. `targets` are the modules that a
    format lists as quantised, and where; by default all are.
    """
    names = eligible(spec)
    separate_experts = layout == "compressed-tensors"
    modules = {name: _modules(name, spec, separate_experts) for name in names}
    every = [module for each in modules.values() for module in each]
    kept = set(every)
    if targets:
        kept &= listed(every, targets[1], kind, targets[0], "targets")
    kept -= listed(every, left_out, kind, at, field)
    chosen = [name for name in names if kept.issuperset(modules[name])]
    if not chosen:
        raise at.error(field, "all linear layers are left out", "at least one FP8 linear layer")
    return Scheme.model_validate(
        {
            "name": layout,
            "layout": layout,
            "rules": [{"of": _patterns(chosen, names), "weight": weight, "inputs": inputs}],
            **more,
        }
    )


def _modules(name: str, spec: ModelSpec, separate_experts: bool) -> list[str]:
    """The checkpoint's modules that hold a parameter: one, or one for each separate expert."""
    parts = [name]
    if separate_experts and not name.endswith(".weight"):
        parts = [part for e in range(spec.text.expert_count) for part in separate(name, e)]
    prefix = "language_model." if spec.vision else ""
    return [prefixed(key_of(part), prefix).rpartition(".")[0] for part in parts]


def _patterns(chosen: list[str], names: list[str]) -> list[str]:
    """Patterns that match `chosen` and no other of `names`.

    Where all layers agree, one pattern stands for all of them; elsewhere single names do.
    """
    partial = {family(name) for name in set(names) - set(chosen)}
    return list(dict.fromkeys(n if family(n) in partial else family(n) for n in chosen))
