"""Calibration against magnitudes found by hand, its file, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.runtime.calibrate import _Magnitudes, calibrate
from moec.runtime.open import eager_session
from moec.spec.calibration import Calibration, read_calibration, static_scales
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.reduced import reduced
from moec.spec.scheme import SCHEMES, Scheme
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint

SPEC = reduced(moec.load_spec("scout").model_copy(update={"vision": None}), 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "w"
    write_random_checkpoint(SPEC, folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, SPEC.text.vocab, (5, 21))


@pytest.fixture(scope="module")
def found(weights: Path, rows: torch.Tensor) -> Calibration:
    return calibrate(weights, rows, batch=2)


def test_magnitudes_are_those_of_the_values(
    weights: Path, rows: torch.Tensor, found: Calibration
) -> None:
    spec, _, entries = read_model(weights)
    taps = {
        "layers.1.attn.q.weight": "layers.1.attn.norm",
        "layers.2.moe.shared.down.weight": "layers.2.moe.shared.act",
        "layers.3.attn.o.weight": "layers.3.attn.mix.packed",
        "head.weight": "norm",
    }
    session = eager_session(spec, entries, "fp32", taps=list(taps.values()))
    whole = session.trace(rows, torch.full((5,), 21), list(taps.values()))
    for site, value in taps.items():
        largest = float(whole[value].abs().max())
        if site == "head.weight":  # calibration asks for logits of last tokens alone
            assert found.inputs[site] <= largest * (1 + 1e-5)  # other batches round otherwise
        else:
            assert found.inputs[site] == pytest.approx(largest, rel=1e-5)


def test_experts_have_one_each_and_those_nobody_chose_the_largest_of_their_layer(
    weights: Path, rows: torch.Tensor
) -> None:
    few = calibrate(weights, rows[:1, :3])
    assert few.tokens == 3 and few.unseen
    for name in few.unseen:
        fused, _, index = name.partition("[")
        sizes = few.inputs[fused]
        assert isinstance(sizes, tuple) and len(sizes) == SPEC.text.experts.count
        assert sizes[int(index[:-1])] == max(sizes)
    seen = SPEC.text.experts.count - sum(n.startswith("layers.0.moe.down") for n in few.unseen)
    assert 1 <= seen <= 3


def test_a_percentile_is_below_the_largest_and_near_the_true_one() -> None:
    sites = _Magnitudes(99.0), _Magnitudes(100.0)
    x = torch.randn(4, 5000).exp()
    for part in x:
        for site in sites:
            site.add(part)
    assert sites[1].found == x.max().item()
    assert sites[0].found == pytest.approx(float(x.flatten().quantile(0.99)), rel=0.02)


def test_the_order_and_size_of_batches_do_not_matter(
    weights: Path, rows: torch.Tensor, found: Calibration
) -> None:
    again = calibrate(weights, rows.flip(0), batch=5)
    assert again.unseen == found.unseen
    for name, sizes in found.inputs.items():
        assert np.allclose(sizes, again.inputs[name], rtol=1e-4)
    assert again.caches == pytest.approx(found.caches, rel=1e-4)


@pytest.mark.parametrize("inputs", ["tensor", "expert"])
def test_scales_are_magnitudes_over_448(inputs: str, found: Calibration) -> None:
    rule = {**SCHEMES["modelopt"].rules[0].model_dump(), "inputs": inputs}
    scheme = Scheme.model_validate({"name": "s", "rules": [rule], "cache": True})
    scales = static_scales(_with(scheme), found)
    sizes = found.inputs["layers.0.moe.down"]
    assert isinstance(sizes, tuple)
    scale = scales["layers.0.moe.down_input_scale"]
    assert scale == (tuple(s / 448 for s in sizes) if inputs == "expert" else max(sizes) / 448)
    assert scales["layers.1.attn.v_scale"] == found.caches["layers.1.attn.v"] / 448
    assert static_scales(_with(SCHEMES["meta"]), None) == {}


def test_a_file_of_scales_is_read_back_or_refused(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(found.model_dump_json())
    assert read_calibration(path) == found
    values = json.loads(path.read_text())
    for damage, named in (
        ({"format": "moec-scales/9"}, "format"),
        ({"inputs": {"layers.0.attn.q.weight": "large"}}, "inputs"),
        ({"sparkle": 1}, "sparkle"),
    ):
        path.write_text(json.dumps(values | damage))
        with pytest.raises(MoecError, match=named):
            read_calibration(path)
    path.write_text("{")
    with pytest.raises(MoecError, match="broken JSON"):
        read_calibration(path)


def test_scales_of_another_model_are_refused(found: Calibration) -> None:
    spec = _with(SCHEMES["modelopt"])
    odd = {
        "a site is missing": {"inputs": {}},
        "experts of another number": {"inputs": {**found.inputs, "layers.0.moe.down": (1.0, 2.0)}},
        "a magnitude below zero": {"inputs": {**found.inputs, "layers.0.attn.q.weight": -1.0}},
        "no caches": {"caches": {}},
    }
    for what, change in odd.items():
        with pytest.raises(MoecError, match="calibrate"):
            static_scales(spec, found.model_copy(update=change))
            pytest.fail(what)


def test_fp8_weights_and_odd_percentiles_are_refused(
    weights: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    narrow = SPEC.model_copy(
        update={"scheme": SCHEMES["modelopt"].model_copy(update={"layout": "modelopt"})}
    )
    trimmed = narrow.model_copy(update={"scheme": reduced(narrow).scheme})
    write_random_checkpoint(trimmed, tmp_path / "fp8")
    with pytest.raises(MoecError, match="wide weights"):
        calibrate(tmp_path / "fp8", rows)
    for bad in (0.0, -1.0, 100.5, float("nan")):
        with pytest.raises(MoecError, match="percentile"):
            calibrate(weights, rows, percentile=bad)


def _with(scheme: Scheme) -> ModelSpec:
    return SPEC.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "feed_forward.experts.gate_up_proj"])
def test_weights_that_are_not_finite_are_noticed(
    bad: float, name: str, weights: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "weights"))
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(name) and "layers.1." in key)
    tensors[key].flatten()[-1] = bad  # of experts the last one
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MoecError, match="not finite"):
        calibrate(folder, rows.repeat(8, 1))


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(0, 4, dtype=torch.int64), torch.ones(2, 3), torch.tensor([[999]]),
     torch.tensor([[-1]]), torch.ones(1, 2, 3, dtype=torch.int64)],
)  # fmt: skip
def test_tensors_that_are_no_tokens_are_refused(tokens: torch.Tensor, weights: Path) -> None:
    with pytest.raises(MoecError, match="tokens"):
        calibrate(weights, tokens)
