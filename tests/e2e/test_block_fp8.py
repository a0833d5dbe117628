"""Block FP8 with `weight_scale_inv`, as DeepSeek publishes it, read in place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from moec.runtime.open import eager_session
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.oracle import relative, transformers_logits
from tests.refusals import refusal

BLOCK = 16
CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def _spec() -> ModelSpec:
    spec = reduced(PRESETS["deepseek-v3"], 5)
    experts = spec.text.experts
    assert experts is not None
    few = experts.model_copy(update={"count": 16, "top_k": 3})
    return spec.model_copy(update={"text": spec.text.model_copy(update={"experts": few})})


def _wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, each in tensors.items():
        scale = tensors.get(f"{key}_scale_inv")
        if scale is not None:
            rows, columns = each.shape
            grid = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            found[key] = (each.float() * grid[:rows, :columns]).contiguous()
        elif not key.endswith("_scale_inv"):
            found[key] = each.float()
    return found


@pytest.mark.full
def test_the_weights_are_those_that_the_scales_say(tmp_path: Path) -> None:
    plain = _spec()
    scheme = read_scheme(CONFIG, tmp_path / "config.json", plain)
    write_random_checkpoint(plain.model_copy(update={"scheme": scheme}), tmp_path / "fp8", 4)
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    scaled = {key.removesuffix("_scale_inv") for key in tensors if key.endswith("_scale_inv")}
    assert not any(".gate." in key or "lm_head" in key for key in scaled)
    assert any("kv_b_proj" in key for key in scaled) and any(".experts." in key for key in scaled)

    write_random_checkpoint(plain, tmp_path / "wide", 4)  # for its config.json
    save_file(_wide(tensors), tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    rows = [torch.randint(0, 256, (n,), generator=torch.manual_seed(n)) for n in (19, 6)]
    expected = transformers_logits(tmp_path / "wide", rows)
    spec, _, entries = read_model(tmp_path / "fp8")
    assert spec.scheme is not None and spec.scheme.layout == "fp8"
    exact = tuple(rule.model_copy(update={"inputs": "none"}) for rule in spec.scheme.rules)
    unrounded = spec.model_copy(update={"scheme": spec.scheme.model_copy(update={"rules": exact})})
    session = eager_session(unrounded, entries, "fp32")
    for row, want in zip(rows, expected, strict=True):
        assert relative(session.logits(row[None])[0], want) < 1e-4

    artefact = moec.export(tmp_path / "fp8", precision="fp8", out=tmp_path / "artefact")
    assert artefact.manifest.weights.mode == "in-place"
    report = moec.validate(artefact.path)
    assert report.passed, report.first_divergence


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"weight_block_size": [128, 64]}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
    ],
)
def test_other_forms_are_refused(change: dict[str, object], names: str, tmp_path: Path) -> None:
    config = {key: value for key, value in (CONFIG | change).items() if value is not None}
    refusal(lambda: read_scheme(config, tmp_path / "config.json", _spec()), names)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    refusal(lambda: read_scheme(CONFIG, tmp_path / "config.json", PRESETS["scout"]), "one tensor")


def test_a_sparse_checkpoint_builds(tmp_path: Path) -> None:
    """Sparse files are zeros, but no scale may be zero."""
    scheme = read_scheme(CONFIG, tmp_path / "config.json", _spec())
    write_sparse_checkpoint(
        _spec().model_copy(update={"scheme": scheme}), tmp_path / "sparse", 10**6
    )
    art = moec.export(tmp_path / "sparse", "onnx", out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place"
