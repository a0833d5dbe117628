"""A GPU whose memory is full: one clear refusal, wherever it happens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import moec
from moec.runtime.engines import torch_program as torch_engine
from moec.runtime.engines.bound import Bound
from moec.runtime.engines.gpu import memory_for
from moec.runtime.session import Session
from moec.spec.errors import MoecError

pytestmark = pytest.mark.full

FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 4.00 GiB is free. Including non-PyTorch memory, this process has 75.11 GiB memory in "
    "use. Of the allocated memory 74 GiB is allocated by PyTorch. See documentation for more."
)


def full(*given: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError(FULL)


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "art"
    return moec.export(tiny, target="torch", out=out).path


def check(call: Callable[[], object], what: str) -> None:
    with pytest.raises(MoecError) as caught:
        call()
    error = caught.value
    assert error.exit_code == 3 and what in error.where
    assert "20.00 GiB" in error.found and "79.11 GiB" in error.found
    assert "documentation" not in error.found
    assert "moec plan" in error.next_step and len(str(error).splitlines()) == 4


def test_weights(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "load", full)
    check(lambda: moec.open_session(art), "weights")


def test_caches(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = moec.open_session(art)
    monkeypatch.setattr(torch, "zeros", full)
    check(lambda: session.new_cache(2, 4000), "caches of 2 x 4000")


def test_caches_that_grow_can_be_used_further(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, pad, calls = moec.open_session(art), functional.pad, iter([True] * 3)
    ids = torch.arange(5, 25)[None]
    expected = session.logits(ids)[0, -1]
    _, cache = session.prefill(ids[:, :16])
    with monkeypatch.context() as patch:  # the fourth finds no room
        patch.setattr(functional, "pad", lambda *x: pad(*x) if next(calls, False) else full())
        check(lambda: session.extend(ids[:, 16:], torch.tensor([4]), cache), "caches of 1 x 32")
    found = session.extend(ids[:, 16:], torch.tensor([4]), cache)
    assert cache.capacity == 32 and {each.shape[2] for each in cache.tensors.values()} == {32}
    assert (found[0] - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("name", ["prefill", "logits"])
def test_calls(art: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bound, "__call__", full)
    session: Session = moec.open_session(art)
    check(lambda: getattr(session, name)(torch.ones(1, 7, dtype=torch.int64)), "[1, 7]")


def test_the_words_of_triton_and_cuda_are_known_and_other_errors_go_through() -> None:
    for text in ("Triton Error [CUDA]: out of memory", "CUDA error: out of memory"):
        with pytest.raises(MoecError, match="out of memory"), memory_for("x"):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="another"), memory_for("x"):
        raise RuntimeError("another")
