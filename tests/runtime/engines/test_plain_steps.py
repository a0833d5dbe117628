"""Plain programs of target torch on the CPU: decode steps write into the caches."""

from pathlib import Path

import pytest
import torch

import moec
from moec.runtime.session import Session
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.families import CASES

SPECS = {
    **{name: CASES[name] for name in ("qwen3 windows, dense layer", "deepseek-v3")},
    "llama4": reduced(PRESETS["scout"], 4).model_copy(update={"vision": None}),
}


@pytest.fixture(params=SPECS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Session, Session]:
    """A session on the program, and one on the eager reference."""
    write_random_checkpoint(SPECS[request.param], tmp_path / "weights", seed=3)
    art = moec.export(tmp_path / "weights", "torch", "fp32", tmp_path / "art").path
    return moec.open_session(art), moec.open_session(art, engine="eager")


def test_steps_keep_the_caches_where_they_are(pair: tuple[Session, Session]) -> None:
    """Rows of different length; the caches grow once in between, and a row rests twice."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), generator=generator)

    rows = [ids(n).tolist() for n in (33, 9, 20)]
    ours, theirs = (session.prefill(rows, capacity=40)[1] for session in pair)
    places = {name: each.data_ptr() for name, each in ours.tensors.items()}
    for step in range(12):
        tokens = ids(3)
        alive = torch.tensor([1, int(step not in (4, 5)), 1])
        found, expected = (
            session.extend(tokens[:, None], alive, cache)
            for session, cache in zip(pair, (ours, theirs), strict=True)
        )
        assert (found - expected).norm() < 1e-5 * expected.norm()
        if step < 7:
            assert places == {name: each.data_ptr() for name, each in ours.tensors.items()}
    assert ours.lengths.tolist() == [45, 19, 32] and ours.capacity > 40


def test_generation_past_rows_that_end(pair: tuple[Session, Session]) -> None:
    rows = [torch.randint(0, 256, (n,)).tolist() for n in (30, 3)]
    free = pair[1].generate(rows, max_new_tokens=20, stop=())
    stop = (int(free[0, 34]),)
    found, expected = (each.generate(rows, max_new_tokens=20, stop=stop) for each in pair)
    assert found.tolist() == expected.tolist()


def test_one_token_without_a_cache(pair: tuple[Session, Session]) -> None:
    found, expected = (session.logits(torch.tensor([[7], [9]])) for session in pair)
    assert (found - expected).norm() < 1e-5 * expected.norm()
