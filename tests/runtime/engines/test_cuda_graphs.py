"""Decode steps as graphs, on a CUDA that is made of Python: when they are captured, and kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moec.runtime.engines import cuda_graphs
from moec.runtime.engines.cuda_graphs import MOST, Replays, without_waiting


class OnGpu(Tensor):
    is_cuda = True


class Graph:
    """Does again, in place, what was done while it was captured."""

    captured: "list[Graph]"
    open: "Graph | None" = None

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for each in self.work:
            each()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    @contextmanager
    def capture(graph: Graph, pool: object) -> Iterator[None]:
        Graph.open = graph
        yield
        Graph.open = None
        Graph.captured.append(graph)

    Graph.captured = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "graph_pool_handle": lambda: None, "CUDAGraph": Graph, "graph": capture,
        "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda it: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "cuda", Tensor.clone)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return Graph


def call(feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """[batch, 1] ids and a cache [n] -> ids + the cache's sum, as a graph would compute it."""
    ids, cache = feeds["input_ids"], feeds["past"]
    out = ids + cache.sum()
    if Graph.open:
        Graph.open.work.append(lambda: out.copy_(ids + cache.sum()))
    return (out,)


def feeds(token: int, cache: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[token]]), "past": cache}


def cache() -> Tensor:
    return torch.ones(3, dtype=torch.int64).as_subclass(OnGpu)


def test_only_the_run_before_a_capture_is_a_rehearsal(gpu: type[Graph]) -> None:
    """Ranks may capture at different steps: a rehearsal must not wait for the others."""
    rehearsing, seen = [False], list[bool]()

    @contextmanager
    def rehearsal() -> Iterator[None]:
        rehearsing[0] = True
        yield
        rehearsing[0] = False

    def watched(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        seen.append(rehearsing[0])
        return call(given)

    steps, one = Replays(watched, ("input_ids",), rehearsal), cache()
    for token in (5, 6, 7):
        steps(feeds(token, one))
    assert seen == [False, True, False]  # alone, before the capture, in the capture


def test_a_graph_is_captured_at_the_second_call_and_replayed_from_then_on(gpu: type[Graph]) -> None:
    steps, one = Replays(call, ("input_ids",)), cache()
    for token, captured in ((5, 0), (6, 1), (7, 1), (8, 1)):
        (found,) = steps(feeds(token, one))
        assert int(found) == token + 3 and len(gpu.captured) == captured
    one.fill_(2)  # a graph reads what is there now
    assert int(steps(feeds(9, one))[0]) == 15 and len(gpu.captured) == 1


def test_a_call_that_waits_for_the_gpu_is_never_captured(
    gpu: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return call(given)

    steps, one = Replays(waits, ("input_ids",), without_waiting), cache()
    for token in (5, 6, 7):
        assert int(steps(feeds(token, one))[0]) == token + 3
    assert not gpu.captured and modes == ["default", "error", "default"]  # asked once


def test_another_error_of_a_rehearsal_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(RuntimeError, match="memory"), without_waiting():
        raise RuntimeError("out of memory")


def test_the_last_tokens_of_a_ragged_prompt_capture_nothing(gpu: type[Graph]) -> None:
    """Each row's last piece may be a single token, at an address of its own; then come steps."""
    steps = Replays(call, ("input_ids",))
    rows = [cache() for _ in range(8)]
    for token, row in enumerate(rows):
        assert int(steps(feeds(token, row))[0]) == token + 3
    assert not gpu.captured
    whole = cache()
    for token in range(4):
        assert int(steps(feeds(token, whole))[0]) == token + 3
    assert len(gpu.captured) == 1


def test_few_graphs_are_kept_and_one_that_went_starts_over(gpu: type[Graph]) -> None:
    steps = Replays(call, ("input_ids",))
    caches = [cache() for _ in range(MOST + 1)]
    for one in caches:
        for token in (1, 2):
            steps(feeds(token, one))
    assert len(gpu.captured) == MOST + 1 and len(steps.graphs) == MOST and not steps.seen
    assert int(steps(feeds(3, caches[0]))[0]) == 6 and len(gpu.captured) == MOST + 1
    assert int(steps(feeds(4, caches[0]))[0]) == 7 and len(gpu.captured) == MOST + 2


def test_feeds_of_either_type_on_the_host_or_the_gpu(gpu: type[Graph]) -> None:
    """A graph reads what its capture saw; later feeds may be of another type and lie elsewhere."""

    def sum_of(feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        ids, last, past = feeds["input_ids"], feeds["ring.last"], feeds["past"]
        assert ids.shape == (2, 1) and last.shape == (2,)
        out = ids[:, 0] + 10 * last + past.sum()
        if Graph.open:
            Graph.open.work.append(lambda: out.copy_(ids[:, 0] + 10 * last + past.sum()))
        return (out,)

    kinds = (torch.int64, torch.int32)
    for captured in kinds:
        steps, one = Replays(sum_of, ("input_ids", "ring.last")), cache()
        for step, kind in enumerate((captured, captured, *kinds, *kinds)):
            ids = torch.tensor([[step], [step + 1]], dtype=kind)
            last = torch.tensor([step, 7], dtype=torch.int32)
            if step % 2:
                ids = ids.as_subclass(OnGpu)
            (found,) = steps({"input_ids": ids, "ring.last": last, "past": one})
            assert found.tolist() == [11 * step + 3, step + 74]
        assert len(steps.graphs) == 1


def test_addresses_of_first_calls_do_not_pile_up(
    gpu: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SEEN", 4)
    steps, caches = Replays(call, ("input_ids",)), [cache() for _ in range(6)]
    for one in caches:
        steps(feeds(1, one))
    assert len(steps.seen) == 4
