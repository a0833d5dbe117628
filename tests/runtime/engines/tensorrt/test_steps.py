"""Decode steps: which of them are captured, and on which stream calls run; without a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.runtime.engines.tensorrt import run as tensorrt_engine
from moec.runtime.engines.tensorrt.opening import OpenEngine, open_engine
from moec.runtime.session import Session
from tests.runtime.engines.tensorrt.conftest import opening, session_of
from tests.runtime.engines.tensorrt.fake import Package

DEFAULT, OTHER, OWN = 0, 5, 9


class Stream:
    """A stream that knows what it waits for."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.waits: list[int] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other.cuda_stream)


class Replays:
    """Counts what it would capture."""

    made: "list[Replays]"

    def __init__(self, call: Callable[[Mapping[str, Tensor]], Any], moving: object) -> None:
        self.call, self.steps = call, 0
        Replays.made.append(self)

    def __call__(self, feeds: Mapping[str, Tensor]) -> Any:
        self.steps += 1
        return self.call(feeds)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stream]:
    """Engines open with a stream of their own, as on a GPU; torch's current one is "current"."""
    found = {"current": Stream(DEFAULT), "default": Stream(DEFAULT), "own": Stream(OWN)}
    found["default"] = found["current"]

    def opened(*args: Any) -> OpenEngine:
        return replace(open_engine(*args), stream=found["own"])

    Replays.made = []
    monkeypatch.setattr(tensorrt_engine, "open_engine", opened)
    monkeypatch.setattr(tensorrt_engine, "Replays", Replays)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: found["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: found["default"])
    return found


def _steps(session: Session) -> int:
    """Steps of a prompt of three tokens and four more that are left to graphs."""
    _, cache = session.prefill([[5, 6, 7]])
    for token in (5, 6, 7, 8):
        session.decode(torch.tensor([token]), cache)
    return sum(each.steps for each in Replays.made)


@pytest.mark.usefixtures("streams")
def test_steps_are_captured_once_a_plain_one_has_shown_the_shapes(
    art: Artefact, package: Package
) -> None:
    assert _steps(session_of(art, package)) == 3 and len(Replays.made) == 1


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("kind", ["CONDITION", "TRIP_LIMIT", "RECURRENCE"])
def test_an_engine_that_branches_is_not_captured(
    art: Artefact, package: Package, kind: str
) -> None:
    run = opening(art, package, layer_types={kind: 1, "CAST": 7})()
    session = replace(session_of(art, package), run=run)
    assert _steps(session) == 0 and not Replays.made


@pytest.mark.usefixtures("streams")
def test_an_engine_that_says_it_cannot_be_captured_is_not(art: Artefact, package: Package) -> None:
    package.plans["model"].capturable = False
    assert _steps(session_of(art, package)) == 0 and not Replays.made


@pytest.mark.usefixtures("streams")
def test_tensorrt_proper_does_not_say(art: Artefact, package: Package) -> None:
    assert _steps(session_of(art, Package(package.plans, rtx=False))) == 3


def test_torchs_default_stream_is_left_to_torch(
    art: Artefact, package: Package, streams: dict[str, Stream]
) -> None:
    """TensorRT would wait for the GPU there. Each of the two streams waits for the other."""
    session = session_of(art, package)
    session.logits([[5, 6]])
    assert package.plans["model"].streams == [OWN]
    assert streams["own"].waits == [DEFAULT] and streams["default"].waits == [OWN]
    streams["current"] = Stream(OTHER)  # such as that of a capture
    session.logits([[5, 6]])
    assert package.plans["model"].streams == [OWN, OTHER]
    assert len(streams["own"].waits) == 1 and not streams["current"].waits
