"""The wheel is whole: installed elsewhere, it has the command and every package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.full


def test_the_wheel_builds_and_gives_the_command(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("moec-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert (site / "bin" / "moec").is_file()
    script = (
        "import moec, sys, moec.cli; print(moec.__file__); "
        "sys.argv[:1] = ['moec', 'build', '--variant', 'scout', '--no-validate', '--out']; "
        "moec.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site)) and "model.onnx" in done.stdout
