"""Multi-token prediction: the layer against transformers', and drafts that change no token."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.graph_builder.ops import Op
from moec.runtime.drafts import drafted_steps
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.errors import MoecError
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.families import CASES

pytestmark = pytest.mark.full

BLOCK_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [16, 16],
}  # fmt: skip
TRAINED = Path(__file__).parents[1] / "trained" / "tiny-deepseek-v3"
EMIT = Builder.emit
SPECS = ("deepseek-v3", "deepseek-v3 straight")
Made = Callable[[str, str], Path]


def with_layer(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"text": spec.text.model_copy(update={"mtp": "built"})})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The checkpoint of a case, if "weights" is asked for, or its artefact of a target."""
    root = tmp_path_factory.mktemp("made")

    @cache
    def path(name: str, what: str) -> Path:
        if what == "weights":
            write_random_checkpoint(with_layer(CASES[name]), root / name / what, seed=3)
            return root / name / what
        return moec.export(path(name, "weights"), what, "fp32", root / name / what, mtp=True).path

    return path


@pytest.fixture(scope="module")
def weights(made: Made) -> Path:
    return made("deepseek-v3", "weights")


@pytest.fixture(scope="module")
def session(made: Made) -> Session:
    return moec.open_session(made("deepseek-v3", "onnx"))


@cache
def oracle(weights: Path) -> tuple[Any, Any]:
    model = DeepseekV3ForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers  # transformers knows the released depths alone
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}.*"]
    return model, MtpModel.from_pretrained(model).eval()


def expected_of(weights: Path, row: Tensor) -> Tensor:
    """The layer's logits [S - 1, vocab] of a sequence [S], after each token but the last."""
    model, layer = oracle(weights)
    with torch.inference_mode():
        hidden = model.model(row[None]).last_hidden_state
        out = layer.forward_layer(
            0,
            hidden[:, :-1],
            torch.arange(1, len(row))[None],
            MtpCache(config=model.config.get_mtp_config()),
            input_ids=row[None, 1:],
        )
        return model.lm_head(out)[0]


def found_of(session: Session, ids: Tensor, lengths: Tensor, cuts: list[int]) -> Tensor:
    """The layer's logits [B, S - 1, vocab] in calls that end at columns `cuts`."""
    assert session.mtp is not None
    layer, hidden = session.mtp(), []
    cache = session.new_cache(len(ids), ids.shape[1])
    for _, _, out in session.walk(ids, lengths, cache):
        hidden.append(out[names.HIDDEN])
    before, own, found = torch.cat(hidden, 1), layer.new_cache(len(ids), ids.shape[1]), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1] - 1], strict=True):
        count = (lengths - 1 - start).clamp(0, stop - start)
        following = ids[:, 1 + start : 1 + stop]
        for _, _, out in layer.walk(following, count, own, hidden=before[:, start:stop]):
            found.append(out[names.LOGITS])
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("target", ["onnx", "ort", "torch", "eager"])
def test_the_layer_is_that_of_transformers(target: str, name: str, made: Made) -> None:
    engine = "eager" if target == "eager" else None
    session = moec.open_session(made(name, "onnx" if engine else target), engine=engine)
    lengths = torch.tensor([29, 2, 13])
    ids = torch.randint(0, session.spec.text.vocab, (3, 29))
    for cuts in ([], [7, 8, 9, 20]):
        found = found_of(session, ids, lengths, cuts)
        for row, length, mine in zip(ids, lengths, found, strict=True):
            wanted = expected_of(made(name, "weights"), row[:length])
            assert (mine[: length - 1] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("target", ["onnx", "ort", "torch"])
def test_a_greedy_generation_is_that_of_transformers(target: str, made: Made) -> None:
    session = moec.open_session(made("deepseek-v3", target))
    ids = torch.randint(0, session.spec.text.vocab, (1, 12))
    model, _ = oracle(made("deepseek-v3", "weights"))
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    for mtp in (False, True):
        assert session.generate(ids, max_new_tokens=24, stop=[], mtp=mtp).equal(wanted)


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}, {"max_new_tokens": 1},
    {"max_new_tokens": 2}, {"stop": [7, 8, 9, *range(20, 60)]},
])  # fmt: skip
def test_drafts_change_no_token(settings: dict[str, Any], session: Session) -> None:
    ids, lengths = torch.randint(0, session.spec.text.vocab, (3, 20)), [20, 1, 7]
    settings = {"max_new_tokens": 20, "lengths": lengths, **settings}
    plain = session.generate(ids, **settings)
    assert session.generate(ids, mtp=True, **settings).equal(plain)


def with_drafts(session: Session, rows: list[list[int]], right: list[bool]) -> Session:
    """`session`, whose drafts continue to `rows`, prompts included, as they are or one off."""
    assert session.mtp is not None
    layer = session.mtp()

    def drafts(feeds: Any) -> dict[str, Tensor]:
        out = layer.run(feeds)
        logits = out[names.LOGITS].zero_()
        for row, (tokens, good) in enumerate(zip(rows, right, strict=True)):
            at = int(feeds[names.PAST_LENGTHS][row] + feeds[names.LENGTHS][row]) + 1
            token = tokens[at] if at < len(tokens) else 0
            logits[row, :, token if good else (token + 1) % logits.shape[-1]] = 1
        return out

    return replace(session, mtp=lambda: replace(layer, run=drafts))


@pytest.mark.parametrize("right", [[True, True], [True, False], [False, False]])
def test_right_and_wrong_drafts_count(right: list[bool], session: Session) -> None:
    """A right draft saves a call of the decoder, for the sequence that it is right for."""
    calls, ran, lengths = list[int](), list[int](), [9, 5]
    ids = torch.randint(0, session.spec.text.vocab, (2, 9))
    wanted = session.generate(ids, lengths=lengths, max_new_tokens=10, stop=[])

    def decoder(feeds: Any) -> dict[str, Tensor]:
        calls.append(feeds[names.INPUT_IDS].shape[1])
        ran.append(int(feeds[names.LENGTHS][0]))
        return session.run(feeds)

    spied = with_drafts(replace(session, run=decoder), wanted.tolist(), right)
    found = spied.generate(ids, lengths=lengths, max_new_tokens=10, stop=[], mtp=True)
    assert found.equal(wanted)
    steps = 5 if all(right) else 9
    assert calls == [9, *[2] * (steps - 1), 1]
    assert sum(ran[1:]) == (9 if right[0] else 17)  # of the first sequence


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3},
    {"temperature": 0.5, "seed": 6, "repetition_penalty": 1.3},
])  # fmt: skip
@pytest.mark.parametrize("right", [[True] * 3, [True, False, True]])
def test_right_drafts_change_no_token(
    right: list[bool], settings: dict[str, Any], session: Session
) -> None:
    ids, lengths = torch.randint(0, session.spec.text.vocab, (3, 20)), [20, 1, 7]
    settings = {"max_new_tokens": 11, "lengths": lengths, "stop": [*range(0, 250, 16)], **settings}
    wanted = session.generate(ids, **settings)
    spied = with_drafts(session, wanted.tolist(), right)
    assert spied.generate(ids, mtp=True, **settings).equal(wanted)


def test_the_layer_gets_the_hidden_value_before_each_token(session: Session) -> None:
    """Its drafts are what it says of the final sequence, in one call."""
    assert session.mtp is not None
    layer, seen = session.mtp(), list[tuple[int, int, Tensor]]()
    lengths, ids = [20, 7], torch.randint(0, session.spec.text.vocab, (2, 20))

    def recorded(feeds: Any) -> dict[str, Tensor]:
        out = layer.run(feeds)
        ends = (feeds[names.PAST_LENGTHS] + feeds[names.LENGTHS]).tolist()
        for row, (end, logits) in enumerate(zip(ends, out[names.LOGITS], strict=True)):
            if feeds[names.LENGTHS][row]:
                seen.append((row, end, logits[0].clone()))
        return out

    plain = session.generate(ids, lengths=lengths, max_new_tokens=12, stop=[])
    played = with_drafts(session, plain.tolist(), [True, False]).mtp
    assert played is not None
    drafting = played().run
    watched = replace(layer, run=lambda feeds: {**recorded(feeds), **drafting(feeds)})
    spied = replace(session, mtp=lambda: watched)
    assert spied.generate(ids, lengths=lengths, max_new_tokens=12, stop=[], mtp=True).equal(plain)
    assert {row for row, _, _ in seen} == {0, 1} and len(seen) > 12
    for row, length in enumerate(lengths):
        whole = plain[row : row + 1, : length + 12]
        expected = found_of(session, whole, torch.tensor([whole.shape[1]]), [])[0]
        for mine, end, logits in seen:
            if mine == row:
                off = (expected[end - 1] - logits).abs().max()
                assert off < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("target", "precision"), [
    ("ort", "fp32"), ("torch", "bf16"), ("onnx", "fp8"),
])  # fmt: skip
def test_a_proof_passes(target: str, precision: str, tmp_path: Path) -> None:
    spec = with_layer(CASES["deepseek-v3"])
    write_random_checkpoint(spec, tmp_path / "w", seed=4)
    art = moec.export(tmp_path / "w", target, precision, tmp_path / "art", mtp=True)
    report = moec.validate(art.path)
    assert report.passed, report.first_divergence
    kinds = [check.name for check in report.checks]
    assert "drafted greedy tokens" in kinds and "multi-token prediction, in pieces" in kinds
    assert any(name.startswith("layers.3") for name in kinds)


@pytest.mark.parametrize(("target", "precision"), [
    ("onnx", "fp32"), ("ort", "int8"), ("ort", "int4"), ("torch", "fp8"),
])  # fmt: skip
def test_a_trained_layer_drafts_well(
    target: str, precision: str, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    """Chance would be right once in 4096 tokens; the README of the model says 56 %."""
    art = moec.export(TRAINED, target, precision, tmp_path / "art", mtp=True)
    report = moec.validate(art.path)
    assert report.passed, report.first_divergence
    session, calls = moec.open_session(art.path), list[int]()

    def counted(feeds: Any) -> dict[str, Tensor]:
        calls.append(1)
        return session.run(feeds)

    ids = golden["eval_ids"][:4, :256]
    replace(session, run=counted).generate(ids, max_new_tokens=32, stop=[], mtp=True)
    assert len(calls) < 0.8 * 32


def _the_other_way_round(b: Builder, op: Op, *args: Any, **more: Any) -> fx.Node:
    if op is ops.join_parts and str(more["name"]).endswith("mtp.join.both"):
        args = (args[1], args[0], *args[2:])
    return EMIT(b, op, *args, **more)


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_proof_finds_a_wrong_layer(
    target: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "emit", _the_other_way_round)
        art = moec.export(weights, target, "fp32", tmp_path / "art", mtp=True)
    report = moec.validate(art.path)
    wrong = [check.name for check in report.checks if not check.passed]
    assert "layers.3: mtp.join.both" in wrong


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
