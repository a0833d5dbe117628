"""Weights become the codes and scales that a loop over elements gives, however they are cut."""

from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec.spec.scheme import WEIGHTS
from moec.weights import fp8
from moec.weights.packed.file import write_packed
from moec.weights.packing import Packed, Packing
from moec.weights.shard import read_shard
from tests.refusals import refusal

LINEAR, FUSED = (13, 10), (3, 7, 10)
BLOCK = 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(params=[1 << 22, 30, 1], ids=lambda size: f"pieces of {size}")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices go through whole, in some rows, or row by row and block by block."""
    monkeypatch.setattr("moec.weights.packed.file.ELEMENTS_AT_ONCE", request.param)
    monkeypatch.setattr("moec.weights.fp8.STEP", max(1, request.param // 2))


def _weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)


def _pack(
    folder: Path, weight: Tensor, grid: str, scales: str = "fp32", **constants: Tensor
) -> dict[str, Tensor]:
    save_file({"w": weight}, folder / "in.safetensors")
    packing = Packing(source="w", dtype=scales, fp8=grid, block=BLOCK)
    entries = read_shard(folder / "in.safetensors").tensors
    out = folder / "out.safetensors"
    assert write_packed(out, {"w": packing}, entries, lambda *_: None, constants) == weight.nbytes
    read_shard(out)
    return load_file(out)


def _area(at: tuple[int, ...], grid: str) -> tuple[int, ...]:
    """Which scale element `at` of a linear or fused weight has."""
    *expert, row, column = at
    output = column if expert else row
    return {
        "tensor": (),
        "expert": tuple(expert),
        "channel": (*expert, output),
        "block": (*expert, row // BLOCK, column // BLOCK),
    }[grid]


def _naive(weight: Tensor, grid: str, scales: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, element by element."""
    values = weight.float().numpy()
    largest: dict[tuple[int, ...], np.float32] = {}
    for at in np.ndindex(values.shape):
        area = _area(at, grid)
        largest[area] = max(largest.get(area, np.float32(0)), abs(values[at]))
    shape = tuple(1 + max(area[i] for area in largest) for i in range(len(next(iter(largest)))))
    scale, codes = np.ones(shape, scales), np.zeros(values.shape, np.uint8)
    for area, size in largest.items():
        if size:
            scale[area] = scales(size / np.float32(448))
    for at in np.ndindex(values.shape):
        quotient = values[at] / np.float32(scale[_area(at, grid)])
        codes[at] = np.clip(quotient, -448, 448).astype(E4M3).view(np.uint8)
    return codes, scale


def _assert_naive(found: dict[str, Tensor], weight: Tensor, grid: str) -> None:
    codes, scale = _naive(weight, grid)
    assert found["w"].dtype == torch.float8_e4m3fn and found["w"].shape == weight.shape
    assert np.array_equal(found["w"].view(torch.uint8).numpy(), codes)
    assert found["w_scale"].shape == scale.shape
    assert np.array_equal(found["w_scale"].numpy(), scale)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", WEIGHTS)
@pytest.mark.parametrize("shape", [LINEAR, FUSED], ids=["linear", "fused"])
def test_a_packed_weight_is_what_a_loop_gives(
    tmp_path: Path, shape: tuple[int, ...], grid: str, dtype: torch.dtype
) -> None:
    weight = _weight(*shape, dtype=dtype)
    _assert_naive(_pack(tmp_path, weight, grid), weight, grid)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("together", [1 << 28, 300])  # all experts in a group, or one by one
def test_experts_may_be_transposed(
    tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.weights.packed.file.GROUP_BYTES", together)
    weight = _weight(*FUSED, dtype=torch.bfloat16)
    plain = _pack(tmp_path, weight, "channel")
    entries = read_shard(tmp_path / "in.safetensors").tensors
    packing = Packing(source="w", arrange="transpose", dtype="fp32", fp8="channel")
    read = write_packed(tmp_path / "turned", {"w": packing}, entries, lambda *_: None)
    found = load_file(tmp_path / "turned")
    assert read == weight.nbytes and torch.equal(found["w_scale"], plain["w_scale"])
    codes = (each["w"].view(torch.uint8) for each in (found, plain))
    assert torch.equal(next(codes).transpose(1, 2), next(codes))
    parts = tuple(read_shard(tmp_path / "turned").tensors[name] for name in packing.names("bf16"))
    back = Packed(packing, FUSED, parts).read()  # a view, in the parameter's own shape
    assert torch.equal(back.view(torch.uint8), plain["w"].view(torch.uint8))


@pytest.mark.parametrize(
    "shape", [(1, 1), (4, 4), (8, 12), (5, 3), (1, 9), (9, 1), (2, 4, 8), (1, 5, 6)], ids=str
)
@pytest.mark.parametrize("grid", WEIGHTS)
def test_sizes_may_be_anything(tmp_path: Path, shape: tuple[int, ...], grid: str) -> None:
    weight = _weight(*shape)
    _assert_naive(_pack(tmp_path, weight, grid), weight, grid)


@pytest.mark.parametrize(("scales", "kind"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("grid", WEIGHTS)
def test_codes_are_of_the_scales_that_are_stored(
    tmp_path: Path, grid: str, scales: str, kind: Any
) -> None:
    weight = _weight(*FUSED) * 100
    found = _pack(tmp_path, weight, grid, scales)
    codes, scale = _naive(weight, grid, kind)
    assert np.array_equal(found["w_scale"].float().numpy(), scale.astype(np.float32))
    assert np.array_equal(found["w"].view(torch.uint8).numpy(), codes)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("grid", WEIGHTS)
@pytest.mark.parametrize("shape", [LINEAR, FUSED], ids=["linear", "fused"])
def test_the_largest_element_of_each_scale_has_the_largest_code(
    tmp_path: Path, shape: tuple[int, ...], grid: str
) -> None:
    weight = _weight(*shape)
    codes = _pack(tmp_path, weight, grid)["w"].view(torch.uint8)
    largest: dict[tuple[int, ...], tuple[float, int]] = {}
    for at in np.ndindex(weight.shape):
        element = abs(weight[at].item()), 0xFE if weight[at] < 0 else 0x7E
        area = _area(at, grid)
        if element > largest.get(area, (0.0, 0)):
            largest[area] = element
            assert codes[at] & 0x7F <= 0x7E
    for at in np.ndindex(weight.shape):
        size, code = largest[_area(at, grid)]
        if abs(weight[at].item()) == size:
            assert codes[at] == code


@pytest.mark.parametrize("grid", WEIGHTS)
@pytest.mark.parametrize("shape", [LINEAR, FUSED], ids=["linear", "fused"])
def test_zeros_stay_zeros(tmp_path: Path, shape: tuple[int, ...], grid: str) -> None:
    found = _pack(tmp_path, torch.zeros(shape), grid)
    assert not found["w"].view(torch.uint8).any() and (found["w_scale"] == 1).all()
    weight = _weight(*shape)
    weight[..., :BLOCK, :BLOCK] = 0  # a block, no more
    _assert_naive(_pack(tmp_path, weight, grid), weight, grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("along", ["row", "column", "block", "all"])
def test_magnitudes_are_of_signs_and_subnormals_too(along: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    rows = torch.tensor([[-3.0, 2.0, -0.0], [tiny / 4, -tiny / 2, 0.0]]).to(dtype)
    small = rows[1].abs().max().item()
    expected = {"row": [3.0, small], "column": [3.0, 2.0, 0.0], "block": [[3.0, 0.0], [small, 0.0]]}
    found = fp8.magnitudes(rows, along, 2 if along == "row" else 1)
    if along == "block":
        assert found.tolist() == rows.abs().float().tolist()
        assert fp8.magnitudes(rows, along, 2).tolist() == [[3.0, 0.0]]
    else:
        assert found.tolist() == expected.get(along, 3.0)
        assert found.dtype == torch.float32


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("grid", "odd"), product(WEIGHTS, [torch.nan, torch.inf, -torch.inf]), ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [LINEAR, FUSED], ids=["linear", "fused"])
def test_a_weight_that_is_not_finite_is_refused(
    tmp_path: Path, shape: tuple[int, ...], grid: str, odd: float, dtype: torch.dtype
) -> None:
    weight = _weight(*shape, dtype=dtype)
    weight[..., -1, 4] = odd
    refusal(lambda: _pack(tmp_path, weight, grid), "in.safetensors: w")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_constants_are_written_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scale, half = _weight(*shape), _weight(5, dtype=torch.bfloat16)
    weight = _weight(*LINEAR)
    found = _pack(tmp_path, weight, "channel", **{"w.input_scale": scale, "k_scale": half})
    assert set(found) == {"w", "w_scale", "w.input_scale", "k_scale"}
    assert torch.equal(found["w.input_scale"], scale) and torch.equal(found["k_scale"], half)
    _assert_naive(found, weight, "channel")


@pytest.mark.parametrize("scales", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-7, 1e-4])
def test_scales_never_vanish(tmp_path: Path, size: float, scales: str) -> None:
    """Of weights so small that a scale would round to zero, codes are small, and never NaN."""
    weight = torch.zeros(4, 8)
    weight[1, 2] = size
    found = _pack(tmp_path, weight, "channel", scales)
    wide = found["w"].float() * found["w_scale"].float()[:, None]
    step = torch.finfo(found["w_scale"].dtype).smallest_normal * 2**-9  # of the smallest codes
    assert (wide - weight).abs().max() <= max(step, size / 16)
    assert found["w_scale"].min() > 0


def test_a_scale_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    refusal(lambda: _pack(tmp_path, torch.full((2, 4), 1e9), "channel", "fp16"), "infinity")
