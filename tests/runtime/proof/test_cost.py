"""What a precision costs: nothing where nothing changed, and refusals."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.proof.cost import cost
from moec.spec.errors import MoecError
from moec.weights.random import write_random_checkpoint
from tests.damage import INDEX, ONLY
from tests.families import CASES

pytestmark = pytest.mark.full


def test_float32_costs_nothing(tiny_onnx: Path, golden: dict[str, Tensor]) -> None:
    found = cost(open_artefact(tiny_onnx), "bf16", golden["eval_ids"][:2, :90])
    assert found.tokens == 180
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert abs(found.kl) < 1e-9 and found.same_choice == 1 and found.router_flips == 0
    assert max(found.layers.values()) < 1e-5
    assert set(found.flips) == set(found.layers) == {f"layers.{i}" for i in range(8)}


def test_kl_and_perplexity_are_those_of_the_definitions(
    tiny: Path, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    art = moec.export(tiny, precision="fp8", out=tmp_path / "art")
    rows = golden["eval_ids"][:3, :64]
    found = cost(art, str(tiny), rows)
    wide = moec.open_session(tiny).logits(rows).double().log_softmax(-1)[:, :-1]
    narrow = moec.open_session(art.path).logits(rows).double().log_softmax(-1)[:, :-1]
    kl = torch.nn.functional.kl_div(narrow, wide, reduction="none", log_target=True).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=0.3)  # rows one by one: other noise
    nll = -wide.gather(2, rows[:, 1:, None]).mean()
    assert found.reference_perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_a_reference_named_by_the_file_that_lists_its_weights(
    tiny: Path, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    """As `build` takes it, where a folder has two sets of weights; the manifest then names it."""
    two = shutil.copytree(tiny, tmp_path / "two")
    shutil.copy(two / "model-00003-of-00003.safetensors", two / ONLY)
    art = moec.export(two / INDEX, precision="fp8", out=tmp_path / "art")
    rows = golden["eval_ids"][:1, :8]
    found = [cost(art, each, rows) for each in ("bf16", str(two / INDEX), str(tiny))]
    assert found[0].reference == found[1].reference == str(two / INDEX)
    assert found[0].perplexity == found[2].perplexity
    with pytest.raises(MoecError, match=f"name that file, such as {two}"):
        cost(art, str(two), rows)


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
@pytest.mark.parametrize(("target", "precision"), [
    ("onnx", "fp8"), ("torch", "fp8"), ("ort", "fp32"), ("torch", "bf16"),
])  # fmt: skip
def test_models_whose_experts_are_stored_one_by_one(
    name: str, target: str, precision: str, tmp_path: Path
) -> None:
    write_random_checkpoint(CASES[name], tmp_path / "w", seed=1)
    art = moec.export(tmp_path / "w", target, precision, tmp_path / "art")
    found = cost(art, str(tmp_path / "w"), torch.randint(0, 256, (2, 12)))
    assert found.tokens == 24 and 0 <= found.kl < 0.2


@pytest.mark.slow
def test_rows_are_drawn_from_the_reference_and_again_with_a_seed(
    tiny: Path, tmp_path: Path
) -> None:
    art = moec.export(tiny, precision="fp8", scheme="dynamic", out=tmp_path / "art")
    first, second = (cost(art, "bf16", seed=7) for _ in range(2))
    assert first == second and first.tokens == 512
    assert 1 < first.reference_perplexity < 40  # tokens that the model itself finds likely


def test_references_that_are_none_are_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    art = moec.export(checkpoint, precision="fp8", out=tmp_path / "art")
    other = moec.load_spec("tiny-scout")
    other = other.model_copy(
        update={"text": other.text.model_copy(update={"layers": 2, "vocab": 8000})}
    )
    write_random_checkpoint(other, tmp_path / "other")
    with pytest.raises(MoecError, match=r"text\.layers"):
        cost(art, str(tmp_path / "other"))
    with pytest.raises(MoecError, match="no such folder"):
        cost(art, str(tmp_path / "none"))
    with pytest.raises(MoecError, match="2 tokens"):
        cost(art, "bf16", torch.tensor([[5], [6]]))
    shutil.rmtree(checkpoint)
    with pytest.raises(MoecError, match="--reference DIR"):
        cost(art, "bf16")
    with pytest.raises(MoecError, match="--reference bf16"):
        moec.validate(art.path, rows=[[1, 2]])
    with pytest.raises(MoecError, match="twin"):
        moec.validate(art.path, reduced=True, reference="bf16")
