"""A session that two ranks share does what a session of one process does."""

import gc
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.proof.compare import FP8_NOISE
from moec.runtime.session import Session
from moec.spec.errors import MoecError
from tests.refusals import refusal
from tests.talks import PHOTO, with_template

pytestmark = pytest.mark.full

ROWS = [[7, 8, 9, 10] * 35, [5, 6], [11] * 9]


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared-session")
    checkpoint = with_template(tiny, folder / "checkpoint")
    return moec.export(checkpoint, target="torch", out=folder / "art").path


@pytest.fixture(scope="module")
def one(art: Path) -> Session:
    return moec.open_session(art)


def opened(art: Path) -> Iterator[Any]:
    session: Any = moec.open_session(art, gpus=2)
    yield session
    session.close()
    assert not session.ranks.alive


@pytest.fixture(scope="module")
def session(art: Path) -> Iterator[Any]:
    yield from opened(art)


@pytest.fixture(scope="module")
def other(art: Path) -> Iterator[Any]:
    """A second session at the same time."""
    yield from opened(art)


def near(found: Any, expected: Any) -> bool:
    """As near as FP8 itself is: each rank quantises its part of a token by itself."""
    found, expected = np.asarray(found), np.asarray(expected)
    error = np.linalg.norm(found - expected)
    return bool(error < FP8_NOISE.error * np.linalg.norm(expected))


def assert_tied(one: Session, prompt: list[int], found: Any, expected: Any) -> None:
    """New tokens are the same, or two were about as likely where they part."""
    differ = (np.asarray(found) != np.asarray(expected)).nonzero()[0]
    for at in differ[:1]:
        logits = one.logits([[*prompt, *np.asarray(expected)[:at].tolist()]])[0, -1]
        assert logits[expected[at]] - logits[found[at]] < 0.1 * abs(logits).max()


def test_a_stream_that_is_no_function_leaves_the_session_as_it_was(session: Any) -> None:
    refusal(lambda: session.generate([[5, 6]], max_new_tokens=2, stream=3), "stream")
    refusal(lambda: session.conversation().say("a", max_new_tokens=2, stream=3), "stream")
    assert len(session.generate([[5, 6]], max_new_tokens=2, stop=())[0]) == 4


def test_it_shows_what_a_session_of_one_process_shows(session: Any, one: Session) -> None:
    for name in ("spec", "precision", "engine", "limits", "device"):
        assert getattr(session, name) == getattr(one, name)
    assert session.artefact.path == one.artefact.path  # type: ignore[union-attr]


def test_rows_of_different_length(session: Any, one: Session) -> None:
    found, expected = (s.generate(ROWS, max_new_tokens=12, stop=()) for s in (session, one))
    assert isinstance(found, np.ndarray) and found.shape == expected.shape
    for row, mine, other in zip(ROWS, found, expected, strict=True):
        assert mine[: len(row)].tolist() == row
        assert_tied(one, row, *(each[len(row) : len(row) + 12] for each in (mine, other)))


def test_tokens_come_one_step_after_another(session: Any) -> None:
    steps: list[list[int | None]] = []
    found = session.generate(ROWS[1:], max_new_tokens=5, stop=(), stream=steps.append)
    assert len(steps) == 5
    assert [step[0] for step in steps] == found[0, 2:7].tolist()
    assert [step[1] for step in steps] == found[1, 9:14].tolist()


def test_a_seed_gives_the_same_tokens_again(session: Any) -> None:
    def draw(seed: int) -> list[list[int]]:
        found: list[list[int]] = session.generate(
            ROWS, max_new_tokens=8, temperature=2.0, seed=seed, stop=()
        ).tolist()
        return found

    assert draw(3) == draw(3) != draw(4)


def test_ranks_get_a_seed_from_whoever_gives_none(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[object] = []
    call = session.ranks.call
    monkeypatch.setattr(
        session.ranks, "call", lambda *a, **k: seeds.append(k.get("seed")) or call(*a, **k)
    )
    for seed in (None, None, 3):
        session.generate([[5, 6]], max_new_tokens=2, temperature=2.0, seed=seed)
    assert seeds[2] == 3 and seeds[0] != seeds[1] and None not in seeds


def test_logits(session: Any, one: Session) -> None:
    ids = torch.tensor([ROWS[0]])
    found = session.logits(ids)
    assert isinstance(found, Tensor) and found.shape == (1, 140, 4096)
    assert near(found, one.logits(ids))
    lengths = torch.tensor([140])
    assert torch.equal(session.trace(ids, lengths, [])["logits"], found[0])


def test_prefill_and_decode(session: Any, one: Session) -> None:
    (last, cache), (expected, own) = (s.prefill(ROWS, capacity=150) for s in (session, one))
    assert last.shape == (3, 4096) and near(last, expected)
    assert (cache.lengths.tolist(), cache.capacity) == ([140, 2, 9], 150)
    for step in range(11):  # beyond the capacity
        tokens = torch.tensor([20 + step, 30, 40])
        assert near(session.decode(tokens, cache), one.decode(tokens, own))
    assert cache.lengths.tolist() == own.lengths.tolist() == [151, 13, 20]
    assert cache.capacity == own.capacity > 150


def test_extending_an_empty_cache_is_prefill(session: Any) -> None:
    ids, lengths = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])
    expected, _ = session.prefill(ids, lengths=lengths, capacity=8)
    cache = session.new_cache(2, 8)
    assert torch.equal(session.extend(ids, lengths, cache), expected)
    assert cache.lengths.tolist() == [3, 2]


def test_images(art: Path, session: Any, one: Session) -> None:
    prompt = moec.encode(art, "def main():", [PHOTO])
    features = session.image_features(prompt.pixel_values)
    assert near(features.float(), one.image_features(prompt.pixel_values).float())
    row = [prompt.input_ids]
    found, expected = (s.logits(row, prompt.pixel_values) for s in (session, one))
    assert near(found, expected)
    assert not near(session.logits(row), expected), "the image says something"
    tokens = session.generate(row, prompt.pixel_values, max_new_tokens=3, stop=())
    assert tokens.shape == (1, len(prompt.input_ids) + 3)


def test_a_conversation_stays_in_the_ranks(session: Any, one: Session) -> None:
    talks = [each.conversation(system="You write Python.") for each in (session, one)]
    for turn, text in enumerate(("import os", "def close(self):", "class A:")):
        images = [PHOTO] if turn == 1 else []
        pieces: list[str] = []
        found = talks[0].say(text, images, 5, temperature=0, stop=(), stream=pieces.append)
        expected = talks[1].say(text, images, 5, temperature=0, stop=())
        assert "".join(pieces) == found.text and len(found.tokens) == 5
        if found.tokens != expected.tokens:  # a near tie: their texts go apart from here on
            break
        assert found == expected
        assert talks[0].messages == talks[1].messages
    assert turn or found.tokens == expected.tokens, "the first turn is no near tie"


def test_files_are_looked_for_where_the_program_is_now(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    talk = session.conversation()
    monkeypatch.chdir(tmp_path)
    assert talk.say("moec.part", ["photo.jpg"], 2).tokens


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda s: s.generate([[99999]]), "token 99999"),
        (lambda s: s.logits([[5, 6]], torch.zeros(2, 3, 5, 5)), "[2, 3, 5, 5]"),
        (lambda s: s.decode([5], "no cache"), "found:    str"),
        (lambda s: s.new_cache(1, -1), "-1"),
        (lambda s: s.generate([[5]], stop=(each for each in [1])), "generator"),
        (lambda s: s.generate(reduce(lambda inner, _: [inner], range(3000), [5])), "recursion"),
    ],
)
def test_a_mistake_is_refused_and_the_session_goes_on(session: Any, call: Any, named: str) -> None:
    before = session.logits([[5, 6]])
    refusal(lambda: call(session), named)
    assert session.ranks.alive and np.array_equal(session.logits([[5, 6]]), before)


def test_caches_of_other_sessions_are_refused(session: Any, other: Any, one: Session) -> None:
    mine, others = session.new_cache(1, 8), other.new_cache(1, 8)
    for cache in (others, one.new_cache(1, 8)):
        refusal(lambda cache=cache: session.decode([5], cache), "cache of another session")
    with pytest.raises(MoecError):
        one.decode([5], mine)
    assert mine.lengths.tolist() == others.lengths.tolist() == [0]
    assert session.decode([5], mine).shape == (1, 4096)


def test_a_call_of_the_graph_is_refused(session: Any) -> None:
    refusal(lambda: session.run({}), "a method of the session")


# ---------------------------------------------------------------- several at once


def test_two_sessions_at_once(session: Any, other: Any) -> None:
    caches = [each.prefill([ROWS[2]])[1] for each in (session, other)]
    found = [each.decode([7], cache) for each, cache in zip((session, other), caches, strict=True)]
    assert torch.equal(*found)
    assert [cache.lengths.tolist() for cache in caches] == [[10], [10]]


def test_caches_that_nobody_has_are_forgotten(session: Any) -> None:
    numbers = set()
    for _ in range(5):
        cache = session.new_cache(1, 8)
        numbers.add(cache.held.number)
        del cache
        gc.collect()
    assert len(numbers) < 5, "the ranks number what they hold"


def test_a_cache_that_goes_while_a_call_is_sent(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may run at any moment, and all ranks must see the same order."""
    old = [session.new_cache(1, 8)]
    first = session.ranks._pipes[0]
    send = first.send_bytes

    def sent(data: bytes) -> None:
        send(data)
        old.clear()
        gc.collect()

    monkeypatch.setattr(first, "send_bytes", sent)
    new = session.new_cache(1, 8)
    monkeypatch.undo()
    assert session.decode([5], new).shape == (1, 4096)
    assert session.ranks.alive and new.lengths.tolist() == [1]
