"""Read a checkpoint's `quantization_config` or `hf_quant_config.json` into a scheme, and write it.

The supported formats are FP8 of compressed-tensors, of ModelOpt, of transformers' fbgemm layout and
in square blocks, and 4-bit integers of compressed-tensors. Each format lists the modules that it
does not quantise, by names or by patterns of its own kind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.spec.errors import MoecError, refuse
from moec.spec.fields import Fields, read_own_json, shown
from moec.spec.hf.compressed_tensors import ignored, read_compressed_tensors, write_group
from moec.spec.hf.modules import INERT, NEXT, modules, scheme_of, square, strings
from moec.spec.model import ModelSpec
from moec.spec.scheme import Scheme
from moec.spec.tensors import eligible, quantized

#: ModelOpt's own file; newer exports have the same fields in config.json
HF_QUANT = "hf_quant_config.json"


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
        inner = Fields(str(own), read_own_json(own), NEXT).take("quantization", dict)
        raw, where = {"quant_method": "modelopt", **inner}, f"{own}: quantization"
    if not isinstance(raw, dict):
        raise Fields(str(config), {}, NEXT).error("quantization_config", shown(raw), "an object")
    fields = Fields(where, raw, NEXT)
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
        refuse(f"{where}, {error.where}", error.found, error.expected, NEXT)
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
    excluded = strings(at, "exclude_modules") + strings(at, "ignore")
    at.finish(INERT | {"config_groups", "group_size"})
    return scheme_of(
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
    kept = strings(at, "modules_to_not_convert", ["lm_head"])
    at.finish(INERT)
    return scheme_of(
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


def _fine_grained(at: Fields, spec: ModelSpec) -> Scheme:
    """Square blocks, as DeepSeek publishes them and transformers writes them."""
    if spec.text.experts and not spec.separate_experts:
        expected = "experts with tensors of their own, as such checkpoints have"
        raise at.error("quant_method", "fp8, for experts in one tensor", expected)
    at.require("fmt", "e4m3", default="e4m3")
    at.require("activation_scheme", "dynamic", default="dynamic")
    size = square(at, "weight_block_size")
    kept = strings(at, "modules_to_not_convert", ["lm_head"])
    at.finish(INERT)
    return scheme_of(
        at,
        "modules_to_not_convert",
        "fp8",
        spec,
        "transformers",
        kept,
        "block",
        "group",
        routers=False,  # they are no linear layers in transformers, and no list names them
        block=size,
    )


_READERS: dict[str, Callable[[Fields, ModelSpec], Scheme]] = {
    "compressed-tensors": read_compressed_tensors,
    "modelopt": _modelopt,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fine_grained,
}


def write_scheme(spec: ModelSpec) -> dict[str, Any]:
    """Write the `quantization_config` that `read_scheme` reads back as the scheme of `spec`.

    Raises:
        MoecError: the scheme is an artefact's own, or its checkpoint format cannot express it.
    """
    config = _quantization_config(spec)
    wide = spec.model_copy(update={"scheme": None})
    try:
        read = read_scheme(config, Path("config.json"), wide)
    except MoecError:
        read = None
    if read is None or _effect(wide.model_copy(update={"scheme": read})) != _effect(spec):
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
            "the scheme of a quantised checkpoint",
            "keep the model as a spec file (moec spec show)",
        )
    kept = [
        module
        for name in eligible(spec)
        if name not in rules
        for module in modules(name, spec, scheme.separate_experts)
    ]
    if scheme.layout == "fbgemm_fp8":
        return {
            "quant_method": scheme.layout,
            "activation_scale_ub": scheme.bound,
            "modules_to_not_convert": kept,
        }
    if scheme.layout == "fp8":
        return {
            "quant_method": scheme.layout,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [scheme.block, scheme.block],
            "modules_to_not_convert": kept,
        }
    if scheme.layout == "modelopt":
        return {
            "quant_method": scheme.layout,
            "quant_algo": "FP8",
            "ignore": kept,
            **(
                {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
                if scheme.cache
                else {}
            ),
        }
    modules_in_fp8 = [m for name in rules for m in modules(name, spec, scheme.separate_experts)]
    return {**write_group(scheme), "ignore": ignored(kept, modules_in_fp8)}
