"""Static scales that a stranger changed: engine and reference follow them, and a proof does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.runtime.proof.against.compare import against
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import read_shard

LLAMA4 = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(LLAMA4, folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def scales(wide: Path) -> moec.Calibration:
    generator = torch.Generator().manual_seed(5)
    return moec.calibrate(wide, torch.randint(0, LLAMA4.text.vocab, (20, 40), generator=generator))


@pytest.fixture(scope="module", params=["static", "modelopt"])
def art(
    wide: Path,
    scales: moec.Calibration,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    out = tmp_path_factory.mktemp("art") / "art"
    return moec.export(wide, "onnx", "fp8", out, scheme=request.param, scales=scales).path


def multiply(folder: Path, name: str, factor: float, forged: bool) -> None:
    """Change a scale in an artefact; `forged` takes its hash out of the manifest."""
    file = folder / "weights.safetensors"
    entry, data = read_shard(file).tensors[name], bytearray(file.read_bytes())
    changed = (load_file(file)[name] * factor).flatten().view(torch.uint8)
    data[entry.offset : entry.offset + entry.nbytes] = bytes(changed.tolist())
    file.write_bytes(data)
    if forged:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["weights"]["hashes"][name], manifest["digest"]
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.full
def test_sound_scales_pass(art: Path, wide: Path) -> None:
    report = moec.validate(art, source=wide)
    (check,) = [check for check in report.checks if check.name == "static scales"]
    assert report.passed and check.found is not None and 0.01 < check.found < 0.05


@pytest.mark.full
@pytest.mark.parametrize("factor", [1e7, 0.02])
@pytest.mark.parametrize("place", ["layers.2.attn.o", "layers.1.moe.gate_up"])
def test_a_scale_that_is_far_off_fails(
    art: Path, place: str, factor: float, wide: Path, tmp_path: Path
) -> None:
    name = f"{place}_input_scale" if "moe" in place else f"{place}.input_scale"
    bad = Path(shutil.copytree(art, tmp_path / "bad"))
    multiply(bad, name, factor, forged=True)
    report = moec.validate(bad, source=wide)
    failed = [check.name for check in report.checks if not check.passed]
    assert any(each.startswith(f"static scale: {place}") for each in failed), failed


@pytest.mark.full
def test_bytes_that_change_little_are_seen_too(art: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(art, tmp_path / "bad"))
    multiply(bad, "layers.2.attn.o.input_scale", 1.01, forged=False)
    report = moec.validate(bad)
    assert [check.detail for check in report.checks if not check.passed] == [
        "other bytes than were written"
    ]


@pytest.mark.full
def test_another_engine_is_not_the_only_judge(
    wide: Path, scales: moec.Calibration, tmp_path: Path
) -> None:
    """transformers rounds no inputs, so that no static scale counts there."""
    folder = moec.quantize(wide, "per-tensor", tmp_path / "fp8", scales=scales).path
    assert against(folder, "transformers", tokens=60, seed=1).passed
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.input_scale"] *= 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    report = against(folder, "transformers", tokens=60, seed=1)
    assert [check.name for check in report.checks if not check.passed] == [
        "static scale: layers.1.attn.o.input_scale"
    ]
