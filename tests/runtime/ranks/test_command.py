"""The command line on several ranks: `--gpus`, and `torchrun`; and what nobody can share."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.weights.random import write_random_checkpoint
from tests.conftest import run_command
from tests.ranks import MARK, MAVERICK, marked, torchrun
from tests.refusals import one_message, refusal

pytestmark = pytest.mark.full

IDS = [7, 8, 9, 10, 11, 12]
GENERATE = ("--ids", ",".join(map(str, IDS)), "--max-new-tokens", 8)
#: what a test replaces if no rank may start
NO_RANKS = ("moec.runtime.ranks.start.Ranks.__init__", None)

#: each rank opens an artefact of its own
OTHERS = """
import os, sys
import moec
from moec.spec.errors import MoecError

try:
    moec.open_session(sys.argv[1 + int(os.environ["RANK"])])
except MoecError as error:
    os.write(1, f"{str(error)!r}\\n".encode())  # at once, as both ranks write
"""


OWN = """
import os, sys
import moec

if os.environ["RANK"] == "0":
    for path, gpus in ((sys.argv[1], 1), (sys.argv[2], None)):
        session = moec.open_session(path, gpus=gpus)
        print(len(session.generate([[5, 6, 7]], max_new_tokens=4, stop=())[0]))
"""


@pytest.fixture(scope="module")
def alone(art: Path) -> list[int]:
    """What one process prints."""
    code, out, err = run_command("generate", art, *GENERATE)
    assert code == 0, err
    return list(map(int, out.split()))


def assert_tied(art: Path, found: list[int], expected: list[int]) -> None:
    """All tokens are the same, or two were about as likely where they part."""
    assert len(found) == len(expected)
    parted = [at for at, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) > 1]
    for at in parted[:1]:
        logits = moec.open_session(art).logits([IDS + expected[:at]])[0, -1]
        assert logits[expected[at]] - logits[found[at]] < 0.1 * abs(logits).max()


def test_two_gpus_print_what_one_prints(
    art: Path, alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "generate")
    code, out, err = run_command("generate", art, *GENERATE, "--gpus", 2)
    assert code == 0 and err.splitlines()[0].startswith("note: 2 processes share the cores"), err
    assert_tied(art, list(map(int, out.split())), alone)
    assert not marked("generate"), "the ranks end with the command"


def test_torchrun_prints_one_output(art: Path, alone: list[int]) -> None:
    ran = torchrun(2, "-m", "moec", "generate", art, *GENERATE)
    assert ran.returncode == 0, ran.stderr
    assert_tied(art, list(map(int, ran.stdout.split())), alone)


def test_a_rank_may_have_models_of_its_own(art: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """Only rank 0 runs them: nothing waits for the other rank."""
    script = tmp_path / "own.py"
    script.write_text(OWN)
    ran = torchrun(2, script, art, tiny_onnx)
    assert ran.returncode == 0 and ran.stdout.split() == ["7", "7"], ran.stderr


def test_ranks_that_open_different_artefacts_refuse(
    shared: dict[str, Path], tmp_path: Path
) -> None:
    """The second is of the same sizes, and has other weights."""
    write_random_checkpoint(MAVERICK, tmp_path / "checkpoint", seed=1)
    other = moec.export(tmp_path / "checkpoint", target="torch", out=tmp_path / "art").path
    script = tmp_path / "others.py"
    script.write_text(OTHERS)
    ran = torchrun(2, script, shared["maverick"], other)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert len(said) == 2 and said[0] == said[1], "both ranks say the same"
    assert "rank 1: the artefact" in said[0] and "as rank 0 has" in said[0]


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "art"
    return moec.export(tiny, target="torch", precision="bf16", out=out).path


@pytest.mark.parametrize("run", [moec.open_session, moec.validate])
@pytest.mark.parametrize(
    "fixture, gpus, names",
    [
        ("tiny_onnx", 2, "engine onnxruntime"),
        ("plain", 2, "programs of torch-plain"),
        ("art", 3, "3 ranks: text.heads"),
        ("tiny", 2, "tiny-scout"),
    ],
)
def test_what_ranks_cannot_share_is_refused_before_they_start(
    run: Any, fixture: str, gpus: int, names: str, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    monkeypatch.setattr(*NO_RANKS)
    refusal(lambda: run(request.getfixturevalue(fixture), gpus=gpus), names)


@pytest.mark.parametrize("gpus", [0, -1, True, 1.5, "2"])
def test_numbers_of_gpus_that_are_none_are_refused(art: Path, gpus: Any) -> None:
    for run in (moec.open_session, moec.validate):
        refusal(lambda run=run: run(art, gpus=gpus), "gpus")


def test_the_eager_reference_is_not_shared(art: Path) -> None:
    refusal(lambda: moec.open_session(art, engine="eager", gpus=2), "eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "validate"])
def test_gpus_that_are_not_there_are_refused(art: Path, command: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(*NO_RANKS)
    options = GENERATE if command == "generate" else ()
    code, out, err = run_command(command, art, *options, "--gpus", 2, "--device", "cuda")
    assert (code, out.strip()) == (3, "")
    one_message(err, "GPU")
