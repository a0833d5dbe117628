"""A checkpoint of 4-bit integers that moec wrote: by definition, in moec and in transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Llama4ForCausalLM

import moec
from moec.runtime.proof.against.compare import against
from moec.spec.errors import MoecError
from moec.spec.scheme import PER_TENSOR, W4A16, Scheme
from moec.weights.random import write_random_checkpoint
from tests.exporters.test_quantize import MODELS, in_matrices

SIDE = 8
SCHEME = W4A16.model_copy(update={"block": SIDE})  # narrow models have no groups of 128
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=["llama4", "llama4 with images", "qwen3", "mixtral"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def quantised(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moec.quantize(wide, SCHEME, tmp_path_factory.mktemp("int4") / "q").path


def integers(words: Tensor) -> Tensor:
    """Words [rows, n] as integers [rows, 8 n]: the first one is in the lowest bits of a word."""
    shifts = torch.arange(0, 32, 4)
    return ((words[..., None].long() >> shifts) & 15).flatten(1)


def meant(tensors: dict[str, Tensor], stem: str) -> Tensor:
    scales = tensors[f"{stem}.weight_scale"].float().repeat_interleave(SIDE, 1)
    return (integers(tensors[f"{stem}.weight_packed"]) - 8).float() * scales


def test_the_tensors_are_what_the_definition_gives(wide: Path, quantised: Path) -> None:
    """Each value is at the nearest multiple of its group's scale, which reaches the largest."""
    given, found = (
        in_matrices(load_file(wide / "model.safetensors")),
        load_file(quantised / "model.safetensors"),
    )
    packed = [key.removesuffix(".weight_packed") for key in found if key.endswith("_packed")]
    assert any("experts" in each for each in packed)
    for stem in packed:
        right, mine = given.pop(f"{stem}.weight"), meant(found, stem)
        assert found.pop(f"{stem}.weight_shape").tolist() == list(right.shape)
        scales = found[f"{stem}.weight_scale"]
        assert scales.dtype == right.dtype and scales.shape == (len(right), right.shape[1] // SIDE)
        largest = right.float().unflatten(1, (-1, SIDE)).abs().amax(2)
        assert torch.equal(scales.float().abs(), (largest / 8).to(scales.dtype).float())
        step = scales.float().abs().repeat_interleave(SIDE, 1)
        off = (mine - right.float()).abs()
        # the end of the range without the largest value has one step less
        assert bool((off <= 1.02 * step).all()) and float((off > 0.51 * step).float().mean()) < 0.05
    assert all(torch.equal(found[key], tensor) for key, tensor in given.items())


def test_the_config_says_it(wide: Path, quantised: Path) -> None:
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, SIDE, True)
    spec = moec.load_spec(quantised)
    assert spec.scheme is not None and spec.scheme.int4 and spec.scheme.block == SIDE
    llama4 = "llama4" in str(json.loads((wide / "config.json").read_text())["model_type"])
    attention = [p for p in "qkvo" if spec.scheme.rule(f"layers.1.attn.{p}.weight")]
    assert attention == (["o"] if llama4 else list("qkvo"))  # vLLM permutes q and k of Llama 4
    assert "4-bit integers" in (quantised / "README.md").read_text()


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama4", "qwen3", "mixtral"])
def test_transformers_means_the_same(model: str, tmp_path: Path) -> None:
    # in float32, because transformers rounds a value times a scale to the type of the scale
    spec = MODELS[model].model_copy(update={"dtype": "fp32"})
    write_random_checkpoint(spec, tmp_path / "wide", seed=3)
    folder = moec.quantize(tmp_path / "wide", SCHEME, tmp_path / "q").path
    kind = Llama4ForCausalLM if model == "llama4" else AutoModelForCausalLM
    loaded, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.inference_mode():
        expected = loaded.eval()(IDS, use_cache=False).logits
    art = moec.export(folder, "onnx", out=tmp_path / "art")
    found = torch.as_tensor(moec.open_session(art.path).logits(IDS.numpy()))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.full
def test_a_build_from_it_is_proven(tmp_path: Path) -> None:
    write_random_checkpoint(MODELS["llama4"], tmp_path / "wide", seed=3)
    folder = moec.quantize(tmp_path / "wide", SCHEME, tmp_path / "q").path
    art = moec.export(folder, "onnx", out=tmp_path / "art")
    assert art.manifest.precision == "int4" and moec.validate(art.path).passed


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama4", "qwen3"])
def test_a_proof_in_transformers_passes(model: str, tmp_path: Path) -> None:
    write_random_checkpoint(MODELS[model], tmp_path / "wide", seed=3)
    folder = moec.quantize(tmp_path / "wide", SCHEME, tmp_path / "q").path
    report = against(folder, "transformers", tokens=60, seed=1)
    assert report.passed, report.first_divergence


@pytest.mark.parametrize("scheme", [SCHEME, PER_TENSOR], ids=lambda scheme: scheme.name)
def test_heads_of_latent_attention_stay_wide(scheme: Scheme, tmp_path: Path) -> None:
    """No product of 4-bit integers exists for them, and no input that a static scale is of."""
    write_random_checkpoint(MODELS["deepseek-v3"], tmp_path / "wide", seed=3)
    scales = moec.calibrate(tmp_path / "wide", IDS) if scheme is PER_TENSOR else None
    folder = moec.quantize(tmp_path / "wide", scheme, tmp_path / "q", scales=scales).path
    spec = moec.load_spec(folder)
    assert spec.scheme is not None
    names = ("attn.kv_up", "attn.o", "moe.shared.up")
    rules = [spec.scheme.rule(f"layers.2.{name}.weight") for name in names]
    assert [rule is not None for rule in rules] == [False, True, True]
    art = moec.export(folder, "onnx", out=tmp_path / "art")
    assert moec.open_session(art.path).logits(IDS.numpy()).shape[1] == IDS.shape[1]


def test_a_scheme_that_names_no_weight_is_refused(wide: Path, tmp_path: Path) -> None:
    rule = SCHEME.rules[0].model_copy(update={"of": ("layers.*.nothing",)})
    with pytest.raises(MoecError, match="match no weight"):
        moec.quantize(wide, SCHEME.model_copy(update={"rules": (rule,)}), tmp_path / "q")


def test_what_has_no_whole_groups_is_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="a multiple of 128"):
        moec.quantize(wide, "w4a16", tmp_path / "q")
    assert not (tmp_path / "q").exists()
    with pytest.raises(MoecError, match="moec quantize --scheme w4a16"):
        moec.export(wide, "onnx", "fp8", tmp_path / "art", scheme="w4a16")
