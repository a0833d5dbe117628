"""A checkpoint with static scales of inputs, one scale for each weight, as engines read it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.spec.errors import MoecError
from moec.spec.scheme import PER_TENSOR
from moec.weights.random import write_random_checkpoint
from tests.exporters.test_quantize import MODELS, in_matrices

IDS = torch.arange(3, 40)[None]
PER_EXPERT = PER_TENSOR.model_copy(
    update={"rules": (PER_TENSOR.rules[0].model_copy(update={"inputs": "expert"}),)}
)


def drawn(words: int, rows: int) -> torch.Tensor:
    """Token ids [rows, 24], the same in every run."""
    return torch.randint(0, words, (rows, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["llama4", "llama4 with images", "qwen3", "mixtral"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def scales(wide: Path) -> moec.Calibration:
    return moec.calibrate(wide, drawn(200, 4))


def test_the_tensors_are_what_the_definition_gives(
    wide: Path, scales: moec.Calibration, tmp_path: Path
) -> None:
    """One scale for a weight; that of gate and up is one, because vLLM multiplies both by one."""
    folder = moec.quantize(wide, "per-tensor", tmp_path / "fp8", scales=scales).path
    given = in_matrices(load_file(wide / "model.safetensors"))
    found = load_file(folder / "model.safetensors")
    quantised = [k.removesuffix(".weight_scale") for k in found if k.endswith("weight_scale")]
    assert any("experts" in stem for stem in quantised)
    for stem in quantised:
        weight, alike = given.pop(f"{stem}.weight").float(), stem
        if "experts." in stem:
            other = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
            head, _, last = stem.rpartition(".")
            alike = f"{head}.{other.get(last, last)}"
        scale, inputs = found.pop(f"{stem}.weight_scale"), found.pop(f"{stem}.input_scale")
        assert scale.shape == inputs.shape == (1,) and float(inputs) > 0
        assert float(scale) >= float(weight.abs().max() / 448)
        both = [float(found[f"{each}.weight"].float().abs().max()) for each in {stem, alike}]
        assert max(both) == 448
        expected = (weight / scale).to(torch.float8_e4m3fn)
        assert torch.equal(found[f"{stem}.weight"].float(), expected.float()), stem
    assert not [key for key in found if key.endswith("scale")]
    assert all(torch.equal(found[key], tensor) for key, tensor in given.items())


def test_the_inputs_of_all_experts_of_a_layer_share_a_scale(
    wide: Path, scales: moec.Calibration, tmp_path: Path
) -> None:
    """vLLM takes the largest of them all. Another scheme may have one for each expert."""
    kinds = {}
    for scheme in (PER_TENSOR, PER_EXPERT):
        folder = moec.quantize(wide, scheme, tmp_path / scheme.rules[0].inputs, scales=scales).path
        found = load_file(folder / "model.safetensors")
        layer = [k for k in found if ".layers.1." in k and "experts.0." not in k]
        ups = [k for k in layer if ".experts." in k and "down" not in k and "w2" not in k]
        kinds[scheme.rules[0].inputs] = {float(found[k]) for k in ups if k.endswith("input_scale")}
    assert len(kinds["tensor"]) == 1 and len(kinds["expert"]) > 1
    assert kinds["tensor"] >= {max(kinds["expert"])}


@pytest.mark.full
@pytest.mark.parametrize(
    "model, target",
    [
        ("llama4", "onnx"),
        ("llama4", "ort"),
        ("qwen3", "onnx"),
        ("qwen3", "ort"),
        ("qwen3", "torch"),
    ],
)
def test_a_build_from_it_computes_what_its_own_scheme_says(
    model: str, target: str, tmp_path: Path
) -> None:
    """moec's own packing, with the same scales, gives the same numbers."""
    write_random_checkpoint(MODELS[model], tmp_path / "wide", seed=3)
    # enough tokens, of all words that a proof draws: each expert's scale has to fit those too
    scales = moec.calibrate(tmp_path / "wide", drawn(MODELS[model].text.vocab, 32))
    folder = moec.quantize(tmp_path / "wide", PER_EXPERT, tmp_path / "fp8", scales=scales).path
    art = moec.export(folder, target, "fp8", tmp_path / "art")
    assert moec.validate(art.path).passed
    if target == "onnx" and model == "qwen3":  # in Llama 4 q, k and v are quantised too
        own = moec.export(
            tmp_path / "wide", target, "fp8", tmp_path / "own", scheme=PER_EXPERT, scales=scales
        )
        one, two = (torch.as_tensor(moec.open_session(a.path).logits(IDS)) for a in (art, own))
        assert (one - two).norm() < 1e-5 * two.norm()


def test_the_config_is_that_of_the_form(
    wide: Path, scales: moec.Calibration, tmp_path: Path
) -> None:
    folder = moec.quantize(wide, "per-tensor", tmp_path / "fp8", scales=scales).path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == group["input_activations"]["strategy"] == "tensor"
    assert group["input_activations"]["dynamic"] is False
    spec = moec.load_spec(folder)
    assert spec.scheme is not None
    assert {(r.weight, r.inputs) for r in spec.scheme.rules} == {("expert", "expert")}


def test_scales_must_be_there_and_sound(
    wide: Path, scales: moec.Calibration, tmp_path: Path
) -> None:
    with pytest.raises(MoecError, match="no calibration was given"):
        moec.quantize(wide, "per-tensor", tmp_path / "fp8")
    with pytest.raises(MoecError, match="no static scales"):
        moec.quantize(wide, "dynamic", tmp_path / "fp8", scales=scales)
    assert not (tmp_path / "fp8").exists()
    folder = moec.quantize(wide, "per-tensor", tmp_path / "fp8", scales=scales).path
    tensors = load_file(folder / "model.safetensors")
    key = next(each for each in tensors if each.endswith("input_scale"))
    for value, message in ((-1.0, "above 0"), (None, "no such tensor")):
        changed = dict(tensors)
        changed.pop(key)
        if value is not None:
            changed[key] = torch.tensor([value])
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MoecError, match=message):
            moec.export(folder, out=tmp_path / "art")
