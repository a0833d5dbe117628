"""Builds with a layer of multi-token prediction: checkpoints, commands, plans, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.runtime.drafts import drafted_steps
from moec.spec.errors import MoecError
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.families import CASES, with_layer

pytestmark = pytest.mark.full

BLOCK_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [16, 16],
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "w"
    write_random_checkpoint(with_layer(CASES["deepseek-v3"]), folder, seed=3)
    return folder


def test_it_is_left_out_by_default_and_that_is_said(weights: Path, tmp_path: Path) -> None:
    art = moec.export(weights, out=tmp_path / "art")
    assert art.parts == ("model",) and "--mtp" in " ".join(art.manifest.spec.notes)
    session = moec.open_session(art.path)
    with pytest.raises(MoecError, match="without its layer of multi-token prediction") as refused:
        session.generate([[1, 2]], mtp=True)
    assert refused.value.next_step.endswith("--mtp")


def test_a_checkpoint_without_its_tensors(weights: Path, tmp_path: Path) -> None:
    """Its config.json may say that it has the layer, or nothing."""
    found = load_file(weights / "model.safetensors")
    kept = {key: each for key, each in found.items() if "layers.3." not in key}
    (tmp_path / "w").mkdir()
    save_file(kept, tmp_path / "w" / "model.safetensors")
    config = json.loads((weights / "config.json").read_text())
    for count in (None, 0, 1, 2):
        config["num_nextn_predict_layers"] = count
        said = {key: each for key, each in config.items() if each is not None}
        (tmp_path / "w" / "config.json").write_text(json.dumps(said))
        art = moec.export(tmp_path / "w", out=tmp_path / "art")
        notes = " ".join(art.manifest.spec.notes)
        assert art.manifest.spec.text.mtp == "none" and "--mtp" not in notes
        assert ("2 layers that predict" in notes) == (count == 2)
        with pytest.raises(MoecError, match=r"no tensors of layer 3|without a layer of multi"):
            moec.export(tmp_path / "w", out=tmp_path / "other", mtp=True)
    config["num_nextn_predict_layers"] = -1
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoecError, match="num_nextn_predict_layers"):
        moec.export(tmp_path / "w", out=tmp_path / "art")


def test_a_note_is_made_once_and_goes(weights: Path) -> None:
    aside = moec.load_spec(weights)
    assert sum("--mtp" in note for note in aside.notes) == 1
    assert moec.load_spec(aside) == aside
    built = moec.load_spec(aside, mtp=True)
    assert built.text.mtp == "built" and not any("--mtp" in note for note in built.notes)


def test_wide_layers_with_fp8_caches_are_refused(tmp_path: Path) -> None:
    config = {
        "quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.layers.3*"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    }  # fmt: skip
    spec = with_layer(CASES["deepseek-v3"])
    scheme = read_scheme(config, tmp_path / "config.json", spec)
    write_random_checkpoint(spec.model_copy(update={"scheme": scheme}), tmp_path / "w", seed=7)
    with pytest.raises(MoecError, match="FP8 caches, and a wide layer"):
        moec.export(tmp_path / "w", out=tmp_path / "art", mtp=True)
    assert not (tmp_path / "art").exists()


def test_copies_of_embedding_and_head_are_left_aside(weights: Path, tmp_path: Path) -> None:
    found = load_file(weights / "model.safetensors")
    at = "model.layers.3."
    copies = {
        f"{at}embed_tokens.weight": found["model.embed_tokens.weight"].clone(),
        f"{at}shared_head.head.weight": found["lm_head.weight"].clone(),
    }
    (tmp_path / "w").mkdir()
    save_file(found | copies, tmp_path / "w" / "model.safetensors")
    (tmp_path / "w" / "config.json").write_bytes((weights / "config.json").read_bytes())
    art = moec.export(tmp_path / "w", out=tmp_path / "art", mtp=True)
    assert art.parts == ("model", "mtp") and moec.validate(art.path, seed=1).passed
    del found["model.layers.3.eh_proj.weight"]
    save_file(found, tmp_path / "w" / "model.safetensors")
    with pytest.raises(MoecError, match="eh_proj"):
        moec.export(tmp_path / "w", out=tmp_path / "other", mtp=True)


def test_block_fp8_is_read_in_place(tmp_path: Path) -> None:
    """As DeepSeek publishes it: the layer is quantised too, but for what joins its inputs."""
    spec = with_layer(CASES["deepseek-v3"])
    scheme = read_scheme(BLOCK_FP8, tmp_path / "config.json", spec)
    write_random_checkpoint(spec.model_copy(update={"scheme": scheme}), tmp_path / "w", seed=6)
    keys = load_file(tmp_path / "w" / "model.safetensors").keys()
    assert "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv" in keys
    assert "model.layers.3.eh_proj.weight_scale_inv" not in keys
    for mtp in (False, True):
        art = moec.export(tmp_path / "w", precision="fp8", out=tmp_path / f"art{mtp}", mtp=mtp)
        assert art.manifest.weights.mode == "in-place"
        report = moec.validate(art.path)
        assert report.passed, report.first_divergence


def test_a_quantised_checkpoint_may_have_it(weights: Path, tmp_path: Path) -> None:
    folder = moec.quantize(weights, "dynamic", tmp_path / "fp8", mtp=True).path
    config = json.loads((folder / "config.json").read_text())
    assert any("eh_proj" in each for each in config["quantization_config"]["ignore"])
    art = moec.export(folder, out=tmp_path / "art", mtp=True)
    report = moec.validate(art.path)
    assert report.passed, report.first_divergence
    without = moec.quantize(weights, "dynamic", tmp_path / "without").path
    config = json.loads((without / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_layer(CASES["deepseek-v3"])
    write_random_checkpoint(spec, tmp_path / "w", seed=5)

    def run(*command: str) -> str:
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, (found.output, found.exception)
        return found.output

    unbound, art = str(tmp_path / "unbound"), str(tmp_path / "art")
    read = moec.load_spec(tmp_path / "w", mtp=True)
    (tmp_path / "spec.json").write_text(read.model_dump_json())
    run("build", "--spec", str(tmp_path / "spec.json"), "--out", unbound)
    proven = {check.name for check in moec.validate(unbound).checks}
    assert {"multi-token prediction, in pieces", "drafted greedy tokens"} <= proven
    run("bind", unbound, "--checkpoint", str(tmp_path / "w"), "--out", art)
    run("validate", art)
    given = ("generate", art, "--ids", "1,2,3", "--max-new-tokens", "9")
    plain, drafted = run(*given), list[Any]()

    def steps(*args: Any) -> Iterator[list[int | None]]:
        drafted.append(args)
        yield from drafted_steps(*args)

    monkeypatch.setattr("moec.runtime.session.drafted_steps", steps)
    assert run(*given, "--mtp") == plain and len(drafted) == 1
    talk = CliRunner().invoke(app, ["generate", art, "--chat", "--mtp"], input="")
    assert isinstance(talk.exception, MoecError) and "conversation" in str(talk.exception)


def test_the_plan_has_the_layers_weights_and_cache() -> None:
    plain, whole = (
        moec.plan(moec.load_spec("deepseek-v3", mtp=mtp), context=4096) for mtp in (False, True)
    )
    assert whole.weights_bytes - plain.weights_bytes == 2 * 11_610_068_224
    assert whole.cache_bytes - plain.cache_bytes == 2 * 4096 * 576
    assert whole.decode_read_bytes == plain.decode_read_bytes
    assert whole.prefill_flops == plain.prefill_flops


@pytest.mark.parametrize("asked", [
    {"precision": "fp8", "scheme": "static"}, {"precision": "fp8", "cache": "fp8"},
])  # fmt: skip
def test_static_scales_are_refused(asked: dict[str, str], weights: Path, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="calibration runs the decoder alone"):
        moec.export(weights, out=tmp_path / "art", mtp=True, **asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fields", "message"), [
    ({"mtp": "built", "experts": None, "ffn": "D"}, "needs experts"),
    ({"mtp": "built", "latent": None}, "latent"),
    ({"mtp": "aside", "latent": None}, "latent"),
    ({"mtp": "some"}, "mtp"),
])  # fmt: skip
def test_odd_specs_are_refused(fields: dict[str, Any], message: str) -> None:
    values = CASES["deepseek-v3"].model_dump()
    values["text"] |= fields
    with pytest.raises(ValueError, match=message):
        ModelSpec.model_validate(values)


@pytest.mark.parametrize("source", ["qwen3-30b-a3b", "scout"])
def test_models_without_such_a_layer_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="without a layer of multi-token prediction"):
        moec.export(source, out=tmp_path / "art", mtp=True)
    assert not list(tmp_path.iterdir())


def test_a_manifest_and_a_spec_that_disagree_are_refused(weights: Path, tmp_path: Path) -> None:
    art = moec.export(weights, out=tmp_path / "art", mtp=True).path
    manifest = json.loads((art / "manifest.json").read_text())
    for changed in ({"mtp": None}, {"spec": _aside(manifest["spec"])}):
        (art / "manifest.json").write_text(json.dumps(manifest | changed | {"digest": None}))
        with pytest.raises(MoecError, match="mtp"):
            moec.open_session(art)


def _aside(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"text": spec["text"] | {"mtp": "aside"}}
