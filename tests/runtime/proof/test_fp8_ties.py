"""Roundings to FP8 that the last bit of a float32 decides: the reference takes the engine's."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.artefact.artefact import write_manifest
from moec.artefact.manifest import File
from moec.graph_builder.ops import FP8
from moec.graph_builder.passes.follow_codes import taken_codes
from moec.runtime.proof.report import Report
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view
from tests.families import CASES
from tests.proofs import assert_passed

#: in the middle between two values of E4M3 each, of the binades up to 128
TIES = torch.tensor([(17 + 2 * i) / 16 * 2.0**e for i in range(8) for e in range(-2, 7)])


def codes(values: list[float]) -> Tensor:
    return torch.tensor([values]).to(FP8)


def taken(x: list[float], theirs: list[float], noise: float = 4e-6) -> list[float]:
    wide = torch.tensor([x])
    own, one = wide.to(FP8), torch.ones(1)
    return taken_codes(wide, one, 0, 0, own, codes(theirs), noise).float()[0].tolist()


def test_both_neighbours_of_a_tie_are_right() -> None:
    assert taken([448.0, 17.0], [448.0, 16.0]) == [448.0, 16.0]
    assert taken([448.0, 17.0], [448.0, 18.0]) == [448.0, 18.0]
    assert taken([448.0, 17.0 + 1e-3], [448.0, 16.0]) == [448.0, 16.0], "as share of the largest"
    assert taken([448.0, -17.0], [448.0, -18.0]) == [448.0, -18.0]


def test_elsewhere_the_references_own_value_counts() -> None:
    assert taken([448.0, 17.0], [448.0, 20.0]) == [448.0, 16.0], "two steps"
    assert taken([448.0, 17.1], [448.0, 16.0]) == [448.0, 18.0], "no tie"
    assert taken([448.0, 16.1], [448.0, 18.0]) == [448.0, 16.0]
    assert taken([448.0, 17.0], [448.0, float("nan")]) == [448.0, 16.0]
    assert taken([448.0, 17.0], [448.0, -16.0]) == [448.0, 16.0]
    assert taken([0.0, 0.0], [0.0, 448.0]) == [0.0, 0.0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 with norms of 1: all inputs of the first layer are ties, as seven in a thousand are.

    An embedding over its largest element is then an exact ratio of two bf16 numbers.
    """
    folder = tmp_path_factory.mktemp("ties") / "wide"
    spec = CASES["mixtral"].model_copy(update={"dtype": "bf16", "dtypes": {}})
    write_random_checkpoint(spec, folder, seed=3)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, value in weights.items():
        if "norm" in key:
            weights[key] = torch.ones_like(value)
    embed = weights["model.embed_tokens.weight"]
    drawn = TIES[torch.randint(0, len(TIES), embed.shape, generator=generator)]
    drawn *= torch.randint(0, 2, embed.shape, generator=generator) * 2 - 1
    drawn[:, 0] = 448.0
    weights["model.embed_tokens.weight"] = (drawn / 64).to(embed.dtype)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_sound_artefact_passes_although_all_inputs_are_ties(
    target: str, wide: Path, tmp_path: Path
) -> None:
    art = moec.export(wide, target, "fp8", tmp_path / "art", scheme="dynamic").path
    for seed in range(3):
        report = moec.validate(art, seed=seed)
        assert_passed(report)
        alone = _alone(report)
        assert len(alone) == 3 + 1 and max(alone.values()) < 1e-5, alone


@pytest.mark.parametrize("name", ["k", "v", "o"])
def test_a_scale_that_is_off_is_found_among_ties(name: str, wide: Path, tmp_path: Path) -> None:
    art = moec.export(wide, "onnx", "fp8", tmp_path / "art", scheme="dynamic")
    model = ir.load(art.graph("model"))
    weight = f"layers.0.attn.{name}.weight"
    scale = 1.03 * view(art.stored()[f"{weight}_scale"]).float()
    node = next(node for node in model.graph if node.outputs[0].name == f"{weight}.wide")
    value = ir.Value(name="scale.off", const_value=ir.tensor(scale.numpy(), name="scale.off"))
    model.graph.initializers["scale.off"] = value
    node.replace_input_with(1, value)
    ir.save(model, art.graph("model"))
    file = art.graph("model")
    files = art.manifest.files | {file.name: File(size=file.stat().st_size, sha256="0" * 64)}
    write_manifest(art.path, art.manifest.model_copy(update={"files": files}))
    alone = _alone(moec.validate(art.path, seed=1))
    assert alone.pop("layers.0") > 1e-3 and max(alone.values()) < 1e-5, alone


def _alone(report: Report) -> dict[str, float]:
    end = ", same inputs"
    found = [check for check in report.checks if check.name.endswith(end)]
    return {check.name.removesuffix(end): check.found for check in found}
