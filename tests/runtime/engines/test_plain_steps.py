"""Plain programs of target torch on the CPU: decode steps write into the caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import moec
from moec.runtime.cache import take_back
from moec.runtime.engines import torch_program
from moec.runtime.session import Session
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

SPECS = {
    **{name: CASES[name] for name in ("qwen3 windows, dense layer", "deepseek-v3")},
    "llama4": reduced(PRESETS["scout"], 4).model_copy(update={"vision": None}),
}


@pytest.fixture(scope="module", params=SPECS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Session]:
    """A session on the program, and one on the eager reference."""
    folder = tmp_path_factory.mktemp("plain")
    write_random_checkpoint(SPECS[request.param], folder / "weights", seed=3)
    art = moec.export(folder / "weights", "torch", "fp32", folder / "art").path
    return moec.open_session(art), moec.open_session(art, engine="eager")


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


def test_steps_keep_the_caches_where_they_are(pair: tuple[Session, Session]) -> None:
    """Rows of different length; the caches grow once in between, and a row rests twice."""
    rows = [ids(n, n).tolist() for n in (33, 9, 20)]
    ours, theirs = (session.prefill(rows, capacity=40)[1] for session in pair)
    places = {name: each.data_ptr() for name, each in ours.tensors.items()}
    for step in range(12):
        tokens = ids(3, step)
        alive = torch.tensor([1, int(step not in (4, 5)), 1])
        found, expected = (
            session.extend(tokens[:, None], alive, cache)
            for session, cache in zip(pair, (ours, theirs), strict=True)
        )
        assert near(found, expected)
        if step < 7:
            assert places == {name: each.data_ptr() for name, each in ours.tensors.items()}
    assert ours.lengths.tolist() == [45, 19, 32] and ours.capacity > 40


@pytest.mark.parametrize("capacity", [11, 12, 40])
def test_the_fullest_row_rests_while_another_goes_on(
    pair: tuple[Session, Session], capacity: int
) -> None:
    """Also at the end of a prompt, whose last prefill chunk has one token of the longer row."""
    short = tuple(replace(each, limits=replace(each.limits, prefill_chunk=4)) for each in pair)
    rows = torch.stack([ids(9, 1), ids(9, 2)])
    caches = [session.new_cache(2, capacity) for session in short]
    for session, cache in zip(short, caches, strict=True):
        session.extend(rows[:, :8], torch.tensor([8, 1]), cache)
        session.extend(rows, torch.tensor([3, 9]), cache)
        session.extend(rows[:, :1], torch.tensor([0, 1]), cache)
    found, expected = (
        session.decode(torch.tensor([3, 4]), cache)
        for session, cache in zip(short, caches, strict=True)
    )
    assert near(found, expected)


def test_generation_past_rows_that_end(pair: tuple[Session, Session]) -> None:
    rows = [ids(n, n).tolist() for n in (30, 3)]
    free = pair[1].generate(rows, max_new_tokens=20, stop=())
    stop = (int(free[0, 34]),)
    found, expected = (each.generate(rows, max_new_tokens=20, stop=stop) for each in pair)
    assert found.tolist() == expected.tolist()


def test_one_token_without_a_cache(pair: tuple[Session, Session]) -> None:
    found, expected = (session.logits(torch.tensor([[7], [9]])) for session in pair)
    assert near(found, expected)


@pytest.mark.parametrize("held", [12, 30])
@pytest.mark.parametrize("back", [(0,), (1,), (2,), (9,), (1, 3), (2, 2), (1, 20)])
def test_taking_back_and_going_on(
    pair: tuple[Session, Session], held: int, back: tuple[int, ...]
) -> None:
    """Rings of chunks and windows have lost what later tokens have replaced."""
    session, row = pair[0], ids(held, 5)
    _, cache = session.prefill(row[None], capacity=60)
    for count in back:
        wanted = max(0, int(cache.lengths) - count)
        kept = take_back(cache, wanted, session.spec.text)
        row = torch.cat([row[:wanted], ids(3, count)])
        found = session.extend(row[None, kept:], torch.tensor([len(row) - kept]), cache)
        assert near(found, session.prefill(row[None])[0])


def test_two_tokens_taken_back_one_after_the_other(pair: tuple[Session, Session]) -> None:
    session, row = pair[0], ids(17, 5)
    _, cache = session.prefill(row[None], capacity=60)
    assert take_back(cache, 16, session.spec.text) in (0, 16)
    kept = take_back(cache, 14, session.spec.text)
    found = session.extend(row[None, kept:15], torch.tensor([15 - kept]), cache)
    assert near(found, session.prefill(row[None, :15])[0])


def test_the_proof_runs_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CASES["qwen3"]
    write_random_checkpoint(spec, tmp_path / "weights", seed=3)
    art = moec.export(tmp_path / "weights", "torch", "fp32", tmp_path / "art").path
    assert_passed(moec.validate(art))
    real = torch_program.build_step

    def broken(*given: Any) -> fx.GraphModule:
        graph = real(*given)
        (out,) = (node for node in graph.graph.nodes if node.op == "output")
        logits, *rest = out.args[0]  # type: ignore[misc]
        with graph.graph.inserting_before(out):
            other = graph.graph.call_function(torch.mul, (logits, -3.0))
        other.meta.update(logits.meta)  # type: ignore[union-attr]
        out.args = ((other, *rest),)
        graph.recompile()
        return graph

    monkeypatch.setattr(torch_program, "build_step", broken)
    assert not moec.validate(art).passed
