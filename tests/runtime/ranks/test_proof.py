"""A proof whose engine is shared by ranks: it passes, and it sees what only one rank has wrong."""

import json
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact
from tests.proofs import assert_passed
from tests.ranks import torchrun

pytestmark = pytest.mark.full

#: rank 1 loads rank 0's part of a stored tensor
FAULTS = """
import json, sys
import moec
from moec.runtime.engines import weights
from moec.runtime.ranks.group import started_as
from moec.spec.sharding import Rank

right = weights.piece_of
artefact, *faults = sys.argv[1:]
found = {}
for fault in faults:
    def piece(spec, rank, source, shape):
        return right(spec, Rank(0, 2) if source == fault else rank, source, shape)
    weights.piece_of = piece
    report = moec.validate(artefact, seed=1, tokens=20)
    failed = [check.name for check in report.checks if not check.passed]
    found[fault] = report.passed, failed
if started_as().index == 0:
    print(json.dumps(found))
"""


@pytest.mark.parametrize("gpus", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_artefact_that_ranks_share_passes(art: Path, gpus: int) -> None:
    stages: list[str] = []
    report = moec.validate(
        art, gpus=gpus, tokens=140, seed=5, progress=lambda stage, *_: stages.append(stage)
    )
    assert_passed(report)
    assert report.engine == f"torch, {gpus} ranks"
    assert {"each op", "generation", "images"} <= set(stages)
    names = {check.name for check in report.checks}
    assert {"layers.7, each op", "layers.7", "logits, chunk borders", "greedy tokens"} <= names


def test_a_part_that_one_rank_has_wrong_is_found(shared: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    faults = {
        "layers.3.moe.down": "layers.3: out",
        "head.weight": "logits, same inputs",
    }
    ran = torchrun(2, script, shared["maverick"], "nothing", *faults)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("nothing") == [True, []]
    assert found.keys() == faults.keys()
    for fault, (passed, failed) in found.items():
        assert not passed and faults[fault] in failed, (fault, failed)


def test_torchrun_proves_on_tokens_that_all_ranks_draw_and_records_one_report(
    shared: dict[str, Path],
) -> None:
    art = shared["maverick"]
    ran = torchrun(2, "-m", "moec", "validate", art, "--tokens", 20, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert_passed(report)
    assert report["engine"] == "torch, 2 ranks"
    assert open_artefact(art).manifest.parity == report
