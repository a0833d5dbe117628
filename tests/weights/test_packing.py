"""Rewritten weights mean what they did: exactly where cast, within half a step where quantised."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from moec.spec.errors import MoecError
from moec.weights.arrange import arrange, quantize, store, unpack
from moec.weights.packed.file import write_packed
from moec.weights.packing import Packed, Packing
from moec.weights.shard import read_shard

ARRANGEMENTS = ("rows", "transpose", "interleave")


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_a_quantised_weight_is_within_half_a_step(
    shape: tuple[int, int], bits: int, block: int, scale: float, seed: int
) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    rows[0, 0] = 0
    packing = Packing(source="w", dtype="fp32", bits=bits, block=block)
    parts = store(packing, rows)
    kinds = [(tuple(p.shape), str(p.dtype).removeprefix("torch.")) for p in parts]
    expected = [(s, {"fp32": "float32"}.get(d, d)) for s, d in packing.shapes(shape)]
    assert kinds == expected
    found = unpack(packing, parts)[:, : shape[1]]
    steps = parts[1].abs().repeat_interleave(block, 1)[:, : shape[1]]
    # The end of the range that has a code less may be a whole step off.
    assert ((found - rows).abs() <= steps * 1.001).all()
    inner = rows.abs() < steps * ((1 << (bits - 1)) - 1)
    assert ((found - rows).abs()[inner] <= steps[inner] * 0.501).all()


def test_the_largest_element_of_a_block_is_exact_and_zeros_stay_zeros() -> None:
    rows = torch.randn(5, 64)
    codes, scales = quantize(rows, 4, 32)
    blocks = rows.unflatten(1, (2, 32))
    at = blocks.abs().argmax(2, keepdim=True)
    assert not codes.gather(2, at).any()
    found = -8 * scales
    assert torch.allclose(found, blocks.gather(2, at)[..., 0], rtol=1e-6)
    codes, scales = quantize(torch.zeros(2, 32), 8, 32)
    assert (codes == 128).all() and not scales.any()


@pytest.mark.parametrize("how", ARRANGEMENTS)
def test_an_arranged_expert_comes_back(how: str) -> None:
    expert = torch.randn(6, 8)
    packing = Packing(source="w", arrange=how, dtype="fp32")
    arranged = arrange(packing, expert)
    assert tuple(arranged.shape) == packing.shapes((6, 8))[0][0]
    assert torch.equal(unpack(packing, store(packing, arranged)), expert)
    if how == "interleave":  # columns are gate 0..3, then up 0..3
        assert torch.equal(arranged[2], expert[:, 1]) and torch.equal(arranged[3], expert[:, 5])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tensors = {
        "experts": torch.randn(3, 32, 48).bfloat16(),
        "linear": torch.randn(20, 40).bfloat16(),
        "norm": torch.randn(32).bfloat16(),
        "kept": torch.randn(7, 5).bfloat16(),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path


PACKINGS = {
    "experts.int4": Packing(source="experts", arrange="interleave", dtype="fp32", bits=4, block=16),
    "linear.int8": Packing(source="linear", dtype="fp32", bits=8, block=16),
    "norm.fp32": Packing(source="norm", dtype="fp32"),
    "kept": Packing(source="kept", dtype="bf16"),
}


def test_a_packed_file_is_a_safetensors_file_of_what_packings_say(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moec.weights.packed.file.ELEMENTS_AT_ONCE", 64
    )  # rows go through in pieces
    entries = read_shard(weights / "in.safetensors").tensors
    seen: list[tuple[int, int]] = []
    write_packed(weights / "out.safetensors", PACKINGS, entries, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == sum(e.nbytes for e in entries.values())
    shard = read_shard(weights / "out.safetensors")
    assert all(
        not e.offset % {"uint8": 1, "bf16": 2, "fp32": 4}[e.dtype] for e in shard.tensors.values()
    )
    with safe_open(weights / "out.safetensors", "pt") as opened:
        assert set(opened.keys()) == set(shard.tensors)
        assert torch.equal(opened.get_tensor("norm.fp32").bfloat16(), _read(weights, "norm"))
        assert torch.equal(opened.get_tensor("kept"), _read(weights, "kept"))
    for name, packing in PACKINGS.items():
        entry = entries[packing.source]
        parts = tuple(shard.tensors[part] for part in packing.names(entry.dtype))
        assert parts[0].name == name
        found = Packed(packing, entry.shape, parts).read()
        expected = _read(weights, packing.source).float()
        assert found.shape == expected.shape
        limit = {4: 0.4, 8: 0.03, None: 0}[packing.bits]
        assert (found - expected).abs().max() <= limit


def test_a_weight_that_the_dtype_cannot_hold_is_refused(weights: Path) -> None:
    save_file({"w": torch.tensor([[1.0, 1e6]])}, weights / "large.safetensors")
    entries = read_shard(weights / "large.safetensors").tensors
    packing = {"w.fp16": Packing(source="w", dtype="fp16")}
    with pytest.raises(MoecError, match=r"large\.safetensors: w"):
        write_packed(weights / "out.safetensors", packing, entries, lambda *step: None)
    save_file({"w": torch.full((1, 16), torch.nan)}, weights / "nan.safetensors")
    entries = read_shard(weights / "nan.safetensors").tensors
    packing = {"w.int4": Packing(source="w", dtype="fp32", bits=4, block=16)}
    with pytest.raises(MoecError, match=r"nan\.safetensors: w"):
        write_packed(weights / "out.safetensors", packing, entries, lambda *step: None)


def _read(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "in.safetensors", "pt") as opened:
        return opened.get_tensor(name)
