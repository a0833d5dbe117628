"""Benchmarks of kernels where there is no GPU: they say so before they ask for Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.spec.config_json import read_config
from moec.spec.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["h200", "layer_timeline", "moe_kernels", "prefill_kernels", "vllm_peer"]
)
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


def _peer(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` beside benchmarks/vllm_peer.py."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return subprocess.run(
        [sys.executable, "-c", f"import json, sys, vllm_peer\n{code}"], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


@pytest.mark.parametrize(
    "python",
    ["[sys.executable, '-I', '-S']", "['no-such-python']"],  # -S: without installed packages
    ids=["without vllm", "missing"],
)
def test_a_python_without_vllm(python: str) -> None:
    done = _peer(f"vllm_peer.need_vllm({python})")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: package vllm: benchmarks/vllm_peer.py")
    assert len(done.stderr.splitlines()) == 4


def test_a_python_with_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").touch()
    done = _peer(f"vllm_peer.need_vllm(['env', 'PYTHONPATH={tmp_path}', sys.executable])")
    assert done.returncode == 0, done.stderr


def test_moec_and_vllm_stand_in_one_table() -> None:
    """Rows are joined by name; the foot has both torches and vLLM's version."""
    ours = {"gpu": "G", "torch": "2.9", "copy_tb_s": 4.2, "fp8_tflop_s": 1500, "rows": [
        {"name": "kernel", "us": 1.0, "limit_us": None},
        {"name": "step", "us": 5000.0, "limit_us": 4100.0},
    ]}  # fmt: skip
    theirs = {"vllm": "0.26.0", "torch": "2.8", "rows": [{"name": "step", "us": 9000.0}]}
    done = _peer(f"vllm_peer.print_table({ours!r}, {theirs!r})")
    assert done.returncode == 0, done.stderr
    assert ["step", "4.10", "5.00", "9.00", "1.80"] in map(str.split, done.stdout.splitlines())
    assert "kernel" not in done.stdout
    assert "G; moec on torch 2.9; vLLM 0.26.0 on torch 2.8" in done.stdout


def test_vllm_reads_the_config_as_scout(tmp_path: Path) -> None:
    """What vLLM gets is Scout's text decoder in FP8, but for the attention chunks."""
    done = _peer("print(json.dumps(vllm_peer.vllm_config()))")
    config = json.loads(done.stdout)
    scout = PRESETS["scout"]
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                **config,
                "attention_chunk_size": scout.text.chunk,
                "max_position_embeddings": scout.text.max_positions,
                "layer_types": [
                    "chunked_attention" if layer.chunk else "full_attention"
                    for layer in scout.text.all_layers
                ],
            }
        )
    )
    found = read_config(tmp_path / "config.json")
    assert found.text == scout.text
    assert found.scheme is not None and found.scheme.layout == "compressed-tensors"
    rules = {rule.weight for rule in found.scheme.rules}
    assert rules == {"channel"}
