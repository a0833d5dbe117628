"""A checkpoint that moec quantised holds what its config says, for moec and for transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Llama4ForCausalLM

import moec
from moec.spec.errors import MoecError
from moec.spec.files import diff
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import Rule, Scheme
from moec.weights.name_map import read_model
from moec.weights.packed import journal
from moec.weights.random import write_random_checkpoint
from tests.conftest import run_command
from tests.families import CASES
from tests.refusals import refused_and_nothing_left
from tests.trees import tree

LINEAR = ("layers.*.moe.gate_up", "layers.*.moe.down", "layers.*.attn.o.weight")
BLOCKS = Scheme(
    name="small-blocks", rules=(Rule(of=LINEAR, weight="block", inputs="group"),), block=8
)
SCHEMES = {"dynamic": "dynamic", "meta": "meta", "blocks": BLOCKS}
SCOUT = reduced(PRESETS["tiny-scout"], 4)
LLAMA4 = SCOUT.model_copy(update={"vision": None})
MODELS = {
    "llama4": LLAMA4,
    "llama4 with images": SCOUT,
    **{name: CASES[name] for name in ("olmoe", "qwen3", "mixtral", "deepseek-v3")},
}


@pytest.fixture(scope="module", params=MODELS)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


def quantise(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """What the scheme makes of a matrix [out, in], by the definition: values, and their scales."""
    wide = weight.float()
    if scheme != "blocks":
        scale = wide.abs().amax(1, keepdim=True) / 448
        return (wide / scale).to(torch.float8_e4m3fn), scale
    side = 8
    rows, columns = (-(-n // side) for n in wide.shape)
    padded = torch.zeros(rows * side, columns * side)
    padded[: wide.shape[0], : wide.shape[1]] = wide
    scale = padded.view(rows, side, columns, side).abs().amax((1, 3)) / 448
    return (wide / spread(scale, wide)).to(torch.float8_e4m3fn), scale


def spread(scale: Tensor, weight: Tensor, side: int = 8) -> Tensor:
    """The scale of each value of a matrix."""
    if scale.shape[1] == 1 and scale.shape[0] == weight.shape[0]:
        return scale
    rows, columns = weight.shape
    return scale.repeat_interleave(side, 0)[:rows].repeat_interleave(side, 1)[:, :columns]


def in_matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with all experts apart, [out, in]."""
    found = dict(weights)
    for key in [each for each in found if each.endswith(("experts.gate_up_proj", "down_proj"))]:
        if found[key].dim() == 3:
            stem, _, last = key.rpartition(".")
            parts = last.removesuffix("_proj").split("_")
            for expert, own in enumerate(found.pop(key)):
                for part, matrix in zip(parts, own.t().chunk(len(parts)), strict=True):
                    found[f"{stem}.{expert}.{part}_proj.weight"] = matrix.contiguous()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_are_what_the_definition_gives(wide: Path, scheme: str, tmp_path: Path) -> None:
    moec.quantize(wide, SCHEMES[scheme], tmp_path / "fp8")
    expected = in_matrices(load_file(wide / "model.safetensors"))
    found = load_file(tmp_path / "fp8/model.safetensors")
    scales = {key for key in found if key.endswith("_scale")}
    assert found.keys() - scales == expected.keys() and len(scales) > 8
    for key, weight in expected.items():
        if f"{key}_scale" not in scales:
            assert torch.equal(found[key], weight), key
            continue
        values, scale = quantise(weight, scheme)
        assert torch.equal(found[f"{key}_scale"], scale), key
        assert torch.equal(found[key].float(), values.float()), key
    assert any("experts" in key for key in scales)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moec_reads_the_scheme_back(wide: Path, scheme: str, tmp_path: Path) -> None:
    done = moec.quantize(wide, SCHEMES[scheme], tmp_path / "fp8")
    spec = moec.load_spec(done.path)
    assert spec.scheme is not None and spec.scheme.layout == "compressed-tensors"
    (rule,) = spec.scheme.rules
    expected = ("block", "group") if scheme == "blocks" else ("channel", "token")
    assert (rule.weight, rule.inputs) == expected
    assert not any(rule.matches(each) for each in ("head.weight", "layers.0.moe.router.weight"))


def test_the_list_of_wide_modules_need_not_name_routers(wide: Path, tmp_path: Path) -> None:
    """In transformers 5 routers are no linear layers, and llm-compressor lists these alone."""
    folder = moec.quantize(wide, "dynamic", tmp_path / "fp8").path
    config = json.loads((folder / "config.json").read_text())
    named = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [
        each for each in named if "router" not in each and "[.]gate$" not in each
    ]
    assert len(config["quantization_config"]["ignore"]) == len(named) - 1
    before = read_model(folder)[0]
    (folder / "config.json").write_text(json.dumps(config))
    assert diff(read_model(folder)[0], before) == []


def dequantised(folder: Path, out: Path) -> Path:
    """The checkpoint that a quantised one means, in float32, with experts apart."""
    weights = load_file(folder / "model.safetensors")
    plain = {
        key: weight.float() * spread(weights[f"{key}_scale"], weight)
        if f"{key}_scale" in weights
        else weight.float()
        for key, weight in weights.items()
        if not key.endswith("_scale")
    }
    out.mkdir()
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "scheme"),
    [("llama4", scheme) for scheme in SCHEMES] + [("qwen3", "dynamic"), ("deepseek-v3", "dynamic")],
)
def test_transformers_reads_the_same_weights(model: str, scheme: str, tmp_path: Path) -> None:
    """Every key is consumed, none is missing, and the logits are the dequantised ones."""
    spec = MODELS[model]
    write_random_checkpoint(spec, tmp_path / "wide", seed=3)
    folder = moec.quantize(tmp_path / "wide", SCHEMES[scheme], tmp_path / "fp8").path
    kind = Llama4ForCausalLM if spec.architecture == "llama4" else AutoModelForCausalLM
    loaded, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.randint(0, spec.text.vocab, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = loaded.eval()(ids, use_cache=False).logits
    plain = dequantised(folder, tmp_path / "plain")
    session = moec.open_session(moec.export(plain, precision="fp32", out=tmp_path / "art").path)
    expected = torch.from_numpy(session.logits(ids.numpy()))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model", ["llama4", "qwen3"])
def test_target_torch_joins_them_and_computes_the_same(model: str, tmp_path: Path) -> None:
    """Bit for bit: from the quantised checkpoint in place, and from the wide one that it packs."""
    write_random_checkpoint(MODELS[model], tmp_path / "wide", seed=3)
    fp8 = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "fp8").path
    ids = torch.arange(3, 40)[None]
    found = []
    for source, mode in ((fp8, "in-place"), (tmp_path / "wide", "pack")):
        art = moec.export(source, "torch", "fp8", tmp_path / mode)
        assert art.manifest.weights.mode == mode
        found.append(moec.open_session(art.path).logits(ids))
    assert torch.equal(*found)


def test_shards_hold_whole_layers_and_an_index_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    whole = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "whole")
    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    done = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "shards")
    assert len(done.files) > 2 and len(whole.files) == 1
    index = json.loads((done.path / "model.safetensors.index.json").read_text())["weight_map"]
    layers: dict[str, set[str]] = {}
    for key, file in index.items():
        if ".layers." in key:
            layers.setdefault(key.split(".layers.")[1].partition(".")[0], set()).add(file)
    assert all(len(files) == 1 for files in layers.values())
    found = {k: v for file in done.files for k, v in load_file(done.path / file).items()}
    expected = load_file(whole.path / "model.safetensors")
    assert found.keys() == expected.keys() == index.keys()
    assert all(torch.equal(found[key].float(), expected[key].float()) for key in found)


class Stop(BaseException):
    """What cuts the work off."""


def test_what_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    whole = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "whole")
    seen = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen = done
        if done > total * 2 // 3:
            raise Stop

    with pytest.raises(Stop):
        moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "fp8", progress=stop)
    assert not (tmp_path / "fp8").exists()
    (left,) = tmp_path.glob(".fp8.*")
    assert len(journal.unfinished(left)) >= 4  # two files, and their journals
    done = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "fp8")
    assert 0 < done.read < whole.read / 2 and seen
    assert not list(tmp_path.glob(".fp8.*"))
    assert tree(done.path) == tree(whole.path)


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    out = tmp_path / "fp8"
    for scheme, message in (
        ("static", "inputs by tensor"),
        ("mixed", "one kind"),
        ("modelopt", "FP8 caches"),
        ("deepseek", "a multiple of 128"),
        ("none", "neither the name"),
    ):
        with pytest.raises(MoecError, match=message):
            moec.quantize(tmp_path / "wide", scheme, out)
    write_random_checkpoint(CASES["aria"], tmp_path / "aria", seed=3)
    with pytest.raises(MoecError, match="in one tensor alone"):
        moec.quantize(tmp_path / "aria", "dynamic", out)
    moec.quantize(tmp_path / "wide", "dynamic", out)
    with pytest.raises(MoecError, match="FP8 already"):
        moec.quantize(out, "dynamic", tmp_path / "again")
    before = tree(out)
    with pytest.raises(MoecError, match="holds something"):
        moec.quantize(tmp_path / "wide", "dynamic", out)
    assert tree(out) == before and not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort", "torch"])
def test_what_a_build_makes_of_it_is_proven(target: str, tmp_path: Path) -> None:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    code, out, _ = run_command("quantize", tmp_path / "wide", "--out", tmp_path / "fp8")
    assert code == 0 and "model.safetensors" in out
    built = ("build", "--checkpoint", tmp_path / "fp8", "--target", target, "--out", tmp_path / "a")
    code, out, err = run_command(*built)
    assert code == 0 and "PASSED" in out, err


def test_a_folder_that_no_build_would_read_is_not_written(tmp_path: Path) -> None:
    write_random_checkpoint(CASES["olmoe"], tmp_path / "wide", 0)
    for out in (tmp_path / "\udcff", tmp_path / "\udcff" / "deep"):
        refused_and_nothing_left(
            tmp_path, lambda out=out: moec.quantize(tmp_path / "wide", out=out), "not UTF-8"
        )


def test_what_lies_beside_the_weights_is_copied(tiny: Path, tmp_path: Path) -> None:
    moec.quantize(tiny, "meta", tmp_path / "fp8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fp8" / name).read_bytes() == (tiny / name).read_bytes()
    assert "compressed-tensors" in (tmp_path / "fp8/README.md").read_text()
    said = json.loads((tmp_path / "fp8/generation_config.json").read_text())
    before = json.loads((tiny / "generation_config.json").read_text())
    assert said == before | {"attn_temperature_tuning": True}  # vLLM looks for it here
    own, quantised = (json.loads((f / "config.json").read_text()) for f in (tiny, tmp_path / "fp8"))
    assert own == {k: v for k, v in quantised.items() if k != "quantization_config"}
