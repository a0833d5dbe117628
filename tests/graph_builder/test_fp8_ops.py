"""FP8 ops against numpy and ml_dtypes, an implementation of E4M3 that shares no code with torch."""

import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from moec.graph_builder import ops
from moec.graph_builder.types import TensorType
from moec.spec.errors import MoecError
from moec.spec.scheme import INPUTS, STATIC, WEIGHTS
from moec.spec.tensors import scale_shape
from tests.routes import by

E4M3 = ml_dtypes.float8_e4m3fn
ALL = np.arange(256, dtype=np.uint8)
#: the finite magnitudes, ascending: 0, the subnormals, ... 448
LADDER = ALL[:127].view(E4M3).astype(np.float32)
#: halfway between two neighbours, and where saturation ends what rounding would do
MIDDLE = (LADDER[1:] + LADDER[:-1]) / 2
BEYOND = np.float32(464)  # as if 480 were a code
ONE = torch.tensor(1.0)


def _bits(codes: Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy()


def _quantize(values: np.ndarray) -> np.ndarray:
    """The bits of `values` [N] at scale 1."""
    found = ops.quantize.target(torch.from_numpy(values.astype(np.float32)), ONE, 0, 1)
    return _bits(found)


def _theirs(values: np.ndarray) -> np.ndarray:
    return np.clip(values.astype(np.float32), -448, 448).astype(E4M3)


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- the grid


def test_all_codes_come_back() -> None:
    codes = torch.from_numpy(ALL.copy()).view(ops.FP8)
    wide = ops.dequantize.target(codes, ONE, 0, 1, "fp32")
    assert np.array_equal(wide.numpy(), ALL.view(E4M3).astype(np.float32), equal_nan=True)
    for name in ("fp32", "fp16", "bf16"):  # each of them holds every code exactly
        again = ops.quantize.target(ops.dequantize.target(codes, ONE, 0, 1, name), ONE, 0, 1)
        nan = (ALL & 0x7F) == 0x7F
        assert np.array_equal(_bits(again)[~nan], ALL[~nan]) and again.float().isnan().sum() == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_the_middle_of_two_codes_goes_to_the_even_one(sign: int) -> None:
    negative = 0 if sign > 0 else 0x80
    lower = np.arange(126) | negative
    even = lower + lower % 2
    assert np.array_equal(_quantize(sign * MIDDLE), even)
    assert np.array_equal(_quantize(sign * np.nextafter(MIDDLE, 0)), lower)
    assert np.array_equal(_quantize(sign * np.nextafter(MIDDLE, BEYOND)), lower + 1)
    assert MIDDLE[0] == 2.0**-10, "half the smallest subnormal, which goes to zero"


def test_any_number_rounds_as_in_ml_dtypes() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(20_000) * 2.0 ** generator.integers(-14, 11, 20_000)
    assert np.array_equal(_quantize(values), _theirs(values).view(np.uint8))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (448.0, 0x7E),
        (float(np.nextafter(BEYOND, np.float32(0))), 0x7E),
        (float(BEYOND), 0x7E),
        (465.0, 0x7E),
        (1e30, 0x7E),
        (np.inf, 0x7E),
        (-464.0, 0xFE),
        (-1e30, 0xFE),
        (-np.inf, 0xFE),
        (0.0, 0x00),
        (-0.0, 0x80),
        (1e-40, 0x00),
    ],
)
def test_what_is_beyond_saturates(value: float, code: int) -> None:
    assert _quantize(np.array([value])).tolist() == [code]


def test_nan_stays_nan() -> None:
    assert (_quantize(np.array([np.nan])) & 0x7F).tolist() == [0x7F]
    assert ops.token_scale.target(torch.tensor([[1.0, torch.nan]]), 0, 2.0).isnan().all()


# ---------------------------------------------------------------- scales

#: shape of the values, of the scale, axis, block
SCALES = [
    ((5, 7), (), 0, 4),
    ((5, 7), (5,), 0, 4),
    ((5, 7), (7,), 1, 4),
    ((6,), (6,), 0, 1),
    ((2, 3, 4), (3,), 1, 1),
    ((8, 12), (2, 3), 0, 4),
    ((5, 7), (2, 2), 0, 4),
    ((5, 7), (5, 2), 0, 4),
    ((5, 7), (2, 7), 0, 4),
    ((5, 7), (1, 1), 0, 16),
    ((5, 7), (5, 7), 0, 1),
    ((2, 5, 7), (2, 2, 2), 0, 4),
    ((0, 7), (0,), 0, 4),
    ((0, 7), (0, 2), 0, 4),
]


def _scale_at(scale: np.ndarray, shape: tuple[int, ...], at: Any, axis: int, block: int) -> float:
    if scale.ndim < 2:
        return float(scale[at[axis]] if scale.ndim else scale)
    sizes = zip(at, scale.shape, shape, strict=True)
    return float(scale[tuple(i if have == size else i // block for i, have, size in sizes)])


@pytest.mark.parametrize(("shape", "scales", "axis", "block"), SCALES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_each_value_has_its_scale(
    shape: tuple[int, ...], scales: tuple[int, ...], axis: int, block: int, dtype: str
) -> None:
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    x = _random(*shape, scale=3).to(kind)
    scale = (_random(*scales, seed=1).abs() * 0.05 + 0.01).to(kind)
    codes = ops.quantize.target(x, scale, axis, block)
    wide = ops.dequantize.target(codes, scale, axis, block, dtype)
    expected, product = np.zeros(shape), np.zeros(shape)
    for at in np.ndindex(*shape):
        one = _scale_at(scale.double().numpy(), shape, at, axis, block)
        # A quotient or product of float32 in float64 rounds to what float32 gives.
        expected[at] = _theirs(np.array(x.double().numpy()[at] / one)).astype(np.float64)
        product[at] = expected[at] * one
    assert np.array_equal(codes.double().numpy(), expected)
    assert torch.equal(wide, torch.from_numpy(product).float().to(kind))


@pytest.mark.parametrize(("width", "group"), [(8, 0), (8, 4), (7, 4), (7, 16), (7, 1)])
@pytest.mark.parametrize("bound", [None, 1.5])
def test_a_token_scale_makes_the_largest_element_448(
    width: int, group: int, bound: float | None
) -> None:
    x = _random(6, width, scale=2)
    x[2] = 0
    found = ops.token_scale.target(x, group, bound)
    step = group or width
    for row, at in itertools.product(range(6), range(-(-width // step))):
        largest = max(abs(each) for each in x[row, at * step : (at + 1) * step].tolist())
        largest = min(largest, bound or largest)
        expected = max(np.float32(largest) / np.float32(448), np.float32(1e-12))
        assert found[(row, at) if group else row].item() == expected
    codes = ops.quantize.target(x, found, 0, group or 1)
    largest_codes = {0x7E, 0xFE}
    for row in (0, 1, 3, 4, 5):
        assert largest_codes & set(_bits(codes[row]).tolist())
    assert not codes[2].float().any(), "a token of zeros stays zero"


# ---------------------------------------------------------------- experts

COUNT, DIM, HIDDEN, BLOCK, BOUND = 3, 10, 6, 4, 1.5


def _codes(*shape: int, seed: int) -> Tensor:
    return _random(*shape, seed=seed, scale=100).clamp(-448, 448).to(ops.FP8)


def _scales(shape: tuple[int, ...], seed: int) -> Tensor:
    return _random(*shape, seed=seed).abs() * 0.002 + 0.001


def _fused(grid: str) -> list[list[Tensor]]:
    """gate_up and its scale, down and its scale."""
    found = []
    for seed, shape in enumerate([(COUNT, DIM, 2 * HIDDEN), (COUNT, HIDDEN, DIM)]):
        scale = _scales(scale_shape(shape, grid, BLOCK), seed + 10)
        found += [[_codes(*shape, seed=seed)], [scale]]
    return found


def _statics(inputs: str) -> tuple[list[Tensor], list[Tensor]]:
    if inputs not in STATIC:
        return [], []
    shape = (COUNT,) if inputs == "expert" else ()
    return [_scales(shape, 20) * 3], [_scales(shape, 21) * 3]


def _routed(top_k: int) -> tuple[Tensor, Tensor, Tensor, str]:
    x = _random(7, DIM, seed=3)
    return x, *ops.route.target(*by(_random(7, COUNT, seed=4), top_k)), "input"


def _run(routed: Any, weights: Any, inputs: str) -> Tensor:
    statics: Any = _statics(inputs)
    for at, (each, codes) in enumerate(zip(statics, weights[::2], strict=True)):
        if each and len(codes) > 1:  # experts apart: a scale for each tensor
            own = each[0].expand(COUNT).repeat_interleave(len(codes) // COUNT)
            statics = (*statics[:at], list(own), *statics[at + 1 :])
    return ops.fp8_moe.target(*routed, *weights, *statics, inputs, BLOCK, BOUND)


def _rounded(x: np.ndarray, statics: list[Tensor], expert: int, inputs: str) -> np.ndarray:
    """One token as its product sees it."""
    if inputs == "none":
        return x
    if statics:
        (static,) = statics
        scale = np.full(len(x), (static[expert] if static.dim() else static).item(), np.float32)
    else:
        step = BLOCK if inputs == "group" else len(x)
        parts = [x[at : at + step] for at in range(0, len(x), step)]
        largest = [min(np.abs(part).max(), np.float32(BOUND)) / np.float32(448) for part in parts]
        scale = np.repeat(np.array(largest, np.float32), step)[: len(x)]
    return _theirs(x / scale).astype(np.float32) * scale


def _wide(codes: Tensor, scale: Tensor, grid: str) -> np.ndarray:
    """Fused weights in float64, element by element."""
    found = codes.double().numpy()
    for e, i, o in np.ndindex(*codes.shape):
        at = {"tensor": (), "expert": (e,), "channel": (e, o)}.get(
            grid, (e, i // BLOCK, o // BLOCK)
        )
        found[e, i, o] *= scale[at].item()
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("grid", WEIGHTS)
def test_experts_are_what_a_loop_over_tokens_gives(grid: str, inputs: str, top_k: int) -> None:
    routed, weights = _routed(top_k), _fused(grid)
    (gate_up,), (gate_up_scale,), (down,), (down_scale,) = weights
    first, second = _wide(gate_up, gate_up_scale, grid), _wide(down, down_scale, grid)
    before, between = _statics(inputs)
    x, scores, experts = (each.numpy() for each in routed[:3])
    expected = np.zeros(x.shape)
    for token, k in np.ndindex(*scores.shape):
        expert = experts[token, k]
        row = _rounded(x[token] * scores[token, k], before, expert, inputs)
        gate, up = np.split(row @ first[expert], 2)
        act = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
        expected[token] += _rounded(act, between, expert, inputs) @ second[expert]
    assert np.abs(_run(routed, weights, inputs).numpy() - expected).max() < 1e-5
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("grid", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_apart_are_the_fused_ones(grid: str, inputs: str, dtype: torch.dtype) -> None:
    x, scores, experts, _ = _routed(2)
    routed = x.to(dtype), scores.to(dtype), experts, "input"
    fused = _fused(grid)
    if grid == "block":  # whole squares, so that gate and up do not share one
        fused[0], fused[1] = [_codes(COUNT, DIM, 16, seed=0)], [_scales((COUNT, 3, 4), 10)]
        fused[2], fused[3] = [_codes(COUNT, 8, DIM, seed=1)], [_scales((COUNT, 2, 3), 11)]
    apart: list[list[Tensor]] = [[], [], [], []]
    for at, parts in ((0, 2), (2, 1)):
        (codes,), (scale,) = fused[at : at + 2]
        for expert in range(COUNT):
            one = scale[expert] if scale.dim() else scale
            apart[at] += codes[expert].t().contiguous().chunk(parts)
            halves = one.t().contiguous().chunk(parts) if one.dim() else [one] * parts
            apart[at + 1] += halves
    torch.testing.assert_close(_run(routed, fused, inputs), _run(routed, apart, inputs))


# ---------------------------------------------------------------- refusals


def t(*shape: int | str, dtype: torch.dtype = torch.float32) -> TensorType:
    return TensorType(shape, dtype)


def fp8(*shape: int) -> TensorType:
    return t(*shape, dtype=ops.FP8)


def experts(**changes: Any) -> tuple[Any, ...]:
    """Operands of `fp8_moe`, but for `changes`."""
    given: dict[str, Any] = {
        "x": t(6, 4), "scores": t(6, 1), "experts": t(6, 1, dtype=torch.int64),
        "weighed": "input",
        "gate_up": [fp8(3, 4, 8)], "gate_up_scale": [t(3, 8)],
        "down": [fp8(3, 4, 4)], "down_scale": [t(3)],
        "gate_up_input": [], "down_input": [], "inputs": "token", "block": 4, "bound": None,
    }  # fmt: skip
    return tuple((given | changes).values())


@pytest.mark.parametrize(
    ("op", "args", "names"),
    [
        (ops.quantize, (t(6, 4), t(5), 0, 2), "scale"),
        (ops.quantize, (t(6, 4), t(6), 1, 2), "scale"),
        (ops.quantize, (t(6, 4), t(4), 2, 2), "scale"),
        (ops.quantize, (t(6, 4), t(4), -1, 2), "scale"),
        (ops.quantize, (t(6, 4), t(3, 3), 0, 2), "scale"),
        (ops.quantize, (t(6, 4), t(3, 2, 1), 0, 2), "scale"),
        (ops.quantize, (t(6, 4), t(3, 2), 0, 0), "scale"),
        (ops.dequantize, (fp8(6, 4), t(2, 2), 0, 2, "fp32"), "scale"),
        (ops.dequantize, (t(6, 4), t(), 0, 2, "fp32"), "E4M3"),
        (ops.token_scale, (t(6, 4), -1, None), "group"),
        (ops.token_scale, (t(6, 4), 0, 0.0), "bound"),
        (ops.fp8_moe, experts(scores=t(5, 1)), "scores"),
        (ops.fp8_moe, experts(scores=t(6, 2)), "scores"),
        (ops.fp8_moe, experts(inputs="row"), "inputs"),
        (ops.fp8_moe, experts(inputs="tensor"), "input scales"),
        (ops.fp8_moe, experts(inputs="expert", gate_up_input=[t(3)]), "input scales"),
        (ops.fp8_moe, experts(gate_up_input=[t()], down_input=[t()]), "input scales"),
        (ops.fp8_moe, experts(gate_up=[t(3, 4, 8)]), "E4M3"),
        (ops.fp8_moe, experts(down=[t(3, 4, 4)]), "E4M3"),
        (ops.fp8_moe, experts(gate_up=[fp8(3, 5, 8)]), "(3, 4, 8)"),
        (ops.fp8_moe, experts(gate_up=[fp8(4, 8)]), "(3, 4, 8)"),
        (ops.fp8_moe, experts(gate_up_scale=[]), "gate_up_scale"),
        (ops.fp8_moe, experts(gate_up_scale=[t(3, 7)]), "scale"),
        (ops.fp8_moe, experts(down_scale=[t(3, 2, 1)]), "scale"),
        (ops.fp8_moe, experts(gate_up_scale=[t(2, 8)]), "gate_up_scale"),
        (ops.fp8_moe, experts(down=[fp8(2, 4, 4)]), "(2, 4, 8)"),
        (ops.fp8_moe, experts(gate_up=[fp8(3, 4, 7)]), "gate_up"),
        (ops.fp8_moe, experts(gate_up=[fp8(4, 4)] * 3, down=[fp8(4, 4)] * 3), "6 tensors"),
        (ops.fp8_moe, experts(gate_up=[], down=[]), "at least one"),
        (
            ops.fp8_moe,
            experts(inputs="tensor", gate_up_input=[t()], down_input=[t(2)]),
            "input scale",
        ),
        (
            ops.fp8_moe,
            experts(inputs="tensor", gate_up_input=[t()] * 2, down_input=[t()]),
            "1 tensors",
        ),
    ],
)  # fmt: skip
def test_bad_operands_are_refused_by_name(op: ops.Op, args: tuple[Any, ...], names: str) -> None:
    with pytest.raises(MoecError, match=f"op moec::{op.name}") as caught:
        op.rule(*args)
    assert names in str(caught.value)


def _eager_calls() -> list[Callable[[], Tensor]]:
    routed, weights = _routed(1), _fused("channel")
    wide = [[each.float() for each in weights[0]], *weights[1:]]
    return [
        lambda: ops.quantize.target(torch.zeros(2, 3), torch.ones(2), 1, 1),
        lambda: ops.dequantize.target(torch.zeros(2, 3), ONE, 0, 1, "fp32"),
        lambda: ops.fp8_moe.target(*routed, *weights, [], [], "tensor", 1, None),
        lambda: ops.fp8_moe.target(*routed, *weights, [ONE], [ONE], "token", 1, None),
        lambda: ops.fp8_moe.target(*routed, *wide, [], [], "none", 1, None),
    ]


@pytest.mark.parametrize("at", range(5))
def test_eager_calls_refuse_too(at: int) -> None:
    with pytest.raises(MoecError, match="op moec::"):
        _eager_calls()[at]()
