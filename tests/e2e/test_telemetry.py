"""A session on ONNX Runtime leaves no file behind: the telemetry of ONNX Runtime is off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moec

pytestmark = pytest.mark.full
_SCRIPT = """
import sys, time
import moec
moec.open_session(sys.argv[1]).logits([[1, 2, 3]])
time.sleep(2)  # telemetry has a thread of its own
"""


def test_nothing_is_written_below_home_or_among_temporary_files(tiny: Path, tmp_path: Path) -> None:
    art = moec.export(tiny, "onnx", "fp32", tmp_path / "art").path
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    given = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": ""}
    left = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", _SCRIPT, str(art)]
    subprocess.run(command, check=True, env=left | given)
    assert [*home.rglob("*"), *temporary.rglob("*")] == []
