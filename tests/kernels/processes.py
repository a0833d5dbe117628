"""Processes that run kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def interpreted(script: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own: the interpreter is chosen when triton is imported."""
    return subprocess.run(
        [sys.executable, Path(__file__).with_name(script)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
