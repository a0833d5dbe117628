"""The library in ONNX Runtime, on its CPU provider and a driver that launches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec.kernels.launcher.build import Library

pytestmark = pytest.mark.full

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[3]


def run(library: Path, driver: Path, log: Path, case: str, cc: int = 90) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("nodes.py"), library, case],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver)}
        | {"FAKE_LOG": str(log), "FAKE_CC": str(cc)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def said(log: Path, what: str) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [found for found in map(json.loads, lines) if what in found]


@pytest.mark.parametrize(
    ("case", "launches", "shapes"),
    [
        ("linear", [("linear", [2, 1, 1])], {"out": [6, 128]}),
        ("wide", [("linear", [4, 1, 1])], {"out": [6, 256]}),
        ("linear:many", [("many_linear", [132, 1, 1])], {"out": [70, 128]}),
        ("linear:none", [], {"out": [0, 128]}),
        ("norm", [("skip_norm", [6, 1, 1])], {"codes": [6, 128], "scale": [6]}),
    ],
)
def test_rows_of_tokens(
    on_cpu: Path, fake: Path, tmp_path: Path, case: str,
    launches: list[Any], shapes: dict[str, list[int]],
) -> None:  # fmt: skip
    log = tmp_path / "log"
    assert run(on_cpu, fake, log, case) == {"shapes": shapes}
    assert [(each["launch"], each["grid"]) for each in said(log, "launch")] == launches


@pytest.mark.parametrize(
    ("case", "names", "tokens"),
    [
        ("attention", ["rope_append", "attend_many", "encode"], 6),
        ("global", ["rope_append", "attend_many", "encode"], 6),
        ("attention:step", ["attend", "combine", "encode"], 3),
    ],
)
def test_attention_writes_caches_that_are_outputs(
    on_cpu: Path, fake: Path, tmp_path: Path, case: str, names: list[str], tokens: int
) -> None:
    """The caller has bound other memory to the caches, so that they are copied there first."""
    log = tmp_path / "log"
    cache = [3, 8, 8, 16]
    shapes = {"codes": [tokens, 128], "scale": [tokens]}
    shapes |= {"present_key": cache, "present_value": cache}
    assert run(on_cpu, fake, log, case) == {"shapes": shapes}
    assert [each["launch"] for each in said(log, "launch")] == names
    assert [each["bytes"] for each in said(log, "copy")] == [2 * 3 * 8 * 8 * 16] * 2


@pytest.mark.parametrize(
    ("case", "cc", "parts"),
    [
        ("norm:constants", 90, ("no program for eps=0.5", "expected eps=1e-05")),
        ("attention:batch", 90, ("moec::attention_fp8", "7 tokens", "multiple of 3")),
        ("linear", 80, ("compute capability 80", "expected 90")),
    ],
)
def test_refusals_are_errors_of_onnx_runtime(
    on_cpu: Path, fake: Path, tmp_path: Path, case: str, cc: int, parts: tuple[str, ...]
) -> None:
    found = run(on_cpu, fake, tmp_path / "log", case, cc)["failed"]
    assert all(part in found for part in (*parts, "found", "expected")), found
    assert not said(tmp_path / "log", "launch")


def test_without_a_driver(on_cpu: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    found = run(on_cpu, tmp_path, tmp_path / "log", "linear")["failed"]
    assert "NVIDIA's driver" in found and "run where there is a GPU" in found


def test_it_asks_for_onnx_runtimes_gpu_provider(library: Library, tmp_path: Path) -> None:
    """The library as it is delivered: a runtime without that provider has no kernel for a node."""
    assert library.library
    found = run(library.library, tmp_path, tmp_path / "log", "linear")["failed"]
    assert "fp8_linear" in found and "NOT_IMPLEMENTED" in found


def test_it_exports_one_function_and_links_nothing_of_cuda(library: Library) -> None:
    listed = subprocess.run(
        ["nm", "-D", library.library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [line.split()[-1] for line in listed if " T " in line]
    assert "RegisterCustomOps" in names and all(name.startswith(("moec_", "Reg")) for name in names)
    assert not [line for line in listed if line.split()[-1].startswith(("cu", "Ort"))]
