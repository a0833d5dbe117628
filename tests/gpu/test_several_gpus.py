"""Two GPUs that share a model: sums, sessions, the proof, and a rank that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.proof.compare import FP8_NOISE
from moec.runtime.ranks.session import SharedSession
from moec.spec.errors import MoecError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SUMS = Path(__file__).parent / "sums.py"


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "art"
    return moec.export(tiny, target="torch", out=out).path


def test_sums_are_right_and_equal_on_all_gpus() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SUMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["right"], done.stderr[-3000:]


def test_two_gpus_are_one_but_for_noise(art: Path, golden: dict[str, Tensor]) -> None:
    ids = golden["input_ids"]
    rows = [ids[0, :150].tolist(), ids[1, :1].tolist(), ids[1, :131].tolist()]
    with_two = moec.open_session(art, "cuda", gpus=2)
    one = moec.open_session(art, "cuda")
    found, expected = (each.logits(ids[:2, :200]) for each in (with_two, one))
    # Each rank quantises its own part of a token: that is noise of FP8.
    assert (found - expected).norm() < 2 * FP8_NOISE.error * expected.norm()
    first, again = (with_two.generate(rows, max_new_tokens=24, stop=()) for _ in range(2))
    assert np.array_equal(first, again)
    _, cache = with_two.prefill(ids[:2, :100])
    logits, theirs = with_two.prefill(ids[:2, :100])
    tokens = logits.argmax(-1)
    for _ in range(40):
        best = with_two.likeliest(tokens, cache)
        assert torch.equal(best, with_two.decode(tokens, theirs).argmax(-1))
        tokens = best


def test_the_proof_passes(art: Path) -> None:
    report = moec.validate(art, device="cuda", gpus=2, tokens=160)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert "2 ranks" in report.engine


def test_a_rank_that_dies_ends_the_run_and_frees_the_gpus(art: Path) -> None:
    session = moec.open_session(art, "cuda", gpus=2)
    assert isinstance(session, SharedSession)
    session.generate([[5, 6, 7]], max_new_tokens=4, stop=())
    processes, start = session.ranks._processes, time.monotonic()

    def kill(_: list[int | None]) -> None:
        os.kill(processes[1].pid, signal.SIGKILL)

    with pytest.raises(MoecError, match="rank 1 of 2") as caught:
        session.generate([[5, 6, 7]], max_new_tokens=400, stop=(), stream=kill)
    assert caught.value.exit_code == 3 and time.monotonic() - start < 20
    assert all(each.poll() is not None for each in processes)
