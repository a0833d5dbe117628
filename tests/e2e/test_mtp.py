"""Multi-token prediction: the layer against transformers', and drafts that change no token."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import moec
from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.graph_builder.ops import Op
from moec.runtime.session import Session
from moec.spec import names
from moec.weights.random import write_random_checkpoint
from tests.families import CASES, with_layer

pytestmark = pytest.mark.full

TRAINED = Path(__file__).parents[1] / "trained" / "tiny-deepseek-v3"
EMIT = Builder.emit
SPECS = ("deepseek-v3", "deepseek-v3 straight")
Made = Callable[[str, str], Path]


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
