"""The plugin in TensorRT-RTX itself, which builds engines where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="builds with TensorRT-RTX")

from moec.exporters.tensorrt.plugin.build import Plugin
from moec.kernels.launcher.build import PROGRAMS
from tests.exporters.tensorrt_plugin.conftest import HERE
from tests.kernels.launcher.expected import SIZES
from tests.kernels.launcher.launcher import Launcher, compile_library
from tests.kernels.launcher.reader import programs

pytestmark = pytest.mark.full

ROOT = HERE.parents[2]
LARGEST = 600  # tokens of the profile


def build(plugin: Plugin, engine: Path, case: str) -> str:
    done = subprocess.run(
        [sys.executable, HERE / "build_rtx.py", str(plugin.library), engine, case],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def test_an_engine_is_built(plugin: Plugin, tmp_path: Path) -> None:
    said = build(plugin, tmp_path / "engine", "right")
    assert "built" in said and "MoecMoe" not in said, said
    engine = (tmp_path / "engine").read_bytes()
    assert plugin.programs[SIZES[0]].encode() in engine
    assert plugin.programs[SIZES[1]].encode() not in engine
    program = next(programs((plugin.folder / PROGRAMS).read_bytes()))
    room = Launcher(compile_library(tmp_path / "liblauncher.so"), program).workspace(LARGEST)
    assert f"size={room} " in engine.decode("latin-1")  # of the workspace


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("dtype", "MoecMoe: input router: found FLOAT, expected BFLOAT16"),
        ("wide weights", "MoecMoe: input down: found BFLOAT16, expected FLOAT8E4M3FN"),
        ("shape", "MoecMoe: input gate_up_scale: found [21, 128], expected [21, 256]"),
        ("count", "MoecMoe: inputs: found 5, expected 6"),
        ("sizes", "no program for x [T, 256], router [21, 256]"),
    ],
)
def test_what_is_refused_and_why(plugin: Plugin, tmp_path: Path, case: str, message: str) -> None:
    said = build(plugin, tmp_path / "engine", case)
    assert message in said and said.endswith("refused\n"), said
