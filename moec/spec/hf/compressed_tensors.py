"""compressed-tensors' own formats: FP8, and integers of four bits (`pack-quantized`)."""

from typing import Any

from moec.spec.fields import REQUIRED, Fields, shown
from moec.spec.hf.modules import INERT, NEXT, scheme_of, square, strings
from moec.spec.hf.names import DECODER, TOWER
from moec.spec.model import ModelSpec
from moec.spec.scheme import INT4, STATIC, Scheme

FLOAT = "float-quantized"
#: other formats by their names, and what they are
_OTHERS = {
    "int-quantized": "8-bit integers, for inputs too",
    "naive-quantized": "one integer or float a value",
    "nvfp4-pack-quantized": "NVFP4: 4-bit floats in blocks of 16",
    "mxfp4-pack-quantized": "MXFP4: 4-bit floats in blocks of 32",
    "mxfp8-quantized": "MXFP8: 8-bit floats in blocks of 32",
    "marlin-24": "4-bit integers, two of four values zero",
    "mixed-precision": "another format for each group of layers",
}
#: the orders of activations that leave groups of neighbours; others need an index, `weight_g_idx`
_IN_ORDER = ("weight", "static")


def read_compressed_tensors(at: Fields, spec: ModelSpec) -> Scheme:
    """The scheme of a `quantization_config` of compressed-tensors.

    Raises:
        MoecError: its format, or a field of it, is not supported.
    """
    kind = at.take("format", str)
    if kind not in (FLOAT, INT4):
        what = f" ({_OTHERS[kind]})" if kind in _OTHERS else ""
        raise at.error("format", f"{shown(kind)}{what}", f"{FLOAT!r} or {INT4!r}")
    groups = at.take("config_groups", dict)
    if len(groups) != 1:
        raise at.error("config_groups", f"{len(groups)} groups", "one")
    (name,) = groups
    group = Fields(f"{at.where}.config_groups", groups, NEXT).inner(name)
    group.require("format", kind, default=kind)
    found = _integers(at, group) if kind == INT4 else _floats(at, group)
    targets, ignored = strings(group, "targets", REQUIRED), strings(at, "ignore")
    for each, key in ((group, "output_activations"), (at, "transform_config")):
        if value := each.take(key, dict, default={}):
            expected = "no such field, because it would change the arithmetic"
            raise each.error(key, str(value)[:80], expected)
    sparse = Fields(
        f"{at.where}.sparsity_config", at.take("sparsity_config", dict, default={}), NEXT
    )
    sparse.require("format", "dense", default="dense")
    group.finish(INERT | {"input_activations"})  # null where inputs are not quantised
    at.finish(INERT | {"kv_cache_scheme"})
    return scheme_of(
        at,
        "ignore",
        INT4 if kind == INT4 else "compressed-tensors",
        spec,
        "compressed-tensors",
        ignored,
        targets=(group, targets),
        routers=False,  # they are no linear layers in transformers 5: `ignore` need not name them
        scales=spec.dtype,  # the library's default; the stored tensors may have another type
        **found,
    )


def _floats(at: Fields, group: Fields) -> dict[str, Any]:
    """What the group of an FP8 checkpoint says of weights, inputs and caches."""
    weights, block = _e4m3(_fixed(group.inner("weights")), ("channel", "tensor", "block"))
    inputs = "none"
    if "input_activations" in group:
        given = group.inner("input_activations")
        dynamic = given.take("dynamic", bool, default=False)
        if block and not dynamic:
            raise given.error("dynamic", "False", "true beside blocks: a scale for each group")
        along = "group" if block else "token" if dynamic else "tensor"
        inputs, size = _e4m3(given, (along,))
        if size != block:
            raise group.error("input_activations", f"groups of {size}", f"{block}, as for weights")
        inputs = "expert" if inputs == "tensor" else inputs
    cache = "kv_cache_scheme" in at
    if cache:
        _e4m3(_fixed(at.inner("kv_cache_scheme")), ("tensor",), default="tensor")
    sizes = {"block": block} if block else {}
    weight = "expert" if weights == "tensor" else weights
    return {"weight": weight, "inputs": inputs, "cache": cache, **sizes}


def _integers(at: Fields, group: Fields) -> dict[str, Any]:
    """What the group of a checkpoint of 4-bit integers says of its weights."""
    for each, key in ((group, "input_activations"), (at, "kv_cache_scheme")):
        if value := each.take(key, dict, default={}):
            raise each.error(key, shown(value), "none beside 4-bit integers: weights alone")
    weights = group.inner("weights")
    weights.require("num_bits", 4)
    weights.require("type", "int")
    weights.require("dynamic", False, default=False)
    symmetric: bool = weights.take("symmetric", bool, default=True)
    order = weights.take("actorder", str, bool, default=None)
    if order not in (None, *_IN_ORDER):
        expected = f"none or {' or '.join(map(repr, _IN_ORDER))}: no index of groups"
        raise weights.error("actorder", shown(order), expected)
    strategy: str = weights.take("strategy", str)
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", shown(strategy), "'group' or 'channel'")
    found = {"inputs": "none", "zero_points": not symmetric}
    if strategy == "channel":
        weights.finish(INERT | {"group_size", "block_structure"})
        return {"weight": "output", **found}
    size: int = weights.take("group_size", int)
    if not 2 <= size <= 1024:
        raise weights.error("group_size", str(size), "2 to 1024")
    weights.finish(INERT | {"block_structure"})
    return {"weight": "group", "block": size, **found}


def _fixed(at: Fields) -> Fields:
    """The same fields, whose scales are stored."""
    at.require("dynamic", False, default=False)
    return at


def _e4m3(
    at: Fields, strategies: tuple[str, ...], default: Any = REQUIRED
) -> tuple[str, int | None]:
    """Read the strategy of symmetric E4M3 values, one of `strategies`, and the size of its blocks.

    The size is None where the strategy has no blocks or groups.
    """
    at.require("num_bits", 8)
    at.require("type", "float")
    at.require("symmetric", True, default=True)
    strategy: str = at.take("strategy", str, default=default)
    if strategy not in strategies:
        raise at.error("strategy", repr(strategy), " or ".join(map(repr, strategies)))
    size = None
    if strategy == "block":
        size = square(at, "block_structure")
    elif strategy == "group":
        size = at.take("group_size", int)
    at.finish(INERT | {"group_size", "block_structure"})
    return strategy, size


def write_group(scheme: Scheme) -> dict[str, Any]:
    """The fields of a `quantization_config` that say how numbers are stored, for `scheme`."""
    rule, bits = scheme.rules[0], {"num_bits": 4 if scheme.int4 else 8}
    number: dict[str, Any] = {**bits, "type": "int" if scheme.int4 else "float"}
    strategy = {"expert": "tensor", "output": "channel"}.get(rule.weight, rule.weight)
    weights = {**number, "strategy": strategy, "dynamic": False}
    weights["symmetric"] = not scheme.zero_points
    if rule.weight == "group":
        weights["group_size"] = scheme.block
    if rule.weight == "block":
        weights["block_structure"] = [scheme.block, scheme.block]
    static = rule.inputs in STATIC
    along = "tensor" if static else rule.inputs
    inputs = {**number, "strategy": along, "dynamic": not static, "symmetric": True}
    if rule.inputs == "group":
        inputs["group_size"] = scheme.block
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if rule.inputs == "none" else inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": INT4 if scheme.int4 else FLOAT,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": number if scheme.cache else None,
    }


def ignored(kept: list[str], quantised: list[str]) -> list[str]:
    """The field `ignore` for the modules `kept`, of which none is among `quantised`.

    Engines disagree on what is before `model.`, and some join modules under names of their own.
    Where all layers agree, an expression stands for them, so that every spelling matches.
    """
    taken = set(map(_of_all_layers, quantised))
    tower = () if any(each.startswith(TOWER[0]) for each in quantised) else TOWER[0]
    found = [
        f"re:.*{TOWER[0].replace('.', '[.]')}.*"
        if each.startswith(tower)
        else each
        if (family := _of_all_layers(each)) in taken
        else f"re:{family}"
        for each in kept
    ]
    return list(dict.fromkeys(found))


def _of_all_layers(module: str) -> str:
    """An expression for a module in every layer, whatever is before it."""
    parts = module.split(".layers.", 1)
    if len(parts) == 1:
        return f".*{module.removeprefix(DECODER).replace('.', '[.]')}$"
    inner = parts[1].partition(".")[2].replace(".", "[.]")
    return f".*layers[.][0-9]+[.]{inner}$"
