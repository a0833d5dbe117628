"""Operations launch exactly what `moec.kernels.torch.ops` launches, on the same buffers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need triton")

from moec.kernels.ahead_of_time import operations
from moec.kernels.ahead_of_time.program import build_program
from moec.kernels.ahead_of_time.quantities import VARIABLES
from moec.kernels.ahead_of_time.variants import EVERY, Given, Operation, Variant
from moec.kernels.launches.launch import SHARED, Launch
from moec.kernels.sizes import Heads, Sizes, constants_text
from moec.kernels.torch import launch as torch_launch
from moec.kernels.torch import moe, ops, prefill
from moec.spec.errors import MoecError
from tests.kernels.launcher.expected import MULTIPROCESSORS
from tests.kernels.launcher.reader import read

DIM, HIDDEN, EXPERTS, EPS = 256, 512, 4, 1e-5
SIZES, HEADS = Sizes(DIM, HIDDEN, EXPERTS), Heads(8, 2, 32)
TOKENS = (1, 2, 7, 16, 17, 33, 64, 65, 200)


def tensor(each: Given, sizes: dict[str, int]) -> Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in each.shape]
    return torch.empty(shape, dtype=torch_launch.DTYPES[each.dtype])


class Recorder:
    """What `run` was called with, in place of launches on a GPU of an architecture."""

    def __init__(self, patch: pytest.MonkeyPatch, architecture: int) -> None:
        self.launches: list[tuple[Launch, dict[str, Any]]] = []
        for module in (ops, moe, prefill):
            patch.setattr(module, "run", lambda *call: self.launches.append(call))
            patch.setattr(module, "architecture", lambda device: architecture)
        patch.setattr(ops, "overlaps", lambda device: architecture >= 90)
        tiles = prefill.tiles_for(architecture, MULTIPROCESSORS)
        patch.setattr(prefill, "tiles_of", lambda device: tiles)


def variant_of(operation: Operation, architecture: int, sizes: dict[str, int]) -> Variant:
    found = [
        each
        for each in operation.variants(architecture)
        if all(first <= sizes[of] <= last for of, (first, last) in each.ranges.items())
    ]
    assert len(found) == 1
    return found[0]


def compare(
    operation: Operation, variant: Variant, sizes: dict[str, int], recorded: Recorder,
    given: dict[str, Tensor],
) -> None:  # fmt: skip
    """The same launches, whose arguments share buffers in the same way."""
    by_buffer: dict[str, int] = {name: each.data_ptr() for name, each in given.items()}
    assert len(variant.steps) == len(recorded.launches)
    for step, grid, (launch, values) in zip(
        variant.steps, variant.grids, recorded.launches, strict=True
    ):
        at = [axis.at(sizes[VARIABLES[axis.of]]) for axis in grid]
        assert [MULTIPROCESSORS if n == EVERY else n for n in at] == list(launch.grid)
        one, other = ({**vars_of(each), "grid": None} for each in (step.launch, launch))
        assert one == other
        for argument in launch.arguments:
            buffer, value = step.buffer(argument), values.get(argument)
            if isinstance(value, Tensor) and buffer is not None:
                assert by_buffer.setdefault(buffer, value.data_ptr()) == value.data_ptr(), buffer
    scratch = {name: place for name, place in by_buffer.items() if name in variant.bytes}
    assert scratch.keys() == variant.bytes.keys()
    assert len(set(scratch.values())) == len(scratch)


def vars_of(launch: Launch) -> dict[str, Any]:
    return {name: getattr(launch, name) for name in Launch.__dataclass_fields__}


def rowwise() -> Iterator[tuple[str, Operation]]:
    yield "norm_fp8", operations.norm_fp8(DIM, EPS)
    yield "rms_norm", operations.rms_norm(DIM, EPS)
    yield "skip_norm", operations.skip_norm(DIM, EPS)
    yield "skip_norm_fp8", operations.skip_norm_fp8(DIM, EPS)
    yield "encode", operations.encode(DIM)
    yield "swiglu_fp8", operations.swiglu_fp8(HIDDEN)
    yield "moe_layer", operations.moe_layer(SIZES, 200)
    yield "norm_moe", operations.norm_moe(SIZES, EPS, 200)
    yield "norm_moe_norm_fp8", operations.norm_moe_norm_fp8(SIZES, EPS, 200)


@pytest.mark.parametrize(
    ("name", "operation"), rowwise(), ids=lambda x: x if type(x) is str else ""
)
@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_row_of_tokens(
    name: str, operation: Operation, architecture: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorder(monkeypatch, architecture)
    inputs = {each.name: tensor(each, {"tokens": tokens}) for each in operation.inputs if each}
    numbers = [EPS] if "eps" in operation.constants else []
    given = list(inputs.values())
    if name == "rms_norm":
        ops.rms_norm(*given, EPS)
    else:  # eps comes after the norm\'s weight
        at = 1 + list(inputs).index("weight") if numbers else 0
        getattr(ops, name)(*given[:at], *numbers, *given[at:])
    variant = variant_of(operation, architecture, {"tokens": tokens})
    compare(operation, variant, {"tokens": tokens}, recorded, inputs)


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_a_linear_layer(architecture: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, recorded = operations.fp8_linear(HIDDEN, DIM), Recorder(monkeypatch, architecture)
    inputs = {each.name: tensor(each, {"tokens": tokens}) for each in operation.inputs if each}
    ops.fp8_linear(*inputs.values(), "bf16")
    variant = variant_of(operation, architecture, {"tokens": tokens})
    compare(operation, variant, {"tokens": tokens}, recorded, inputs)


@pytest.mark.parametrize(("rope", "temperature"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("batch", [1, 2, 33, 200])
def test_a_decode_step_of_attention(
    rope: bool, temperature: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of splits is a power of 2 in both."""
    eps = EPS if rope else None
    operation, recorded = (
        operations.attention_fp8(HEADS, rope, temperature, eps),
        Recorder(monkeypatch, 90),
    )
    most = 132 // batch
    slots = 128 * (1 << (most.bit_length() - 1)) if most else 128
    sizes = {"tokens": batch, "batch": batch, "steps": 1, "slots": slots, "places": batch * slots}
    inputs = {each.name: tensor(each, sizes) for each in operation.inputs if each}
    tables = [inputs.get(name) for name in ("cos", "sin", "temperature")]
    last = inputs["last"].zero_()
    total = torch.tensor(slots, dtype=torch.int32)
    ops.attention_fp8(
        inputs["qkv"], *tables, inputs["key"], inputs["value"], last, total, HEADS.heads,
        HEADS.kv_heads, eps,
    )  # fmt: skip
    variant = variant_of(operation, 90, sizes)
    compare(operation, variant, sizes, recorded, inputs)


def test_prefill_of_attention_follows_its_sizes() -> None:
    operation = operations.attention_fp8(HEADS, True, False, EPS)
    for architecture, batch, steps, slots in (
        (90, 1, 2, 64),
        (90, 3, 700, 1024),
        (89, 2, 300, 512),
    ):
        sizes = {"tokens": batch * steps, "batch": batch, "steps": steps, "slots": slots}
        sizes |= {"places": batch * slots}
        variant = variant_of(operation, architecture, sizes)
        place, attend, pack = (
            [axis.at(sizes[VARIABLES[axis.of]]) for axis in grid] for grid in variant.grids
        )
        rows = variant.steps[1].launch.constants["ROWS"]
        assert place == [batch * steps, 6, 1] and pack == [batch * steps, 1, 1]
        assert attend[2] == batch
        assert attend[:2] == [HEADS.heads, -(-steps // rows)] or attend[0] == EVERY
        width = HEADS.heads * HEADS.size
        for name in ("q", "out"):
            assert variant.bytes[name].at(batch * steps) == 2 * batch * steps * width


def test_a_program_says_which_operation_it_is() -> None:
    found = read(build_program(operations.attention_fp8(HEADS, False, True, None), (90,)))
    assert (found.operation, found.constants) == ("attention_fp8", "heads=8 kv_heads=2")
    assert [each.role for each in found.given] == [0, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1]
    assert [found.given[i].continues for i in (-2, -1)] == [4, 5]
    assert found.given[4].shape == ["batch", 2, "slots", 32]
    assert constants_text({"eps": EPS}) == "eps=1e-05"


def test_a_part_of_no_token_is_refused() -> None:
    with pytest.raises(MoecError, match="at least 1"):
        operations.moe_layer(SIZES, 0)
    assert set(SHARED) >= {89, 90}
