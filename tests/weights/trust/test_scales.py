"""Every scale of a checkpoint is checked, however many there are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moec.weights.shard import read_shard
from moec.weights.trust.scales import check_scales
from tests.refusals import refusal

COUNT = 10_050


@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bad_scale_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr("moec.weights.trust.scales._AT_ONCE", at_once)
    scales = {f"s{i}": torch.full((i % 3, 2), 0.5 + i, dtype=dtype) for i in range(40)}
    for at, bad in ((1, 0.0), (20, float("nan")), (38, -1.0), (38, float("inf"))):
        wrong = {name: each.clone() for name, each in scales.items()}
        wrong[f"s{at}"][-1, 1] = bad
        save_file(wrong, tmp_path / "m.safetensors")
        entries = read_shard(tmp_path / "m.safetensors").tensors
        check_scales([(name, each) for name, each in entries.items() if name != f"s{at}"])
        refusal(lambda: check_scales(entries.items()), f"m.safetensors: s{at}")  # noqa: B023


def test_the_last_of_many_scales_is_checked(tmp_path: Path) -> None:
    scales = {f"s{i:05}": torch.ones(2) for i in range(COUNT)}
    scales[f"s{COUNT - 1:05}"][1] = 0
    save_file(scales, tmp_path / "m.safetensors")
    entries = read_shard(tmp_path / "m.safetensors").tensors
    error = refusal(lambda: check_scales(entries.items()), f"s{COUNT - 1:05}")
    assert "1 bad scales of 2" in error.found


def test_a_file_that_ends_before_a_scale_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, file)
    entries = read_shard(file).tensors
    file.write_bytes(file.read_bytes()[:-4])
    refusal(lambda: check_scales(entries.items()), "ended before")
