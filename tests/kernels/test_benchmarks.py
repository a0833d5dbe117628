"""Benchmarks of kernels where there is no GPU: they say so before they ask for Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["h200", "layer_timeline", "moe_kernels", "prefill_kernels"])
def test_without_a_gpu_and_without_triton(name: str) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['triton'] = None\n"  # as if it were not installed
        f"sys.argv = ['{name}.py']; sys.path.insert(0, 'benchmarks')\n"
        f"runpy.run_path('benchmarks/{name}.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"error: device cuda: benchmarks/{name}.py")
    assert len(done.stderr.splitlines()) == 4
