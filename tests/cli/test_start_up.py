"""A command that computes nothing does not wait for what computes."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import sys
from moec.cli import main

sys.argv = ["moec", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
slow = {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "transformers", "triton"}
found = slow & set(sys.modules)
assert not found, f"imported: {found}"
"""

LINES = [
    "--version",
    "--help",
    "build --help",
    "generate --help",
    "spec list",
    "spec show scout",
    "plan scout",
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_that_computes_nothing_imports_no_framework(line: str) -> None:
    command = [sys.executable, "-c", CODE, *line.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", [["-m", "moec"], ["cli.py"]], ids=" ".join)
def test_a_checkout_has_the_command(program: list[str]) -> None:
    command = [sys.executable, *program, "spec", "list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "HYPOTHETICAL" in done.stdout, done.stderr
