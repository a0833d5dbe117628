"""Benchmarks of kernels where there is no GPU: they say so before they ask for Triton."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec.spec.hf.config import read_config
from moec.spec.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    [
        "h200",
        "vllm_peer",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                "layer_timeline",
                "many_tokens",
                "moe_kernels",
                "plain_steps",
                "prefill_kernels",
            )
        ),
    ],
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


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/vllm_peer.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("vllm_peer")


@pytest.mark.parametrize(
    "python",
    [[sys.executable, "-I", "-S"], ["no-such-python"]],  # -S: without installed packages
    ids=["without vllm", "missing"],
)
def test_a_python_without_vllm(
    peer: Any, python: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        peer.need_vllm(python)
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith("error: package vllm: benchmarks/vllm_peer.py")
    assert len(said.splitlines()) == 4


def test_a_python_with_vllm(peer: Any, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").touch()
    peer.need_vllm(["env", f"PYTHONPATH={tmp_path}", sys.executable])


def test_a_child_that_fails_ends_the_benchmark(peer: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        peer.measured([sys.executable, "-c", "raise SystemExit(5)"], tmp_path / "none.json")
    assert ended.value.code == 5


def test_moec_and_vllm_stand_in_one_table(peer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are joined by name; the foot has both torches and vLLM's version."""
    ours = {"gpu": "G", "torch": "2.9", "copy_tb_s": 4.2, "fp8_tflop_s": 1500, "rows": [
        {"name": "kernel", "us": 1.0, "limit_us": None},
        {"name": "step", "us": 5000.0, "limit_us": 4100.0},
    ]}  # fmt: skip
    theirs = {"vllm": "0.26.0", "torch": "2.8", "rows": [{"name": "step", "us": 9000.0}]}
    peer.print_table(ours, theirs)
    said = capsys.readouterr().out
    assert ["step", "4.10", "5.00", "9.00", "1.80"] in map(str.split, said.splitlines())
    assert "kernel" not in said
    assert "G; moec on torch 2.9; vLLM 0.26.0 on torch 2.8" in said


def test_vllm_gets_scout_without_attention_chunks(peer: Any, tmp_path: Path) -> None:
    config, text = peer.vllm_config(), PRESETS["scout"].text
    chunks = {
        "attention_chunk_size": text.chunk,
        "layer_types": [
            "chunked_attention" if layer.chunk else "full_attention" for layer in text.all_layers
        ],
        "max_position_embeddings": text.max_positions,
    }
    assert set(config["layer_types"]) == {"full_attention"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **chunks}))
    found = read_config(tmp_path / "config.json")
    assert found.text == text
    assert found.scheme is not None and found.scheme.layout == "compressed-tensors"
    assert {(rule.weight, rule.inputs) for rule in found.scheme.rules} == {("channel", "token")}
