"""Decode steps as graphs of ONNX Runtime, on a session that captures addresses as it does."""

import ctypes
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.runtime.engines.cuda_graphs import MOVING
from moec.runtime.engines.ort_binding import OrtBinding
from moec.runtime.engines.ort_cuda import graphs
from moec.runtime.engines.ort_cuda.graphs import OrtGraphs
from moec.spec import names

CACHE = "past.0.key"


class OnGpu(Tensor):
    is_cuda = True


class Binding:
    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    def bind_input(self, name: str, *place: Any) -> None:
        self.at[name] = place[-1]

    bind_output = bind_input


class Session:
    """Its logits are a sequence's token, times 10, plus the first number of its cache.

    A run that belongs to a graph captures all addresses at the first time, and uses them from then
    on, whatever is bound.
    """

    def __init__(self) -> None:
        self.captured: dict[int, dict[str, int]] = {}
        self.runs: list[int] = []

    def get_inputs(self) -> list[Any]:
        batch = {name: ["batch"] for name in MOVING} | {names.INPUT_IDS: ["batch", 1]}
        batch |= {names.LOGIT_INDEX: ["batch", 1], CACHE: ["batch", 2]}
        return [SimpleNamespace(name=name, shape=shape) for name, shape in batch.items()]

    def get_overridable_initializers(self) -> list[Any]:
        return []

    def get_outputs(self) -> list[Any]:
        logits = SimpleNamespace(name="logits", shape=["batch"], type="tensor(float)")
        kept = SimpleNamespace(name=names.present_of(CACHE), shape=["batch", 2], type="tensor(x)")
        return [logits, kept]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, graph: int) -> None:
        self.runs.append(graph)
        at = binding.at if graph < 0 else self.captured.setdefault(graph, dict(binding.at))
        assert at[CACHE] == at[names.present_of(CACHE)]
        for row in range(2):
            ids = ctypes.c_int64.from_address(at[names.INPUT_IDS] + 8 * row).value
            first = ctypes.c_float.from_address(at[CACHE] + 8 * row).value
            ctypes.c_float.from_address(at["logits"] + 4 * row).value = 10 * ids + first


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def steps(session: Session) -> Iterator[OrtGraphs]:
    yield OrtGraphs(
        lambda graph: OrtBinding(session, "cpu", {}, graph, True),
        OrtBinding(session, "cpu", {}, -1, True),
    )


def cache(first: float) -> Tensor:
    return torch.tensor([[first, 0.0], [first + 1, 0.0]]).as_subclass(OnGpu)


def feeds(token: int, kept: Tensor) -> dict[str, Tensor]:
    found = {name: torch.zeros(2, dtype=torch.int64) for name in MOVING}
    found[names.INPUT_IDS] = torch.tensor([[token], [token + 1]])
    return {**found, names.LOGIT_INDEX: torch.zeros(2, 1, dtype=torch.int64), CACHE: kept}


def step(steps: OrtGraphs, token: int, kept: Tensor) -> list[float]:
    results = steps(feeds(token, kept))
    assert results[names.present_of(CACHE)] is kept
    return results["logits"].tolist()


def test_the_second_step_is_captured_and_later_ones_are_replayed(
    steps: OrtGraphs, session: Session
) -> None:
    kept = cache(0.5)
    for token in range(6):
        assert step(steps, token, kept) == [10 * token + 0.5, 10 * token + 11.5]
    assert session.runs == [-1, 0, 0, 0, 0, 0]
    other = cache(0.25)
    for token in range(3):
        assert step(steps, token, other)[0] == 10 * token + 0.25
        assert step(steps, token, kept)[0] == 10 * token + 0.5
    assert session.runs[6:] == [-1, 0, 1, 0, 1, 0]


def test_a_view_at_the_same_place_runs_the_graph_of_that_place(
    steps: OrtGraphs, session: Session
) -> None:
    """As part of a batch that is all of it."""
    kept = cache(0.5)
    for token in range(3):
        step(steps, token, kept)
    for token in range(3, 6):
        view = kept[0:2].as_subclass(OnGpu)
        assert view is not kept and step(steps, token, view)[1] == 10 * token + 11.5
        assert step(steps, token, kept)[1] == 10 * token + 11.5
    assert len(session.captured) == 1


def test_results_stay_as_they_were(steps: OrtGraphs) -> None:
    kept = cache(0.5)
    found = [steps(feeds(token, kept))["logits"] for token in range(5)]
    assert [each[0].item() for each in found] == [10 * token + 0.5 for token in range(5)]


def test_a_graph_keeps_no_cache(steps: OrtGraphs) -> None:
    kept = cache(0.5)
    for token in range(3):
        step(steps, token, kept)
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None


def test_further_caches_run_without(
    steps: OrtGraphs, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    one, other = cache(0.5), cache(0.25)
    for token in range(4):
        assert step(steps, token, one)[0] == 10 * token + 0.5
        assert step(steps, token, other)[0] == 10 * token + 0.25
    assert set(session.captured) == {0} and session.runs.count(-1) == 5
