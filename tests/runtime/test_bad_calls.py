"""A call that makes no sense gives one clear message: token ids, lengths, settings, engines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.runtime.cache import Cache
from moec.runtime.open import engines
from moec.runtime.session import Session
from tests.damage import SPEC
from tests.refusals import refusal

VOCAB = SPEC.text.vocab

#: what is wrong -> (token ids, what the message must name)
IDS: dict[str, tuple[Any, str]] = {
    "beyond the vocabulary": ([[1, VOCAB]], f"token {VOCAB}"),
    "negative": ([[1, -1]], "token -1"),
    "beyond 64 bits": ([[2**70]], "input_ids"),
    "beyond the vocabulary, in a tensor": (torch.tensor([[VOCAB]]), f"token {VOCAB}"),
    "nothing": ([], "input_ids"),
    "an empty row": ([[]], "input_ids"),
    "an empty row among others": ([[1, 2], []], "input_ids"),
    "an empty tensor": (torch.zeros(1, 0, dtype=torch.int64), "input_ids"),
    "floats": ([[1.0, 2.0]], "input_ids"),
    "one float": ([[1, 2.5]], "input_ids"),
    "a float tensor": (torch.ones(1, 3), "input_ids"),
    "a bool tensor": (torch.ones(1, 3, dtype=torch.bool), "input_ids"),
    "text": ("hello", "input_ids"),
    "rows of text": ([["a", "b"]], "input_ids"),
    "None in a row": ([[1, None]], "input_ids"),
    "a row and a number": ([[1, 2], 3], "input_ids"),
    "one dimension": (torch.tensor([1, 2, 3]), "input_ids"),
    "three dimensions": (torch.ones(1, 2, 3, dtype=torch.int64), "input_ids"),
}


def test_the_help_names_every_engine() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", "--help"]).output
    assert all(engine in shown for engine in engines())


@pytest.fixture(scope="module")
def session(built: Path) -> Session:
    return moec.open_session(built)


@pytest.mark.parametrize("method", ["logits", "generate"])
@pytest.mark.parametrize("case", IDS)
def test_token_ids_that_are_none_are_refused(session: Session, case: str, method: str) -> None:
    ids, names = IDS[case]
    refusal(lambda: getattr(session, method)(ids), names)


@pytest.mark.parametrize("method", ["logits", "generate"])
@pytest.mark.parametrize("lengths", [[0], [4], [-1], [1, 1], [], [1.5], [[1]]], ids=str)
def test_lengths_that_do_not_fit_the_rows_are_refused(
    session: Session, lengths: Any, method: str
) -> None:
    ids = torch.tensor([[1, 2, 3]])
    refusal(lambda: getattr(session, method)(ids, lengths=lengths), "lengths")


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_k": -3},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "top_p": float("nan")},
        {"temperature": 1.0, "seed": 2**70},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": -3},
    ],
    ids=str,
)
def test_sampling_settings_out_of_range_are_refused(
    session: Session, setting: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 2, **setting}
    refusal(lambda: session.generate([[1]], **settings), list(setting)[-1])


def test_a_number_above_its_range_is_refused_with_the_range(session: Session) -> None:
    error = refusal(lambda: session.generate([[1]], temperature=1.0, top_k=10**30), "top_k")
    assert error.expected == "1 to 2^63"


@pytest.mark.parametrize(
    "setting", [{"tokens": 0}, {"tokens": -3}, {"seed": 2**70}, {"seed": -(2**70)}], ids=str
)
def test_a_proof_on_tokens_that_cannot_be_is_refused(built: Path, setting: dict[str, int]) -> None:
    refusal(lambda: moec.validate(built, **setting), next(iter(setting)))


@pytest.mark.parametrize(
    ("options", "names", "code"),
    [
        ({"engine": "abacus"}, "abacus", 2),
        ({"preset": "ludicrous"}, "ludicrous", 2),
        ({"engine": "eager", "preset": "ludicrous"}, "ludicrous", 2),
        ({"device": "cuda"}, "cuda", 3),
        ({"device": "abacus"}, "abacus", 2),
    ],
    ids=str,
)
def test_an_unknown_way_to_run_is_refused(
    built: Path, options: dict[str, str], names: str, code: int
) -> None:
    refusal(lambda: moec.open_session(built, **options), names, code)


@pytest.mark.parametrize("engine", ["onnxruntime", "abacus"])
def test_a_checkpoint_opens_in_the_eager_engine_only(sound: Path, engine: str) -> None:
    refusal(lambda: moec.open_session(sound, engine=engine), engine)


@pytest.mark.parametrize("stop", [3, "x", b"x", ["x"], [1.5], [[1]]], ids=repr)
def test_what_is_no_list_of_tokens_does_not_stop(session: Session, stop: Any) -> None:
    refusal(lambda: session.generate([[1]], max_new_tokens=1, stop=stop), "stop")


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_integers_of_any_library_stop(session: Session, kind: Any) -> None:
    whole = session.generate([[1]], max_new_tokens=8, stop=())[0].tolist()
    end = whole.index(whole[3], 1) + 1
    found = session.generate([[1]], max_new_tokens=8, stop=kind([whole[3]]))[0].tolist()
    assert found[:end] == whole[:end] and len(found) < len(whole)


@pytest.mark.parametrize("images", [3, None], ids=repr)
def test_what_is_no_list_of_images_is_refused(tiny: Path, images: Any) -> None:
    refusal(lambda: moec.encode(tiny, "x", images), "images")


@pytest.fixture(scope="module")
def both(
    session: Session, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Session]:
    out = tmp_path_factory.mktemp("ort") / "art"
    ort = moec.export(sound, target="ort", precision="fp32", out=out)
    return {"onnx": session, "ort": moec.open_session(ort.path)}


#: what is wrong -> (call of a session, a cache of two rows of it and one of the other, the name)
CALLS: dict[str, tuple[Callable[[Session, Cache, Cache], object], str]] = {
    "float tokens": (lambda s, c, _: s.decode([1.5, 2.0], c), "tokens"),
    "bool tokens": (lambda s, c, _: s.decode([True, False], c), "tokens"),
    "text": (lambda s, c, _: s.decode(["a", "b"], c), "tokens"),
    "one token": (lambda s, c, _: s.decode(1, c), "tokens"),
    "no tokens": (lambda s, c, _: s.decode([], c), "tokens"),
    "two dimensions": (lambda s, c, _: s.decode([[1], [2]], c), "tokens"),
    "three rows for two": (lambda s, c, _: s.decode([1, 2, 3], c), "input_ids"),
    "one row for two": (lambda s, c, _: s.decode([1], c), "input_ids"),
    "beyond the vocabulary": (lambda s, c, _: s.decode([1, VOCAB], c), f"token {VOCAB}"),
    "the other's cache": (lambda s, _, other: s.decode([1, 2], other), "cache"),
    "no cache": (lambda s, *_: s.decode([1, 2], None), "cache"),  # type: ignore[arg-type]
    "another type": (lambda s, c, _: s.decode([1, 2], _as(c, torch.float16)), "cache"),
    "float ids": (lambda s, c, _: s.extend(torch.ones(2, 2), _int(2, 2), c), "input_ids"),
    "ids in a row": (lambda s, c, _: s.extend(_int(1, 2), _int(2, 2), c), "input_ids"),
    "a negative length": (lambda s, c, _: s.extend(_two(), _int(-1, 2), c), "lengths"),
    "a length that is too large": (lambda s, c, _: s.extend(_two(), _int(2, 3), c), "lengths"),
    "too few lengths": (lambda s, c, _: s.extend(_two(), _int(2), c), "lengths"),
    "float lengths": (lambda s, c, _: s.extend(_two(), torch.ones(2), c), "lengths"),
    "a negative capacity": (lambda s, *_: s.prefill([[1, 2]], capacity=-3), "capacity"),
    "half a capacity": (lambda s, *_: s.new_cache(1, 2.5), "capacity"),  # type: ignore[arg-type]
    "a negative batch": (lambda s, *_: s.new_cache(-1, 4), "batch"),
}


def _int(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def _two() -> torch.Tensor:
    return torch.tensor([[1, 2], [3, 4]])


def _as(cache: Cache, dtype: torch.dtype) -> Cache:
    return replace(cache, tensors={name: each.to(dtype) for name, each in cache.tensors.items()})


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_does_not_fit_its_cache_is_refused(
    both: dict[str, Session], case: str, target: str
) -> None:
    mine, other = both[target], both["ort" if target == "onnx" else "onnx"]
    (_, cache), (_, foreign) = mine.prefill(_two()), other.prefill(_two())
    before = cache.lengths.tolist()
    call, names = CALLS[case]
    refusal(lambda: call(mine, cache, foreign), names)
    assert cache.lengths.tolist() == before
    assert mine.extend(_two(), _int(2, 0), cache)[1].abs().max() == 0
    assert mine.decode(_int(1, 2), cache).isfinite().all()
