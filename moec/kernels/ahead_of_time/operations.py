"""The fused ops as operations: what `moec.kernels.torch.ops` launches, for programs.

Inputs and outputs have the names and the order of the ops in `moec.graph_builder.ops`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from moec.kernels.ahead_of_time.quantities import Quantity, blocks, multiple
from moec.kernels.ahead_of_time.variants import (
    EVERY,
    Given,
    Launched,
    Operation,
    Step,
    Variant,
    by_tokens,
)
from moec.kernels.launches import prefill, step
from moec.kernels.launches.attend_many import attend_many
from moec.kernels.launches.descriptors import block_shapes
from moec.kernels.launches.few_tokens import few_linear, few_moe
from moec.kernels.launches.launch import Buffers, Launch, power_of_2
from moec.kernels.launches.many_linear import many_linear
from moec.kernels.sizes import MOST_BATCH, MOST_TOKENS, Heads, Sizes
from moec.spec.errors import refuse

#: the most tokens of a part of a call, which decides how much scratch a call needs
PART = 8192
#: more slots and steps than any model has
LONGEST = 1 << 30
#: about how many multiprocessors a GPU has, which decides how a product is tiled; the result does
#: not depend on it
PROGRAMS = 132
TOKENS = "tokens"

Plan = tuple[tuple[Step, ...], Buffers]
_NO_NORM: dict[str, str | None] = {"skip": None, "gain": None, "total": None}


def moe_layer(sizes: Sizes, most: int = PART) -> Operation:
    """`moe_layer`: one MoE layer, top-1, with a shared expert."""
    dim = sizes.dim

    def launched(tokens: int, architecture: int) -> Plan:
        if tokens > MOST_TOKENS:
            return _prefill(sizes, tokens, architecture)
        launches, written = few_moe(sizes, tokens, architecture)
        return tuple(Step(each, _NO_NORM) for each in launches), written

    given = (_tokens("x", dim), *_weights(sizes))
    return _rowwise("moe_layer", {}, given, (_tokens("out", dim),), launched, most, sizes)


def norm_moe(sizes: Sizes, eps: float, most: int = PART) -> Operation:
    """`norm_moe`: `skip_norm`, then the layer."""
    dim = sizes.dim

    def launched(tokens: int, architecture: int) -> Plan:
        if tokens > MOST_TOKENS:
            return _normed_prefill(sizes, tokens, eps, architecture)
        launches, written = few_moe(sizes, tokens, architecture, eps=eps)
        return tuple(Step(each, {"gain": "weight"}) for each in launches), written

    given = (*_before(dim), *_weights(sizes))
    out = _tokens("out", dim), _tokens("total", dim)
    return _rowwise("norm_moe", {"eps": eps}, given, out, launched, most, sizes)


def norm_moe_norm_fp8(sizes: Sizes, eps: float, most: int = PART) -> Operation:
    """`norm_moe_norm_fp8`: `skip_norm`, the layer, then `skip_norm_fp8`."""
    dim = sizes.dim

    def launched(tokens: int, architecture: int) -> Plan:
        norm = partial(step.skip_norm, dim, tokens, eps, True, True, architecture >= 90)
        total = {"x": "layer_total", "gain": "after", "normed": None}
        if tokens > MOST_TOKENS:
            first, written = _normed_prefill(sizes, tokens, eps, architecture)
            inner = {"total": "layer_total", "out": "layer_out"}
            steps = tuple(_renamed(each, inner) for each in first)
            written |= dict.fromkeys(inner.values(), ((tokens, dim), "bf16"))
            return (*steps, Step(norm(), {**total, "skip": "layer_out"})), written
        launches, written = few_moe(sizes, tokens, architecture, eps=eps, combine=False)
        names = {each: f"layer_{each}" for each in ("total", "codes", "scale")}
        steps = tuple(Step(each, {**names, "gain": "weight"}) for each in launches)
        written = {names.get(name, name): each for name, each in written.items()}
        return (*steps, Step(norm(written["parts"][0][0]), total)), written

    given = (*_before(dim), *_weights(sizes), Given("after", "bf16", (dim,)))
    out = *_codes(dim), _tokens("total", dim)
    return _rowwise("norm_moe_norm_fp8", {"eps": eps}, given, out, launched, most, sizes)


def norm_fp8(dim: int, eps: float) -> Operation:
    """`norm_fp8`: the RMS norm, quantised."""
    names: dict[str, str | None] = {"gain": "weight", "skip": None, "total": None, "normed": None}
    given = _tokens("x", dim), Given("weight", "bf16", (dim,))
    launched = _one(lambda n, pdl: step.skip_norm(dim, n, eps, False, True, pdl), names)
    return _rowwise("norm_fp8", {"eps": eps}, given, _codes(dim), launched)


def rms_norm(dim: int, eps: float) -> Operation:
    """`rms_norm`."""
    names: dict[str, str | None] = {
        **{"gain": "weight", "normed": "out"},
        **dict.fromkeys(("skip", "total", "codes", "scale")),
    }
    given = _tokens("x", dim), Given("weight", "bf16", (dim,))
    launched = _one(lambda n, pdl: step.skip_norm(dim, n, eps, False, False, pdl), names)
    return _rowwise("rms_norm", {"eps": eps}, given, (_tokens("out", dim),), launched)


def skip_norm(dim: int, eps: float) -> Operation:
    """`skip_norm`: the RMS norm of x + skip, and that sum."""
    names: dict[str, str | None] = {"gain": "weight", "codes": None, "scale": None}
    launched = _one(lambda n, pdl: step.skip_norm(dim, n, eps, True, False, pdl), names)
    out = _tokens("normed", dim), _tokens("total", dim)
    return _rowwise("skip_norm", {"eps": eps}, _before(dim), out, launched)


def skip_norm_fp8(dim: int, eps: float) -> Operation:
    """`skip_norm_fp8`: the RMS norm of x + skip, quantised, and that sum."""
    names: dict[str, str | None] = {"gain": "weight", "normed": None}
    launched = _one(lambda n, pdl: step.skip_norm(dim, n, eps, True, True, pdl), names)
    out = *_codes(dim), _tokens("total", dim)
    return _rowwise("skip_norm_fp8", {"eps": eps}, _before(dim), out, launched)


def encode(dim: int) -> Operation:
    """`encode`: x, quantised."""
    launched = _one(lambda n, pdl: step.encode(dim, n, pdl), {})
    return _rowwise("encode", {}, (_tokens("x", dim),), _codes(dim), launched)


def swiglu_fp8(hidden: int) -> Operation:
    """`swiglu_fp8`: silu(gate) * up, quantised."""
    launched = _one(lambda n, pdl: step.swiglu(hidden, n, pdl), {})
    given = (_tokens("hidden", 2 * hidden),)
    return _rowwise("swiglu_fp8", {}, given, _codes(hidden), launched)


def fp8_linear(width: int, dim: int) -> Operation:
    """`fp8_linear`: a product of quantised values."""

    def launched(tokens: int, architecture: int) -> Plan:
        if tokens > MOST_TOKENS:
            launch = many_linear(width, dim, tokens, architecture, PROGRAMS)
            return (Step(replace(launch, grid=(EVERY, 1, 1))),), {}
        return (Step(few_linear(width, dim, tokens, architecture)),), {}

    weight = Given("weight", "fp8e4nv", (width, dim)), Given("weight_scale", "fp32", (width,))
    given = (*_codes(dim), *weight)
    return _rowwise("fp8_linear", {}, given, (_tokens("out", width),), launched)


def attention_fp8(heads: Heads, rope: bool, temperature: bool, eps: float | None) -> Operation:
    """`attention_fp8`, with or without tables for RoPE and a temperature."""
    width, half = heads.heads * heads.size, heads.size // 2
    kinds = rope, eps, temperature
    table = Given("cos", "fp32", ("batch", "steps", half))
    cache = Given("key", "bf16", ("batch", heads.kv_heads, "slots", heads.size))
    inputs = (
        _tokens("qkv", width + 2 * heads.kv_heads * heads.size),
        table if rope else None,
        replace(table, name="sin") if rope else None,
        Given("temperature", "fp32", ("batch", "steps", 1)) if temperature else None,
        cache,
        replace(cache, name="value"),
        Given("last", "i32", ("batch",)),
    )
    kept = (replace(cache, name=f"present_{x}", continues=x) for x in ("key", "value"))
    outputs = (*_codes(width), *kept)
    absent = {} if rope else {"cos": None, "sin": None}
    absent |= {} if temperature else {"temperature": None}

    def one(batch: int, architecture: int) -> Plan:
        pdl = architecture >= 90
        most = max(1, step.PROGRAMS // (batch * heads.kv_heads))
        splits = power_of_2(most + 1) // 2  # powers of 2 alone: each number is two kernels more
        launches, written = step.attend(heads, batch, LONGEST, *kinds, pdl, splits)
        steps = tuple(Step(each, absent) for each in launches)
        return (*steps, Step(step.encode(width, batch, pdl), {"x": "out"})), written

    def many(architecture: int) -> Variant:
        pdl = architecture >= 90
        place = step.rope_append(heads, MOST_TOKENS + 1, *kinds, pdl)
        attend = attend_many(heads, 1, 1, architecture, EVERY)
        rows, longer = attend.constants["ROWS"], attend_many(heads, 1, 1 << 10, architecture, EVERY)
        tiles = Quantity(1) if longer.grid == attend.grid else blocks("steps", rows)
        pack = step.encode(width, MOST_TOKENS + 1, pdl)
        described = {"q": (TOKENS, 1), "key": ("places", heads.kv_heads)}
        described["value"] = described["key"]
        columns = {"q": width, "key": heads.size, "value": heads.size}
        used = {name: described[name] for name in block_shapes(attend)}
        return Variant(
            {"steps": (2, LONGEST)},
            (Step(place, absent), Step(attend), Step(pack, {"x": "out"})),
            (
                (multiple(TOKENS), Quantity(place.grid[1]), Quantity(1)),
                (Quantity(attend.grid[0]), tiles, multiple("batch")),
                (multiple(TOKENS), Quantity(1), Quantity(1)),
            ),
            {name: multiple(TOKENS, 2 * width) for name in ("q", "out")},
            {name: multiple(*each) for name, each in used.items()},
            {name: columns[name] for name in used},
        )

    def variants(architecture: int) -> Iterator[Variant]:
        given, only = (*inputs, *outputs), {"steps": (1, 1)}
        yield from by_tokens(one, given, MOST_BATCH, architecture, "batch", only)
        yield many(architecture)

    constants: dict[str, int | float] = {"heads": heads.heads, "kv_heads": heads.kv_heads}
    constants |= {} if eps is None else {"eps": eps}
    return Operation("attention_fp8", constants, inputs, outputs, 0, variants)


def _rowwise(
    name: str,
    constants: dict[str, int | float],
    inputs: tuple[Given, ...],
    outputs: tuple[Given, ...],
    launched: Launched,
    most: int = PART,
    sizes: Sizes | None = None,
) -> Operation:
    """An operation whose tokens do not depend on one another."""
    if most < 1:
        refuse("tokens of a program", most, "at least 1", "choose more")
    if sizes and not prefill.fits(sizes):
        most = min(most, MOST_TOKENS)

    def variants(architecture: int) -> Iterator[Variant]:
        return by_tokens(launched, (*inputs, *outputs), most, architecture)

    return Operation(name, constants, inputs, outputs, most, variants)


def _one(launch: Callable[[int, bool], Launch], names: dict[str, str | None]) -> Launched:
    """One launch, which `launch` gives for a number of tokens and whether it may start early."""
    return lambda tokens, architecture: ((Step(launch(tokens, architecture >= 90), names),), {})


def _tokens(name: str, width: int) -> Given:
    return Given(name, "bf16", (TOKENS, width))


def _codes(width: int) -> tuple[Given, Given]:
    return Given("codes", "fp8e4nv", (TOKENS, width)), Given("scale", "fp32", (TOKENS,))


def _before(dim: int) -> tuple[Given, ...]:
    return _tokens("x", dim), _tokens("skip", dim), Given("weight", "bf16", (dim,))


def _weights(sizes: Sizes) -> tuple[Given, ...]:
    dim, hidden, experts = sizes.dim, sizes.hidden, sizes.experts + 1
    return (
        Given("router", "bf16", (sizes.experts, dim)),
        Given("gate_up", "fp8e4nv", (experts, 2 * hidden, dim)),
        Given("gate_up_scale", "fp32", (experts, 2 * hidden)),
        Given("down", "fp8e4nv", (experts, dim, hidden)),
        Given("down_scale", "fp32", (experts, dim)),
    )


def _prefill(sizes: Sizes, tokens: int, architecture: int) -> Plan:
    """The layer for many tokens, on its input "x"."""
    tiles = prefill.tiles_for(architecture, EVERY)
    launches = prefill.prefill_moe(sizes, tokens, tiles)
    return tuple(map(Step, launches)), prefill.scratch(sizes, tokens, tiles)


def _normed_prefill(sizes: Sizes, tokens: int, eps: float, architecture: int) -> Plan:
    """`skip_norm` for many tokens, then the layer; "total" and "out" are the results."""
    dim = sizes.dim
    norm = step.skip_norm(dim, tokens, eps, True, False, architecture >= 90)
    layer, written = _prefill(sizes, tokens, architecture)
    first = Step(norm, {"gain": "weight", "codes": None, "scale": None})
    written["normed"] = (tokens, dim), "bf16"
    return (first, *(_renamed(each, {"x": "normed"}) for each in layer)), written


def _renamed(each: Step, names: dict[str, str]) -> Step:
    """The step on buffers of other names."""
    found = {name: each.buffer(name) for name in each.launch.arguments}
    return Step(each.launch, {k: names.get(v, v) if v else v for k, v in found.items()})
