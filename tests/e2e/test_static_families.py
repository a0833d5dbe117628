"""FP8 with static scales, from calibration to the proof, for every family of models."""

from pathlib import Path

import pytest
import torch

import moec
from moec.spec.scheme import SCHEMES
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]
#: "modelopt" has static scales of all inputs, and of caches: the others have fewer
EVERY = [
    pytest.param(family, name, marks=[pytest.mark.slow] if family != "deepseek-v3" else [])
    for family in CASES
    for name in (STATIC if family == "deepseek-v3" else ["modelopt"])
]


@pytest.mark.parametrize("family, scheme", EVERY)
def test_calibrated_builds_are_proven(family: str, scheme: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    write_random_checkpoint(CASES[family], wide, seed=3)
    generator = torch.Generator().manual_seed(5)
    scales = moec.calibrate(wide, torch.randint(0, 256, (4, 24), generator=generator))
    direct = moec.export(wide, "onnx", "fp8", tmp_path / "direct", scheme=scheme, scales=scales)
    assert_passed(moec.validate(direct.path, tokens=19))

    spec, *_ = read_model(wide)
    later = moec.export(spec, "onnx", "fp8", tmp_path / "later", scheme=scheme)
    if family.startswith("deepseek-v3"):  # a proof without weights calibrates by itself
        assert_passed(moec.validate(later.path, tokens=19))
    moec.bind(later.path, wide, scales=scales)
    one, other = (folder / "weights.safetensors" for folder in (direct.path, later.path))
    assert one.read_bytes() == other.read_bytes()
