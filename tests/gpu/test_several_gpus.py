"""Two and four GPUs that share a model: sums, sessions, the proof, and a rank that dies."""

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
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SUMS = Path(__file__).parent / "sums.py"
on_two_and_four = pytest.mark.parametrize(
    "gpus",
    [
        2,
        pytest.param(
            4,
            marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"),
        ),
    ],
)


@pytest.fixture(scope="module")
def arts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Artefacts by number of GPUs: the trained model, and a random one with wider experts."""
    folder = tmp_path_factory.mktemp("several")
    spec = PRESETS["tiny-scout"]
    experts = spec.text.experts.model_copy(update={"hidden": 256, "shared_hidden": 256})
    text = spec.text.model_copy(update={"experts": experts})
    write_random_checkpoint(spec.model_copy(update={"text": text}), folder / "wide", seed=1)
    return {
        gpus: moec.export(checkpoint, target="torch", out=folder / str(gpus)).path
        for gpus, checkpoint in ((2, tiny), (4, folder / "wide"))
    }


@on_two_and_four
def test_sums_are_right_and_equal_on_all_gpus(gpus: int) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    command = [*start, str(SUMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["right"], done.stderr[-3000:]


@on_two_and_four
def test_gpus_are_one_but_for_noise(
    gpus: int, arts: dict[int, Path], golden: dict[str, Tensor]
) -> None:
    ids = golden["input_ids"]
    rows = [ids[0, :150].tolist(), ids[1, :1].tolist(), ids[1, :131].tolist()]
    shared = moec.open_session(arts[gpus], "cuda", gpus=gpus)
    one = moec.open_session(arts[gpus], "cuda")
    found, expected = (each.logits(ids[:2, :200]) for each in (shared, one))
    # Each rank quantises its own part of a token: that is noise of FP8.
    assert (found - expected).norm() < 2 * FP8_NOISE.error * expected.norm()
    first, again = (shared.generate(rows, max_new_tokens=24, stop=()) for _ in range(2))
    assert np.array_equal(first, again)
    _, cache = shared.prefill(ids[:2, :100])
    logits, theirs = shared.prefill(ids[:2, :100])
    tokens = logits.argmax(-1)
    for _ in range(40):
        best = shared.likeliest(tokens, cache)
        assert torch.equal(best, shared.decode(tokens, theirs).argmax(-1))
        tokens = best


@on_two_and_four
def test_the_proof_passes(gpus: int, arts: dict[int, Path]) -> None:
    report = moec.validate(arts[gpus], device="cuda", gpus=gpus, tokens=160)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert f"{gpus} ranks" in report.engine


#: a program under torchrun that has a group of its own, which knows no way between hosts' memory
JOINED = """
import os, sys
import torch, torch.distributed as dist
import moec

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
tokens = moec.open_session(sys.argv[1], "cuda").generate([[5, 6, 7]], max_new_tokens=4, stop=())
if dist.get_rank() == 0:
    print(*tokens[0])
sys.stdout.flush()
os._exit(0)  # NCCL waits for CUDA graphs that use it
"""


def test_a_group_that_a_program_has_joined_is_used(arts: dict[int, Path], tmp_path: Path) -> None:
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*start, script, arts[2]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.split()) == 7, done.stderr[-3000:]


def test_a_rank_that_dies_ends_the_run_and_frees_the_gpus(arts: dict[int, Path]) -> None:
    session = moec.open_session(arts[2], "cuda", gpus=2)
    assert isinstance(session, SharedSession)
    session.generate([[5, 6, 7]], max_new_tokens=4, stop=())
    processes, start = session.ranks._processes, time.monotonic()

    def kill(_: list[int | None]) -> None:
        os.kill(processes[1].pid, signal.SIGKILL)

    with pytest.raises(MoecError, match="rank 1 of 2") as caught:
        session.generate([[5, 6, 7]], max_new_tokens=400, stop=(), stream=kill)
    assert caught.value.exit_code == 3 and time.monotonic() - start < 20
    assert all(each.poll() is not None for each in processes)
