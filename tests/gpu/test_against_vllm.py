"""vLLM reads what `moec quantize` writes, and a proof against it sees each kind of damage.

MOEC_VLLM_PYTHON names an interpreter that has vLLM; without it these tests are skipped.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.proof.against.compare import against
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint
from tests.damage import only_shard

PYTHON = os.environ.get("MOEC_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None or not torch.cuda.is_available(), reason="MOEC_VLLM_PYTHON and a GPU are needed"
)
#: what vLLM's kernels want: heads of 128, widths of 128 and more
SMALL = {
    "dim": 512,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 128,
    "vocab": 2048,
    "layers": 4,
    "chunk": 64,
    "dense_hidden": 512,
    "temperature_floor": 32,
    "max_positions": 4096,
}


def small(preset: str, **text: object) -> ModelSpec:
    """A narrow model with the layer patterns of a preset, and without a vision tower."""
    spec = moec.load_spec(preset)
    values = spec.model_dump()
    experts = values["text"]["experts"] | {"count": 8, "hidden": 256, "shared_hidden": 256}
    values["text"] |= {**SMALL, "experts": experts, **text}
    values["tokens"] = {"bos": 0, "eos": (1,), "pad": 2}
    return ModelSpec.model_validate(values | {"vision": None, "name": f"small-{preset}"})


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint with Scout's layers."""
    folder = tmp_path_factory.mktemp("scout")
    write_random_checkpoint(small("scout"), folder / "wide", seed=1)
    return moec.quantize(folder / "wide", "dynamic", folder / "fp8").path


def prove(folder: Path, theirs: Path | None = None) -> moec.Report:
    report = against(folder, "vllm", tokens=400, seed=3, python=PYTHON, theirs=theirs)
    print(folder.name, report.engine, *report.checks, sep="\n  ")
    return report


@pytest.mark.parametrize(
    "preset, scheme",
    [
        ("scout", "dynamic"),
        ("scout", "meta"),
        ("scout", "deepseek"),
        ("scout", "per-tensor"),
        ("scout", "w4a16"),
        ("maverick", "dynamic"),
    ],
)
def test_vllm_computes_the_same(preset: str, scheme: str, tmp_path: Path) -> None:
    """Across chunk borders, with a temperature from position 32 on, in every scheme."""
    write_random_checkpoint(small(preset), tmp_path / "wide", seed=1)
    scales = None
    if scheme == "per-tensor":
        scales = moec.calibrate(tmp_path / "wide", torch.randint(0, 2048, (8, 400)))
    moec.quantize(tmp_path / "wide", scheme, tmp_path / scheme, scales=scales)
    report = prove(tmp_path / scheme)
    assert report.passed, report.first_divergence


def test_vllm_reads_an_artefact(tmp_path: Path) -> None:
    """The folder of a build for target torch is a checkpoint."""
    write_random_checkpoint(small("scout"), tmp_path / "wide", seed=2)
    art = moec.export(tmp_path / "wide", "torch", out=tmp_path / "artefact")
    assert prove(art.path).passed


def test_vllm_computes_a_trained_model(tmp_path: Path) -> None:
    """It is trained here, for a minute, because vLLM wants heads of 128."""
    command = (sys.executable, "-m", "tests.trained.train", "llama4-heads-of-128")
    done = subprocess.run([*command, tmp_path / "wide", "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout.splitlines()[-1])
    moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "trained")
    report = prove(tmp_path / "trained")
    assert report.passed, report.first_divergence


def scale(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.feed_forward.experts.3.down_proj.weight_scale"] *= 2


def name(weights: dict[str, Tensor]) -> None:
    one, two = (f"model.layers.1.feed_forward.experts.{e}.up_proj.weight" for e in (2, 5))
    weights[one], weights[two] = weights[two], weights[one]


def permutation(weights: dict[str, Tensor]) -> None:
    key = "model.layers.0.self_attn.k_proj.weight"
    rows = weights[key].view(torch.uint8).view(2, 64, 2, -1).transpose(1, 2)  # as if for halves
    weights[key] = rows.reshape(256, -1).contiguous().view(torch.float8_e4m3fn)


def missing(weights: dict[str, Tensor]) -> None:
    """An expert under another name: vLLM does not load such a checkpoint."""
    key = "model.layers.1.feed_forward.shared_expert.up_proj.weight"
    weights[key.replace("up_proj", "other_proj")] = weights.pop(key)


@pytest.mark.parametrize("damage", [scale, name, permutation, missing])
def test_damage_is_seen(
    damage: Callable[[dict[str, Tensor]], None], scout: Path, tmp_path: Path
) -> None:
    """vLLM reads a damaged copy, and the reference the sound checkpoint."""
    shutil.copytree(scout, tmp_path / "theirs")
    only_shard(damage)(tmp_path / "theirs")
    assert not prove(scout, tmp_path / "theirs").passed


@pytest.mark.slow
@pytest.mark.parametrize("preset, chunk", [("scout", 8192), ("maverick", 512)])
def test_two_layers_of_full_width(preset: str, chunk: int, tmp_path: Path) -> None:
    """Published widths, one chunked layer and one global, past the border of a chunk.

    There are fewer words, and Maverick's chunks are short: the reference runs on a CPU.
    """
    spec = PRESETS[preset]
    both = {"layers": 2, "attention": "LG", "rope": "RN", "temperature": "-T"}
    both |= {"qk_norm": "Q-"} if "Q" in spec.text.qk_norm else {}
    values = spec.model_dump()
    values["text"] |= both | {"vocab": 16384, "chunk": chunk}
    values["tokens"] = {"bos": 0, "eos": (1,), "pad": 2}
    spec = ModelSpec.model_validate(values | {"vision": None})
    write_random_checkpoint(spec, tmp_path / "wide", seed=1, device="cuda")
    moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "fp8")
    shutil.rmtree(tmp_path / "wide")
    torch.cuda.empty_cache()
    report = against(tmp_path / "fp8", "vllm", tokens=chunk + 108, seed=3, python=PYTHON)
    print(report.engine, *report.checks, sep="\n  ")
    assert report.passed, report.first_divergence
