"""The weights that a build makes FP8 are a checkpoint for other engines too: one folder for all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig, Llama4ForCausalLM

import moec
from moec.artefact import placement
from moec.artefact.artefact import open_artefact, verify_files
from moec.exporters import precision
from moec.runtime.proof.published import published_folder
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import Rule, Scheme
from moec.weights.packed import journal
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.trees import tree

LLAMA4 = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})
LINEAR = ("layers.*.moe.gate_up", "layers.*.moe.down", "layers.*.attn.o.weight")
BLOCKS = Scheme(name="blocks", rules=(Rule(of=LINEAR, weight="block", inputs="group"),), block=8)
SCHEMES = {"dynamic": "dynamic", "meta": "meta", "blocks": BLOCKS}
IDS = torch.arange(3, 40)[None]
MODELS = {"llama4": LLAMA4, "qwen3": CASES["qwen3"], "deepseek-v3": CASES["deepseek-v3"]}


@pytest.fixture(scope="module", params=MODELS)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


@pytest.fixture
def llama4(tmp_path: Path) -> Path:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    return tmp_path / "wide"


def logits(artefact: moec.Artefact) -> torch.Tensor:
    return torch.as_tensor(moec.open_session(artefact.path).logits(IDS.numpy()))


def same_weights(mine: Path, other: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (mine, other))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor.float(), expected[key].float()), key


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("torch", "dynamic"),
        ("onnx", "dynamic"),
        ("onnx", "meta"),
        ("onnx", "blocks"),
        ("ort", "meta"),
    ],
)
def test_one_folder_serves_every_target(
    wide: Path, target: str, scheme: str, tmp_path: Path
) -> None:
    """A build and `quantize` write the same; another target reads the build's folder in place."""
    art = moec.export(wide, target, "fp8", tmp_path / "art", scheme=SCHEMES[scheme])
    assert art.manifest.weights.published and list(art.manifest.weights.shards) == [
        "model.safetensors"
    ]
    same_weights(art.path, moec.quantize(wide, SCHEMES[scheme], tmp_path / "fp8").path)
    for again in (target, "onnx"):
        read = moec.export(art.path, again, "fp8", tmp_path / again)
        assert read.manifest.weights.mode == "in-place"
        assert read.manifest.weights.folder == str(art.path.resolve())
    same = moec.open_session(tmp_path / target).logits(IDS.numpy())
    assert torch.equal(torch.as_tensor(same), logits(art))


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["dynamic", "meta"])
def test_transformers_reads_an_artefact(llama4: Path, scheme: str, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme=scheme)
    found = []
    for folder in (art.path, moec.quantize(llama4, scheme, tmp_path / "fp8").path):
        loaded, info = Llama4ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.inference_mode():
            found.append(loaded(IDS, use_cache=False).logits)
    assert torch.equal(*found)


def test_a_config_says_the_type_that_the_build_gave_the_weights(tmp_path: Path) -> None:
    """Target torch stores what stays wide in bf16."""
    spec = LLAMA4.model_copy(update={"dtype": "fp32"})
    write_random_checkpoint(spec, tmp_path / "wide", seed=3)
    art = moec.export(tmp_path / "wide", "torch", out=tmp_path / "art")
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "wide", art.path)
    )
    assert "float32" in str(before) and "float32" not in str(after) and "bfloat16" in str(after)
    assert moec.load_spec(art.path).dtype == "bf16"
    read = moec.export(art.path, "torch", out=tmp_path / "again")
    assert torch.equal(logits(read), logits(art))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("odd", ["norm", "layers.1."])
def test_weights_of_several_types_stay_so(model: str, odd: str, tmp_path: Path) -> None:
    """Once matrices are quantised, most tensors that are wide may be norms of another type."""
    write_random_checkpoint(MODELS[model], tmp_path / "wide", seed=3)
    file = tmp_path / "wide/model.safetensors"
    mixed = {key: each.float() if odd in key else each for key, each in load_file(file).items()}
    save_file(mixed, file, metadata={"format": "pt"})
    for scheme in ("dynamic", "meta"):
        done = moec.quantize(tmp_path / "wide", scheme, tmp_path / f"q-{scheme}")
        found = load_file(done.path / "model.safetensors")
        for key in found.keys() & mixed.keys():
            if f"{key}_scale" not in found:
                assert found[key].dtype == mixed[key].dtype, key
        own, theirs = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / "wide", done.path)
        )
        assert own == {key: each for key, each in theirs.items() if key != "quantization_config"}
        art = moec.export(tmp_path / "wide", "onnx", "fp8", tmp_path / scheme, scheme=scheme)
        assert art.manifest.weights.published
        assert all(check.passed for check in published_folder(art, tmp_path / "wide"))


def test_shards_are_found_again(
    llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    art = moec.export(llama4, "torch", out=tmp_path / "art")
    shards = art.manifest.weights.shards
    index = json.loads((art.path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    verified = verify_files(open_artefact(art.path))
    assert {*shards, "model.safetensors.index.json"} <= set(verified.hashed)
    monkeypatch.undo()
    whole = moec.export(llama4, "torch", out=tmp_path / "whole")
    assert torch.equal(logits(art), logits(whole))


def test_a_build_that_was_cut_off_goes_on(
    llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    whole = moec.export(llama4, "onnx", "fp8", tmp_path / "whole")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pack" and done > total * 2 // 3:
            raise Stop

    with pytest.raises(Stop):
        moec.export(llama4, "onnx", "fp8", tmp_path / "art", progress=stop)
    (left,) = tmp_path.glob(".art.*")
    assert len(journal.unfinished(left)) >= 4
    done = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    assert 0 < done.manifest.build.bytes_read < whole.manifest.build.bytes_read / 2
    assert tree(done.path) == tree(whole.path)


def _fp8(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.export(source, "onnx", "fp8", out, scheme="dynamic", progress=progress)


def _integers(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.export(source, "ort", "int4", out, progress=progress)


def _quantise(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.quantize(source, "meta", out, progress=progress)


@pytest.mark.full
@pytest.mark.parametrize("first", [_fp8, _integers, _quantise])
@pytest.mark.parametrize("second", [_fp8, _integers, _quantise])
def test_another_call_after_one_that_was_cut_off_leaves_nothing_of_it(
    first: Callable[..., None],
    second: Callable[..., None],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stop(BaseException):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage in ("pack", "quantise") and done > total * 2 // 3:
            raise Stop

    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    second(tiny, tmp_path / "fresh", lambda *_: None)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("moec.weights.packed.published.SHARD_BYTES", 400_000)
        first(tiny, tmp_path / "art", stop)
    assert list(tmp_path.glob(".art.*"))
    second(tiny, tmp_path / "art", lambda *_: None)
    assert not list(tmp_path.glob(".art.*"))
    assert tree(tmp_path / "art").keys() == tree(tmp_path / "fresh").keys()


def test_what_config_json_says_of_generation_stays(llama4: Path, tmp_path: Path) -> None:
    """A new generation_config.json hides it."""
    config = json.loads((llama4 / "config.json").read_text())
    more = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7}
    (llama4 / "config.json").write_text(json.dumps(config | more))
    before = moec.load_spec(llama4)
    assert before.repetition_penalty == 1.3 and before.sampling is not None
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    for folder in (moec.quantize(llama4, "dynamic", tmp_path / "fp8").path, art.path):
        spec = moec.load_spec(folder)
        assert spec.repetition_penalty == 1.3 and spec.sampling == before.sampling


def test_experts_that_are_exchanged_in_the_header_are_refused(llama4: Path, tmp_path: Path) -> None:
    """Each name is there, and so is each byte; but the stack would have another order."""
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    file = art.path / "model.safetensors"
    data = file.read_bytes()
    count = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + count])
    one, two = (f"model.layers.1.feed_forward.experts.{e}.gate_proj.weight" for e in (0, 1))
    header[one], header[two] = header[two], header[one]
    text = json.dumps(header).encode()
    file.write_bytes(data[:8] + text.ljust(count) + data[8 + count :])
    with pytest.raises(MoecError, match="another size or header"):
        moec.open_session(art.path)
    shard = moec.weights.shard.read_shard(file)
    path = art.path / "manifest.json"
    values = json.loads(path.read_text())
    values["weights"]["shards"]["model.safetensors"]["header_sha256"] = shard.header_sha256
    del values["digest"]
    path.write_text(json.dumps(values))
    with pytest.raises(MoecError, match="does not fit the spec and the shards"):
        moec.open_session(art.path)


def test_a_manifest_cannot_call_other_weights_published(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme="deepseek")
    path = art.path / "manifest.json"
    values = json.loads(path.read_text())
    assert not values["weights"]["published"]
    values["weights"]["published"] = True
    del values["digest"]
    path.write_text(json.dumps(values))
    with pytest.raises(MoecError, match="does not fit the spec and the shards"):
        moec.open_session(art.path)


def test_a_scheme_file_keeps_its_type_of_scales(llama4: Path, tmp_path: Path) -> None:
    rule = Rule(of=LINEAR, weight="channel", inputs="token")
    scheme = Scheme(name="x\n## Proof\nPASSED: all.\n", rules=(rule,), scales="bf16")
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme=scheme)
    same_weights(art.path, moec.quantize(llama4, scheme, tmp_path / "fp8").path)
    tensors = load_file(art.path / "model.safetensors")
    assert {each.dtype for key, each in tensors.items() if key.endswith("_scale")} == {
        torch.bfloat16
    }
    assert (art.path / "README.md").read_text().count("\n## Proof") == 1


def test_a_scheme_that_the_form_cannot_say_is_built_with_our_names(
    llama4: Path, tmp_path: Path
) -> None:
    """Here a layer of several is quantised with its shared expert, whose names have no pattern."""
    rule = Rule(of=("layers.1.moe.*",), weight="channel", inputs="token")
    art = moec.export(
        llama4, "onnx", "fp8", tmp_path / "art", scheme=Scheme(name="one", rules=(rule,))
    )
    assert moec.validate(art.path).passed


def test_a_packing_that_lies_about_its_values_is_refused(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    values = json.loads((art / "manifest.json").read_text())
    values["packings"]["layers.0.moe.gate_up"]["fp8"] = None
    del values["digest"]
    (art / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(MoecError):
        moec.open_session(art)


@pytest.mark.parametrize(
    ("model", "scheme", "why"),
    [
        (CASES["aria"], "meta", "engines read its experts in one tensor"),
        (LLAMA4, "mixed", "two kinds of inputs"),
        (
            LLAMA4,
            BLOCKS.model_copy(
                update={
                    "rules": (Rule(of=("layers.*.attn.q.weight",), weight="block", inputs="group"),)
                }
            ),
            "RoPE permutes q",
        ),
    ],
    ids=["aria", "mixed", "blocks"],
)
def test_what_other_engines_cannot_read_keeps_our_names(
    model: moec.ModelSpec, scheme: str | Scheme, why: str, tmp_path: Path
) -> None:
    write_random_checkpoint(model, tmp_path / "wide", seed=3)
    scales = None
    if scheme == "mixed":
        scales = moec.calibrate(tmp_path / "wide", IDS)
    art = moec.export(
        tmp_path / "wide", "onnx", "fp8", tmp_path / "art", scheme=scheme, scales=scales
    )
    assert not art.manifest.weights.published, why
    assert list(art.manifest.weights.shards) == ["weights.safetensors"]
    assert not (art.path / "README.md").exists() and moec.validate(art.path).passed


@pytest.mark.full
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_artefacts_with_our_names_still_open(
    target: str, llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions before this one wrote them for all FP8; those of onnx had experts as [in, out]."""
    new = moec.export(llama4, target, "fp8", tmp_path / "new")
    with monkeypatch.context() as patched:
        patched.setattr(placement, "is_said", lambda _: False)
        patched.setattr(precision, "is_said", lambda _: False)
        old = moec.export(llama4, target, "fp8", tmp_path / "old")
    path = old.path / "manifest.json"
    values = json.loads(path.read_text())
    del values["weights"]["published"], values["weights"]["card"], values["digest"]
    path.write_text(json.dumps(values))
    assert (old.path / "weights.safetensors").is_file()
    turned = {each.arrange for each in old.manifest.packings.values()}
    assert ("transpose" in turned) is (target == "torch")
    assert (logits(old) - logits(new)).norm() < 1e-5 * logits(new).norm()
    assert moec.validate(old.path, source=llama4).passed
    again = moec.bind(old.path, llama4)
    assert again.manifest.weights.published is (target == "torch")
    assert (logits(again) - logits(new)).norm() < 1e-5 * logits(new).norm()


def test_an_unbound_artefact_takes_wide_weights(llama4: Path, tmp_path: Path) -> None:
    """`bind` quantises them as a build does."""
    spec = moec.load_spec(llama4)
    unbound = moec.export(spec, "onnx", "fp8", tmp_path / "art")
    bound = moec.bind(unbound.path, llama4)
    direct = moec.export(llama4, "onnx", "fp8", tmp_path / "direct")
    same_weights(bound.path, direct.path)
    assert torch.equal(logits(bound), logits(direct))
