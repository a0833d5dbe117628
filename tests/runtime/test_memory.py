"""Caches that memory has no room for are refused at the start, with the number that fits."""

from pathlib import Path

import pytest

import moec
from moec.runtime import cache, memory
from moec.spec.presets import PRESETS
from tests.refusals import refusal, within_a_gigabyte

TINY = Path(__file__).parents[2] / "examples" / "tiny-scout"


@pytest.fixture(scope="module")
def session() -> moec.Session:
    return moec.open_session(TINY)


def test_tokens_beyond_memory_are_refused_with_the_number_that_fits(session: moec.Session) -> None:
    with within_a_gigabyte():
        error = refusal(
            lambda: session.generate([[5, 6]], max_new_tokens=10**12), "made for 2,048 positions"
        )
    most = int(error.expected.split(" new")[0].removeprefix("at most ").replace(",", ""))
    room = memory.available("cpu")
    assert 0.5 * room < memory.cache_bytes(session.spec, 4, 1, most, "slots") < 2 * room


def test_sequences_that_end_early_take_little_memory(
    session: moec.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "available", lambda device: 1 << 50)
    seen = []
    with within_a_gigabyte():
        session.generate([[5, 6]], max_new_tokens=10**7, stop=range(4096), stream=seen.append)
    assert len(seen) == 1


def test_caches_that_grow_give_the_same_tokens(
    session: moec.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.generate([[5, 6, 7]], max_new_tokens=24, stop=())
    monkeypatch.setattr(cache, "AHEAD", 3)
    assert (session.generate([[5, 6, 7]], max_new_tokens=24, stop=()) == expected).all()


def test_the_largest_capacity_that_fits() -> None:
    spec = PRESETS["scout"]
    for layout in ("slots", "buffers"):
        for capacity in (1, 100, 8192, 100_000):
            room = memory.cache_bytes(spec, 2, 3, capacity, layout)
            assert memory.most_tokens(spec, 2, 3, layout, room, 10**9) == capacity
            assert memory.most_tokens(spec, 2, 3, layout, room - 1, 10**9) == capacity - 1


@pytest.mark.parametrize("temperature", [1e-320, 1e-200, 1e-30])
def test_a_tiny_temperature_takes_the_likeliest_token(
    session: moec.Session, temperature: float
) -> None:
    greedy = session.generate([[5, 6, 7]], max_new_tokens=4)
    found = session.generate([[5, 6, 7]], max_new_tokens=4, temperature=temperature, seed=1)
    assert (found == greedy).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1e-320),
        ("top_p", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.0000001),
        ("top_k", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_settings_that_no_draw_can_follow(session: moec.Session, name: str, value: float) -> None:
    options = {"temperature": 1.0} | {name: value}
    refusal(lambda: session.generate([[5]], max_new_tokens=2, **options), name)
