"""The benchmarks of killed builds, races and equal bytes, small enough for every run."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kills.py --kills 8", "0 half-valid artefacts, 8 of 8 re-runs byte-identical"),
        ("races.py --rounds 1 --only 16 --only 24", "2 races, 1 rounds each: 0 wrong"),
        ("deterministic.py --only ort", "1 builds, each twice: 0 files differ"),
    ],
    ids=["kills", "races", "equal bytes"],
)
def test_a_small_run_finds_nothing_wrong(line: str, expected: str) -> None:
    script, *options = line.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
