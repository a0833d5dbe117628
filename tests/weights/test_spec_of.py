"""The spec of a checkpoint says what its tensors are: a build from it takes these weights."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.spec.errors import MoecError
from moec.spec.files import diff, dump_yaml
from moec.spec.presets import PRESETS
from moec.spec.scheme import PER_TENSOR, W4A16, Scheme
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.conftest import run_command
from tests.exporters.test_quantize import BLOCKS, MODELS

INT4 = W4A16.model_copy(update={"block": 16})  # narrow models have no groups of 128
SCHEMES: dict[str, Scheme | str] = {
    "dynamic": "dynamic",
    "meta": "meta",
    "blocks": BLOCKS,
    "per-tensor": PER_TENSOR,
    "int4": INT4,
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", params=["llama4", "qwen3"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def scales(wide: Path) -> moec.Calibration:
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(5))
    return moec.calibrate(wide, ids)


def cast(folder: Path, dtype: torch.dtype, of: str = "_scale") -> None:
    """Store the tensors whose names end with `of` in another type, as foreign tools may."""
    file = folder / "model.safetensors"
    found = load_file(file)
    save_file({k: t.to(dtype) if k.endswith(of) else t for k, t in found.items()}, file)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_have_the_type_that_they_are_stored_in(
    wide: Path, scales: moec.Calibration, scheme: str, dtype: str, tmp_path: Path
) -> None:
    given = scales if scheme == "per-tensor" else None
    folder = moec.quantize(wide, SCHEMES[scheme], tmp_path / "q", scales=given).path
    right = read_model(folder)[0]
    assert diff(moec.load_spec(folder), right) == []
    cast(folder, TYPES[dtype])
    found = moec.load_spec(folder)
    assert found.scheme is not None and found.scheme.scales == dtype
    assert diff(found, read_model(folder)[0]) == []


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("scheme", ["dynamic", "int4"])
def test_a_build_from_the_printed_spec_takes_the_weights(
    wide: Path, scheme: str, target: str, tmp_path: Path
) -> None:
    folder = moec.quantize(wide, SCHEMES[scheme], tmp_path / "q").path
    for form in ("yaml", "json"):
        code, printed, _ = run_command("spec", "show", folder, "--format", form)
        assert code == 0
        file = tmp_path / f"printed.{form}"
        file.write_text(printed)
        art = moec.export(file, target, out=tmp_path / "art").path
        moec.bind(art, folder)
    assert run_command("spec", "diff", folder, file)[0] == 0


def test_wide_weights_have_their_own_types(tmp_path: Path) -> None:
    write_random_checkpoint(MODELS["llama4"], tmp_path / "checkpoint", seed=3)
    folder = tmp_path / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    cast(folder, torch.float32, of="norm.weight")
    found = moec.load_spec(folder)
    assert found.dtype == "bf16" and set(found.dtypes.values()) == {"fp32"}
    assert diff(found, read_model(folder)[0]) == []


def test_what_is_no_checkpoint_with_weights_is_read_as_before(wide: Path, tmp_path: Path) -> None:
    assert moec.load_spec("scout") is PRESETS["scout"]
    spec = moec.load_spec(wide)
    (tmp_path / "spec.yaml").write_text(dump_yaml(spec))
    assert moec.load_spec(tmp_path / "spec.yaml") == spec == moec.load_spec(spec)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_bytes((wide / "config.json").read_bytes())
    alone = moec.load_spec(tmp_path / "alone")
    assert diff(alone, spec) == [] and not any("Types are" in each for each in alone.notes)
    with pytest.raises(MoecError):
        moec.load_spec(tmp_path)


@pytest.mark.parametrize("damage", [partial(Path.write_bytes, data=b"x"), Path.unlink])
def test_a_spec_says_that_the_weights_could_not_be_read(checkpoint: Path, damage: object) -> None:
    shard = min(checkpoint.glob("*.safetensors"))
    assert callable(damage)
    damage(shard)
    found = moec.load_spec(checkpoint)
    assert f"{shard}" in found.notes[-1] and found.notes[-1].startswith("Types are those of config")
