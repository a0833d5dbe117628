"""Small random models of every architecture but Llama 4 against transformers in float32.

Checkpoints are in the layout that is published: transformers reads what moec writes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.spec.files import diff
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.deepseek_moe import deepseek_moe_logits
from tests.families import CASES
from tests.oracle import transformers_logits
from tests.parity import check_pieces, check_prefill, sessions

pytestmark = pytest.mark.full

ORACLES: dict[str, Callable[..., list[Tensor]]] = {"deepseek_moe": deepseek_moe_logits}


#: the cases that target torch runs too, one of each family
TORCH = (
    "olmoe",
    "qwen3 windows, dense layer",
    "mixtral",
    "deepseek-moe",
    "deepseek-v3",
    "aria",
)


def check(spec: ModelSpec, folder: Path, seed: int, torch_too: bool = False) -> None:
    """Every engine gives the oracle's logits: ragged rows, in one call and in pieces."""
    write_random_checkpoint(spec, folder / "weights", seed)
    _tie(folder / "weights", spec)
    generator = torch.Generator().manual_seed(seed)
    lengths = [33, 9, 20]
    rows = [torch.randint(0, spec.text.vocab, (n,), generator=generator) for n in lengths]
    expected = ORACLES.get(spec.architecture, transformers_logits)(folder / "weights", rows)
    changed = diff(moec.load_spec(folder / "weights"), spec)
    assert [row for row in changed if row[0].startswith("text.")] == []
    for session in sessions(folder, *(["torch"] if torch_too else [])):
        check_prefill(session, rows, expected)
        check_pieces(session, rows, expected, [7, 8, 9, 10, 25])


def _tie(folder: Path, spec: ModelSpec) -> None:
    """Make experts 0 and 1 of each layer the same, routers too: either may be chosen."""
    file = folder / "model.safetensors"
    found = load_file(file)
    for key in found:
        if any(part in key for part in (".gate.weight", ".router.weight", "correction_bias")):
            found[key][1] = found[key][0]
        elif ".experts.1." in key:
            found[key] = found[key.replace(".experts.1.", ".experts.0.")].clone()
        elif ".experts.fc" in key:
            found[key][1] = found[key][0]
    save_file(found, file, metadata={"format": "pt"})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_oracle(case: str, tmp_path: Path) -> None:
    check(CASES[case], tmp_path, seed=5, torch_too=case in TORCH)


# A failing example is small already, and to shrink it takes minutes.
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 2**31), data=st.data())
def test_random_sizes(
    case: str, seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = CASES[case].text
    experts = text.experts
    assert experts is not None
    most = experts.count // experts.routing.groups * experts.routing.kept_groups
    changed = experts.model_copy(
        update={
            "top_k": data.draw(st.integers(1, most), "top_k"),
            "hidden": 8 * data.draw(st.integers(1, 3), "hidden"),
        }
    )
    if experts.shared_hidden:
        count = data.draw(st.integers(1, 3), "shared experts")
        changed = changed.model_copy(update={"shared_hidden": count * changed.hidden})
    spec = CASES[case].model_copy(update={"text": text.model_copy(update={"experts": changed})})
    check(spec, tmp_path_factory.mktemp("random"), seed)


def test_the_cases_have_every_switch(tmp_path: Path) -> None:
    texts = [spec.text for spec in CASES.values()]
    routings = [text.experts.routing for text in texts if text.experts]
    assert all(text.experts and text.experts.top_k > 1 for text in texts)
    assert {each.score for each in routings} == {"sigmoid", "softmax", "softmax_of_chosen"}
    assert (
        {each.normalise for each in routings} == {each.bias for each in routings} == {True, False}
    )
    shared = {text.experts.shared_hidden for text in texts if text.experts}
    assert None in shared and len(shared) > 2
    assert any(each.groups > 1 for each in routings) and {1.0} < {each.factor for each in routings}
    assert {text.qk_norm for text in texts} == {"W", "H", "-"}
    assert {text.rope_pairs for text in texts} == {"adjacent", "halves"}
    assert any(text.latent and text.latent.value != text.latent.nope for text in texts)
    assert any(text.window for text in texts) and any(text.clip_qkv for text in texts)
    assert any("D" in text.ffn for text in texts)
    write_random_checkpoint(CASES["deepseek-v3"], tmp_path, seed=5)
    weights = load_file(tmp_path / "model.safetensors")
    assert any((each < 0).any() for key, each in weights.items() if "correction_bias" in key)


@pytest.mark.parametrize(
    "case", ["deepseek-v3", *(pytest.param(c, marks=pytest.mark.slow) for c in ("olmoe", "aria"))]
)
def test_a_proof_passes(case: str, tmp_path: Path) -> None:
    write_random_checkpoint(CASES[case], tmp_path / "weights", seed=5)
    for target in ("onnx", "ort"):
        artefact = moec.export(tmp_path / "weights", target=target, out=tmp_path / target).path
        report = moec.validate(artefact)
        assert report.passed, report.first_divergence


def test_layers_that_predict_more_tokens_are_left_aside(tmp_path: Path) -> None:
    spec = CASES["deepseek-v3"]
    write_random_checkpoint(spec, tmp_path, seed=5)
    weights = load_file(tmp_path / "model.safetensors")
    more = {
        key.replace("layers.2.", "layers.3."): each.clone()
        for key, each in weights.items()
        if "layers.2." in key
    }
    save_file(weights | more, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    artefact = moec.export(tmp_path, out=tmp_path / "artefact")
    notes = " ".join(artefact.manifest.spec.notes)
    assert "layer 3, which predicts further tokens" in notes
    assert f"{len(more)} tensors were left aside" in notes


@pytest.mark.parametrize(
    "target, precision",
    [("torch", "fp32"), pytest.param("onnx", "fp8", marks=pytest.mark.slow)],
)
def test_an_artefact_without_weights_is_proven(target: str, precision: str, tmp_path: Path) -> None:
    """Its reduced-size model has the experts apart, as the architecture has them."""
    artefact = moec.export(CASES["qwen3"], target, precision, tmp_path / "artefact").path
    report = moec.validate(artefact)
    assert report.passed, report.first_divergence
