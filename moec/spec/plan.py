"""The cost of a model before anyone builds it: bytes, cache sizes, FLOPs and roofline times.

The times are lower bounds, not forecasts. They count each weight once per step, ignore activations
and norms, and assume that the router chooses experts uniformly. The rates of a device are those
that large copies and matrix products reached on it.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from moec.spec import names
from moec.spec.data import BYTES
from moec.spec.errors import MoecError
from moec.spec.files import load_scheme, load_spec
from moec.spec.model import LayerSpec, ModelSpec, TextSpec
from moec.spec.mtp.layer import stored_layers
from moec.spec.mtp.model import without_mtp
from moec.spec.parameters import text_parameters, vision_parameters
from moec.spec.plan_ranks import (
    check_shared,
    collective_bytes,
    collectives,
    largest,
    least_gpus,
)
from moec.spec.scheme import Scheme
from moec.spec.tensors import quantized, scale_shape


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in bytes, bandwidth in bytes/s, and the rate of matrix products in FLOP/s."""

    memory: float
    bandwidth: float
    flops: dict[str, float]


#: the rates were measured with large copies and large square matrix products, the products on h200
#: alone: an h100 has the same cores
DEVICES = {
    "h200": Device(139 * 2**30, 4.3e12, {"bf16": 790e12, "fp16": 790e12, "fp8": 1500e12}),
    "h100": Device(78 * 2**30, 3.0e12, {"bf16": 790e12, "fp16": 790e12, "fp8": 1500e12}),
}

#: bytes of one weight; integers include their share of a float32 scale for each block of 64
_BYTES = {name: BYTES[name] for name in ("fp32", "fp16", "bf16", "fp8", "int8", "int4")}
_BYTES |= {name: BYTES[name] + BYTES["fp32"] / 64 for name in ("int8", "int4")}
#: bytes of one weight of embedding, router or norms, which integer precisions do not quantise
_WIDE = {"int8": 4, "int4": 4}
#: the default scheme for unquantised weights: every linear layer in FP8
SCHEME = "dynamic"


@dataclass(frozen=True, slots=True)
class Plan:
    """The costs of one setting: bytes, FLOPs, and lower bounds of times in milliseconds.

    Times, `fits` and `least_gpus` are None if no device was named. If several GPUs share the model,
    all costs are those of the GPU that needs most.
    """

    model: str
    precision: str
    batch: int
    context: int
    device: str | None
    weights_bytes: int
    cache_bytes: int
    full_cache_bytes: int
    fits: bool | None
    experts_read: float
    decode_read_bytes: int
    decode_flops: int
    decode_ms: float | None
    prefill_flops: int
    prefill_ms: float | None
    tiles: int
    vision_bytes: int
    vision_flops: int
    vision_ms: float | None
    gpus: int = 1
    collectives: int = 0
    collective_bytes: int = 0
    least_gpus: int | None = None

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data, for JSON."""
        return asdict(self)


def plan(
    spec: str | Path | ModelSpec,
    precision: str | None = None,
    *,
    context: int = 8192,
    batch: int = 1,
    device: str | None = None,
    tiles: int = 0,
    scheme: str | Path | Scheme | None = None,
    gpus: int = 1,
) -> Plan:
    """Compute the cost of the text model at `batch` sequences of `context` tokens.

    `tiles` adds the cost of that many image tiles in the vision tower.

    A checkpoint folder counts by its config.json; for the types of its tensors, give
    `moec.load_spec(folder)`, as the command does.

    The default precision is "fp8" for a model with FP8 weights, "int4" for one with 4-bit weights,
    else "bf16". In fp8 the scheme
    decides about weights and caches: the model's own scheme, or `scheme`, which is "dynamic" by
    default. "dynamic" takes one byte for each weight of a linear layer or expert and leaves
    embedding, head, router, norms and caches in bf16. In int8 and int4, embedding, router, norms
    and caches are fp32. In int4, attention and head are int8. A model that is int4 already keeps
    its own types of weights.

    A spec with `text.mtp` "built" has the weights and the cache of its layer of multi-token
    prediction too (`moec.load_spec(..., mtp=True)`). Steps and prefill are those without drafts.

    In the result, `decode_*` is one step of the whole batch, and `prefill_*` is one prompt of
    `context` tokens. `full_cache_bytes` is the size that the cache would have if chunked layers
    kept all tokens. `vision_*` is the tower with its projector, which fp8 leaves in bf16. `fits`
    counts the weights of the tower only if `tiles` is above 0. The tokens of the tiles are part of
    the context.

    If several `gpus` share the model (`moec.spec.sharding`), the result is that of the GPU that
    needs most; the tower is on all of them. `collectives` counts the sums and gathers over all GPUs
    in a decode step, and `collective_bytes` is what a GPU sends to each other one for them. No time
    includes these. `least_gpus` is the smallest of 1, 2, 4 and 8 GPUs that can share the model and
    have room for it; None if there is none. Only FP8 models can be shared. A build asks for more
    than a plan: target torch must have fused programs for the model and its scheme.

    Raises:
        MoecError: unknown precision or device; a size below 1; more image tokens than the contexts
            hold; tiles for a model without a vision tower; or GPUs that cannot share the model.
    """
    spec = load_spec(spec)
    precision = precision or (spec.scheme.precision if spec.scheme else "bf16")
    if spec.scheme and scheme is not None:
        raise _error(
            "scheme",
            f"{scheme}, but the weights are {spec.scheme.precision.upper()} already, by scheme "
            f"{spec.scheme.name}",
            f"no --scheme for {spec.scheme.precision.upper()} weights",
        )
    if spec.scheme and spec.scheme.precision != precision:
        own = spec.scheme.precision
        raise _error("precision", f"{precision}, with an {own.upper()} scheme", own)
    if precision == "fp8":
        spec = spec.model_copy(update={"scheme": spec.scheme or load_scheme(scheme or SCHEME)})
    elif scheme:
        raise _error("precision", f"{precision}, with an FP8 scheme", "fp8")
    if precision not in _BYTES:
        raise _error("precision", precision, f"one of {', '.join(_BYTES)}")
    if device is not None and (device not in DEVICES or precision not in DEVICES[device].flops):
        raise _error(
            "device",
            f"{device} at {precision}",
            f"{', '.join(DEVICES)}, at bf16, fp16 or fp8",
        )
    if context < 1 or batch < 1:
        raise _error("context and batch", f"context {context}, batch {batch}", "at least 1 each")
    if tiles < 0 or (tiles and spec.vision is None):
        raise _error("tiles", tiles, "0 or more, and a model with a vision tower")
    if spec.vision and tiles * spec.vision.tokens > context * batch:
        found = f"{tiles}, which are {tiles * spec.vision.tokens} tokens"
        raise _error("tiles", found, f"at most the {context * batch} tokens of all contexts")
    check_shared(spec, precision, gpus)
    whole, spec = spec, largest(spec, gpus)
    text = spec.text
    sizes = {name: math.prod(shape) for name, shape in text_parameters(spec).items()}
    weights = _weights(spec, precision)
    count, k = (text.experts.count, text.experts.top_k) if text.experts else (1, 0)
    read = count * (1 - (1 - k / count) ** batch)
    cache = _caches(spec, precision, context) * batch

    decoder = without_mtp(spec)
    stepped = [
        name
        for name in text_parameters(decoder)
        if text.tie_embeddings or name != names.EMBED_WEIGHT
    ]
    share = {name: 1.0 if not names.is_routed(name) else read / count for name in stepped}
    decode_read = sum(weights[n] * share[n] for n in stepped)
    decode_read += _caches(decoder, precision, context) * batch
    active = sum(sizes[n] * (k / count if names.is_routed(n) else 1) for n in stepped)
    head = text.vocab * text.dim
    decode_attention = text.pair_flops * sum(_kept(decoder.text, context))
    decode_flops = batch * (2 * active + decode_attention)

    linear = 2 * (active - head) * context
    attention = sum(text.pair_flops * _pairs(context, la) for la in text.all_layers)
    chosen = count * (1 - (1 - k / count) ** context)
    prefill_read = sum(
        weights[n] * (chosen / count if names.is_routed(n) else 1)
        for n in stepped
        if n != names.HEAD_WEIGHT
    )
    tower = {"fp8": "bf16", "int8": "fp32", "int4": "fp32"}.get(precision, precision)
    vision_bytes = round(_BYTES[tower]) * sum(
        math.prod(s) for s in vision_parameters(spec).values()
    )
    vision_flops = tiles * _tile_flops(spec)
    on = DEVICES[device] if device else None
    room = on.memory - (vision_bytes if tiles else 0) if on else 0

    def fits(own: ModelSpec) -> bool:
        caches = _caches(own, precision, context) * batch
        return _total(_weights(own, precision)) + caches <= room

    return Plan(
        model=spec.name,
        precision=precision,
        batch=batch,
        context=context,
        device=device,
        weights_bytes=_total(weights),
        cache_bytes=cache,
        full_cache_bytes=_per_key(spec, precision) * batch * context * len(_kept(text, 1)),
        fits=None if on is None else _total(weights) + cache <= room,
        experts_read=read,
        decode_read_bytes=round(decode_read),
        decode_flops=round(decode_flops),
        decode_ms=None
        if on is None
        else 1e3 * max(decode_read / on.bandwidth, decode_flops / on.flops[precision]),
        prefill_flops=round(linear + attention),
        prefill_ms=None
        if on is None
        else 1e3
        * max(
            linear / on.flops[precision] + attention / on.flops["bf16"],
            prefill_read / on.bandwidth,
        ),
        tiles=tiles,
        vision_bytes=vision_bytes,
        vision_flops=vision_flops,
        vision_ms=None
        if on is None or not tiles
        else 1e3 * max(vision_flops / on.flops[tower], vision_bytes / on.bandwidth),
        gpus=gpus,
        collectives=collectives(text, gpus),
        collective_bytes=collective_bytes(text, gpus, batch),
        least_gpus=None if on is None else least_gpus(whole, precision, fits),
    )


def _weights(spec: ModelSpec, precision: str) -> dict[str, float]:
    """Bytes of each parameter of the text model, with its scales."""
    sizes = {name: math.prod(shape) for name, shape in text_parameters(spec).items()}
    if spec.scheme:
        width = _own_widths(spec, sizes)
    else:
        width = {name: _width(name, precision) for name in sizes}
    return {name: sizes[name] * width[name] for name in sizes}


def _total(weights: dict[str, float]) -> int:
    """Bytes of all weights of the text model."""
    return round(sum(weights.values()))


def _caches(spec: ModelSpec, precision: str, context: int) -> int:
    """Bytes of the caches of one sequence."""
    return _per_key(spec, precision) * sum(_kept(spec.text, context))


def _per_key(spec: ModelSpec, precision: str) -> int:
    """Bytes of what one layer's cache keeps of one token."""
    element = 4 if precision in ("fp32", "int8", "int4") else 2
    if spec.scheme and spec.scheme.cache:
        element = 1
    return sum(each.width for each in spec.text.layer(0).caches) * element


def _kept(text: TextSpec, context: int) -> list[int]:
    """How many of `context` tokens each layer's cache keeps."""
    return [min(each.kept or context, context) for each in stored_layers(text)]


def _tile_flops(spec: ModelSpec) -> int:
    """FLOPs of the matrix products of vision tower, adapter and projector for one image tile."""
    vision = spec.vision
    if vision is None:
        return 0
    rows = vision.side**2 + 1  # patches and the class token
    linear = 0
    for name, shape in vision_parameters(spec).items():
        if name == names.PATCH_WEIGHT:
            linear += 2 * math.prod(shape) * (rows - 1)
        elif len(shape) == 2 and name != names.POSITIONS:
            linear += 2 * math.prod(shape) * (rows if ".layers." in name else vision.tokens)
    return linear + 4 * rows * rows * vision.dim * vision.layers


def _width(name: str, precision: str) -> float:
    if precision not in _WIDE:
        return _BYTES[precision]
    small = names.is_norm(name) or names.is_router(name) or names.is_bias(name)
    if small or name == names.EMBED_WEIGHT:
        return _WIDE[precision]
    if name == names.HEAD_WEIGHT:
        return _BYTES["int8"]
    sensitive = names.of_attention(name) or names.is_mtp_join(name)
    return _BYTES["int8" if precision == "int4" and sensitive else precision]


def _own_widths(spec: ModelSpec, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes of one weight of each parameter, as the scheme stores it, with its share of scales."""
    scheme, rules, shapes = spec.scheme, quantized(spec), text_parameters(spec)
    assert scheme is not None
    found = {name: float(_BYTES[spec.stored(name)]) for name in sizes}
    for name in rules.keys() & sizes.keys():
        scales = math.prod(scale_shape(shapes[name], rules[name].weight, scheme.block))
        each = _BYTES[scheme.scales] + BYTES["int4"] * scheme.zero_points
        found[name] = BYTES[scheme.precision] + scales * each / sizes[name]
    return found


def _pairs(context: int, layer: LayerSpec) -> float:
    """The number of query-key pairs that a layer's mask over `context` tokens lets through.

    Tokens of a chunked layer attend within their chunk only: each chunk counts as half a square. A
    sliding window is that of the last token, less what the first tokens lack.
    """
    if layer.kept is None or layer.kept >= context:
        return context**2 / 2
    if layer.window:
        return layer.window * context - layer.window**2 / 2
    whole, rest = divmod(context, layer.kept)
    return (whole * layer.kept**2 + rest**2) / 2


def _error(what: str, found: object, expected: str) -> MoecError:
    return MoecError(f"plan: {what}", found, expected, "moec plan --help")
